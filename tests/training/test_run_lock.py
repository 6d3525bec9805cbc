"""Two runs in one run_dir: the second waits for the first, and is refused if that goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.run import open_run
from megatron_tokenformer.training.run_lock import only_run
from tests.ranks import run_ranks
from tests.toy import toy_config


def hold(folder: Path, pipe: Connection) -> None:
    with only_run(folder):
        pipe.send("held")
        pipe.poll(60)


def test_the_second_run_is_refused_while_the_first_lives_and_not_after_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    first = context.Process(target=hold, args=(tmp_path, theirs))
    first.start()
    assert mine.recv() == "held"
    with pytest.raises(UserError, match=f"another run is at work in {tmp_path}; wait for it"):
        with only_run(tmp_path, patience=0.3):
            pass
    assert capsys.readouterr().out == f"waiting for another run in {tmp_path} to end\n"
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    with only_run(tmp_path):  # as a run that is requeued finds its predecessor, dying
        pass
    first.join()


def lock_beside_a_run(layout: Layout, config: RunConfig) -> None:
    if not layout.is_main:
        with open_run(config, layout):
            pass
        return
    with open_run(config, layout):
        with pytest.raises(UserError, match="another run is at work"), only_run(Path(config.run_dir), 0.0):
            pass
    with only_run(Path(config.run_dir), 0.0):
        pass


def test_a_run_holds_the_lock_of_its_folder_until_it_ends(tmp_path: Path) -> None:
    run_ranks(2, lock_beside_a_run, toy_config(tmp_path))


def test_a_folder_that_cannot_be_locked_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way")
    with only_run(tmp_path / "run", patience=0.0):
        pass
