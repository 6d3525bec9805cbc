"""One rank ends, and the others end too, though no collective and no launcher tells them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tokenformer.parallel import lifeline
from megatron_tokenformer.parallel.environment import Processes, free_port

ROOT = Path(__file__).parents[2]

# Three ranks without a launcher, on two hosts by name; what rank 2 does is the test's, the others wait.
RANK = """
import os, signal, socket, sys, time
from datetime import timedelta
rank, ending = int(os.environ["RANK"]), sys.argv[1]
socket.gethostname = lambda: "ab"[rank // 2]
from megatron_tokenformer.parallel import lifeline
from megatron_tokenformer.parallel.environment import find_processes
from megatron_tokenformer.parallel.roll_call import open_store, roll_call
from megatron_tokenformer.parallel.telling import tell
from megatron_tokenformer.errors import UserError
lifeline.GRACE_S = 0.0
here = find_processes()
store = open_store(here, timedelta(seconds=60))
lifeline.start(store, here, roll_call(store, here, timedelta(seconds=60), "cpu"))
if rank == 2:
    if ending == "error":
        sys.exit(tell(UserError("no room on the disk", 1)))
    if ending == "bug":
        try:
            raise KeyError("what")
        except KeyError as error:
            tell(error)
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "done":
        sys.exit(0)
if rank == 1 and ending == "consequence":
    try:
        raise RuntimeError("Connection closed by peer")
    except RuntimeError as error:
        # One write, since the end of the process may come between two.
        print(f"code {tell(error)}", end="", flush=True)
if ending == "consequence" and rank == 2:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(5 if ending == "done" else 120)
"""


def run(ending: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of the three ranks."""
    port = str(free_port())
    ranks = []
    for rank in range(3):
        facts = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "3"}
        facts |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, ending],
                env={**os.environ, **facts},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    deadline = time.monotonic() + 100  # far below the sleep of those that wait: only the lifeline ends them
    try:
        said = [each.communicate(timeout=deadline - time.monotonic())[0] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    return [each.returncode for each in ranks], said


def test_a_failure_is_told_by_its_rank_and_once_on_each_other_host() -> None:
    codes, said = run("error")
    assert codes == [1, 1, 1]
    assert said[2] == "error: rank 2: no room on the disk\n"
    assert said[0] == "error: rank 2 on b: no room on the disk\n"
    assert said[1] == ""


def test_news_that_come_with_the_greeting_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    news: Queue[dict[str, object]] = Queue()
    place: Queue[dict[str, Any]] = Queue()
    store: Any = SimpleNamespace(set=lambda _, value: place.put(json.loads(value)))
    monkeypatch.setattr(lifeline.Lifeline, "_fail", lambda _, message: news.put(message))
    first = Processes("srun", 0, 0, 2, "127.0.0.1", free_port())
    with ThreadPoolExecutor(1) as thread:
        accepted = thread.submit(lifeline._accept, store, first)
        there = place.get(timeout=60)
        failed = {"rank": 1, "failed": "no room on the disk"}
        said = "".join(json.dumps(line) + "\n" for line in ({"rank": 1, "word": there["word"]}, failed))
        with socket.create_connection(("127.0.0.1", there["port"])) as end:
            end.sendall(said.encode())
        lifeline.Lifeline(first, accepted.result(), ["a", "b"])
    assert news.get(timeout=60) == failed


@pytest.mark.parametrize(
    "ending, code, why",
    [
        ("bug", 1, "KeyError: 'what'"),
        ("kill", -signal.SIGKILL, "it ended without a word: killed, or see above for what it said"),
    ],
)
def test_what_a_rank_cannot_tell_itself_is_told_by_others(ending: str, code: int, why: str) -> None:
    codes, said = run(ending)
    assert codes == [1, 1, code]
    assert said[0] == f"error: rank 2 on b: {why}\n"
    assert said[1] == ""


def test_a_rank_that_fails_since_another_ended_keeps_quiet() -> None:
    codes, said = run("consequence")
    assert codes == [1, 1, -signal.SIGKILL]
    assert said[1] in ("", "code 1")
    assert "rank 2 on b: it ended without a word" in said[0]


def test_an_orderly_end_ends_nobody() -> None:
    assert run("done") == ([0, 0, 0], ["", "", ""])
