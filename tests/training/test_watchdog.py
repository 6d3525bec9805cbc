"""A run that is stuck ends, and says where each of its ranks was."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import loop, watchdog
from tests.ranks import run_ranks
from tests.toy import toy_config

STUCK = """
import sys, threading, time
from megatron_tokenformer.training import watchdog
watchdog.PATIENCE_S, watchdog.TICK_S, watchdog.BACKSTOP_S = 0.0, 0.05, 1.0
def wait_for_a_rank_that_never_comes():
    if sys.argv[1] == "holding the interpreter":
        import ctypes
        time.sleep(1.0)  # the thread must have looked once: it sets faulthandler's clock
        ctypes.PyDLL(None).sleep(60)
    time.sleep(60)
with watchdog.Watchdog(3) as watch:
    with watch.limit("a save", 5):
        with watch.limit("an evaluation", 0.001):
            pass
    time.sleep(0.3)
    print("nothing is watched", flush=True)
    with watch.limit("step 7", float(sys.argv[2])):
        wait_for_a_rank_that_never_comes()
"""


@pytest.mark.parametrize(
    "how, minutes, code", [("waiting", "0.002", 86), ("holding the interpreter", "0.1", 1)]
)
def test_what_takes_too_long_ends_the_process_with_its_stacks(how: str, minutes: str, code: int) -> None:
    command = [sys.executable, "-c", STUCK, how, minutes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "nothing is watched\n"
    assert done.returncode == code, done.stderr
    assert "in wait_for_a_rank_that_never_comes" in done.stderr
    if how == "waiting":
        assert done.stderr.startswith("error: rank 3 on ")
        assert ": step 7 takes longer than 0.002 minutes\n[rank 3] " in done.stderr


def hang_in_step_2(layout: Layout, config: RunConfig, folder: Path) -> None:
    """Rank 1 stands still in its second step; the first has a limit of its own."""
    told = os.open(folder / f"rank-{layout.rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(told, 2)
    sys.stderr = open(2, "w", closefd=False)
    watchdog.PATIENCE_S = 5.0
    inner = loop.train_step

    def stands_still(run: Any, batches: Any) -> Any:
        if run.progress.step == 1 and layout.rank == 1:
            time.sleep(120)
        return inner(run, batches)

    loop.train_step = stands_still
    loop.train(config, layout)


def test_all_ranks_of_a_run_tell_where_they_stand(tmp_path: Path) -> None:
    config = toy_config(
        tmp_path, training={"micro_batch_size": 2, "step_timeout_minutes": 0.01, "eval_steps": 0}
    )
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_ranks(2, hang_in_step_2, config, tmp_path)
    for rank, where in ((0, "in train_batch"), (1, "in stands_still")):
        told = (tmp_path / f"rank-{rank}").read_text()
        assert f"error: rank {rank} on " in told and "step 2 takes longer than 0.01 minutes" in told
        assert any(line.startswith(f"[rank {rank}]") and where in line for line in told.splitlines()), told
