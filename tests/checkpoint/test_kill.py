"""A rank is killed in the middle of a save; what was complete before still is, and is found.

A moment is the execution of a line of the checkpoint package or of shutil: the rank that is to die counts
those of its saving threads, and kills itself before one.  The lines that a save passes are cut into
stretches; in each a line is drawn, and then one of the times that it is passed.  So the moments are spread
over all that a save does, on a machine of any speed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import megatron_tokenformer.checkpoint
from megatron_tokenformer.checkpoint.store import (
    LATEST,
    clear_leftovers,
    complete_checkpoints,
    find_checkpoint,
    first_good,
)
from megatron_tokenformer.parallel.layout import Layout
from tests.checkpoint.saves import manifest, open_saver, state, stored_value
from tests.ranks import run_ranks

FILES = (str(Path(megatron_tokenformer.checkpoint.__file__).parent), shutil.__file__)
STEPS = range(2, 5)
KILLS = 25
"""for each number of ranks"""


def before_each_line(act: Callable[[str], object]) -> None:
    """Call `act` with each line of FILES that a new thread is about to execute."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(FILES):
            return None
        if event == "line":
            act(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return trace

    threading.settrace(trace)


def save_until_killed(
    layout: Layout, folder: Path, asynchronous: bool, rank: int | None = None, moment: int = 0
) -> list[str]:
    """Save at 1 unharmed, then at STEPS; tell in a file how many are done, and return the lines executed."""
    lines: list[str] = []

    def die(line: str) -> None:
        if layout.rank == rank and len(lines) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        lines.append(line)

    told = os.open(folder.with_suffix(f".said-{layout.rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with open_saver(layout, folder, lambda _: os.write(told, b"."), asynchronous=asynchronous) as saver:
        saver.start(manifest(layout, 1), state(layout, 1.0))
        saver.wait()
        before_each_line(die)
        for step in STEPS:
            saver.start(manifest(layout, step), state(layout, step))
    return lines


def check(folder: Path) -> str:
    """See that what is there is good; return the state in which the killed save was."""
    complete = complete_checkpoints(folder)
    assert 1 <= len(complete) <= 3
    assert sorted(folder.glob("step-*")) == complete, "a part of a checkpoint has the name of a whole one"
    for path in complete:
        assert stored_value(path) == int(path.name.removeprefix("step-"))
    assert (folder / LATEST).read_text().strip() in [path.name for path in complete]
    assert find_checkpoint(folder) in complete and first_good(complete[::-1])[0] == complete[-1]
    said = folder.with_suffix(".said-0").read_text()
    assert complete[-1].name >= f"step-{len(said):08d}", "one that was said to be saved is not there"
    left = {path.suffix for path in folder.glob(".step-*")}
    clear_leftovers(folder)
    assert complete_checkpoints(folder) == complete
    assert not list(folder.glob(".step-*"))
    return min(left, default="")


@pytest.mark.parametrize("world_size", [1, 2])
def test_whenever_a_rank_is_killed_the_newest_complete_checkpoint_loads(
    tmp_path: Path, world_size: int
) -> None:
    drawn = random.Random(world_size)
    unharmed = {
        asynchronous: run_ranks(
            world_size, save_until_killed, tmp_path / f"unharmed-{asynchronous}", asynchronous
        )
        for asynchronous in (True, False)
    }
    places = sorted({(rank, line) for rank in range(world_size) for line in unharmed[True][rank]})
    found = set()
    for kill in range(KILLS):
        rank, place = drawn.choice(places[kill * len(places) // KILLS : (kill + 1) * len(places) // KILLS])
        asynchronous, folder = kill % 2 == 0, tmp_path / f"kill-{kill}"
        moments = [moment for moment, line in enumerate(unharmed[asynchronous][rank]) if line == place]
        with pytest.raises(AssertionError, match=r"died|Connection closed|Connection reset|recv"):
            run_ranks(world_size, save_until_killed, folder, asynchronous, rank, drawn.choice(moments))
        found.add(check(folder))
    assert {"", ".writing"} <= found, "the moments were not spread over a save"
