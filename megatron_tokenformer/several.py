"""Several commands of a study at once, each with its messages in a file of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from megatron_tokenformer.errors import UserError

Item = TypeVar("Item")
TICK_SECONDS = 5.0


def for_all(
    jobs: int, act: Callable[[Item], None], items: Iterable[Item], tick: Callable[[int], object]
) -> None:
    """Call `act` with each item, in order, at most `jobs` at once; after a failure none is begun any more.

    Args:
        tick: called with the number of items that are done, every few seconds and at the end.

    Raises:
        Exception: the first that an `act` raised, when those that had begun have ended.
    """
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(act, item) for item in items}
        total = len(waiting)
        try:
            while waiting:
                done, waiting = wait(waiting, TICK_SECONDS, FIRST_COMPLETED)
                for each in done:
                    each.result()
                tick(total - len(waiting))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def call_python(folder: Path, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
    """Run this Python with arguments; its messages go to `folder`/output.log.

    Args:
        environment: variables besides this process's.

    Raises:
        UserError: it failed; with its exit code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    with open(folder / "output.log", "a", encoding="utf-8") as log:
        own = {**os.environ, **(environment or {})}
        code = subprocess.run(command, stdout=log, stderr=log, env=own, check=False).returncode
    if code:
        raise UserError(f"{' '.join(command)} failed; its messages are in {log.name}", exit_code=1)
