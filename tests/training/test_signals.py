"""A run that is asked to leave saves within a step and goes on later as if it had never left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.store import complete_checkpoints, find_checkpoint, first_good
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.metrics_file import read_rows
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import loop
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

LAYOUTS: dict[str, dict[str, Any]] = {"tensor 2": {"tensor": 2}, "pipeline 2": {"pipeline": 2}, "1": {}}


def config_of(folder: Path, name: str, layout: str = "1", **training: Any) -> RunConfig:
    sizes = {"micro_batch_size": 2, "steps": 6, "eval_interval": 4, **training}
    config = toy_config(folder, parallel=LAYOUTS[layout], training=sizes, checkpoint={"interval": 2})
    return config.model_copy(update={"run_dir": str(folder / name)})


def after_step(step: int, act: Any) -> None:
    """Call `act` in this process when a step is done, once."""
    inner = loop.train_step

    def watched(run: Any, batches: Any) -> Any:
        loss = inner(run, batches)
        if run.progress.step == step:
            act()
        return loss

    loop.train_step = watched


def train_asked(layout: Layout, config: RunConfig, number: int) -> tuple[str | None, dict[str, Any]]:
    """Train; rank 1 alone gets a signal when step 3 is done."""
    if layout.rank == 1:
        after_step(3, lambda: os.kill(os.getpid(), number))
    left = loop.train(config, layout)
    return left, json.loads((Path(config.run_dir) / "interrupted.json").read_text())


def numbers(run_dir: str) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "val_loss")
    return [tuple(row.get(key) for key in keys) for row in read_rows(Path(run_dir) / "metrics.jsonl")]


@pytest.mark.parametrize(
    "layout, number",
    [("tensor 2", signal.SIGTERM), ("pipeline 2", signal.SIGUSR1)],
)
def test_one_rank_is_asked_and_all_save_and_leave(
    tmp_path: Path, layout: str, number: signal.Signals
) -> None:
    straight, asked = config_of(tmp_path, "straight", layout), config_of(tmp_path, "asked", layout)
    run_ranks(2, train_toy, straight, **LAYOUTS[layout])
    for left, record in run_ranks(2, train_asked, asked, number, **LAYOUTS[layout]):
        assert left == number.name
        assert record == {"step": 4, "reason": number.name, "exit_code": 85}
    assert find_checkpoint(asked.run_dir).name == "step-00000004"
    run_ranks(2, train_toy, asked, **LAYOUTS[layout])
    assert not (Path(asked.run_dir) / "interrupted.json").exists()
    assert numbers(asked.run_dir) == numbers(straight.run_dir), "the evaluation of step 4 was made up for"
    ends = [read_manifest(find_checkpoint(config.run_dir)) for config in (asked, straight)]
    assert [s.hash for s in ends[0].shards] == [s.hash for s in ends[1].shards]


def test_the_end_of_its_time_is_a_request_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", max_minutes=1e-6)
    run_ranks(1, train_toy, config)
    record = json.loads((tmp_path / "run/interrupted.json").read_text())
    assert (record["step"], record["reason"]) == (1, "training.max_minutes")
    assert find_checkpoint(tmp_path / "run").name == "step-00000001"


def leave_unrecorded(layout: Layout, config: RunConfig) -> str | None:
    """Leave when the time is up, on a disk that takes the checkpoint and not the record."""

    def fail(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    loop.replace_durably = fail
    return loop.train(config, layout)


def test_a_record_that_cannot_be_written_makes_no_failure_of_what_is_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run", max_minutes=1e-6)
    assert run_ranks(2, leave_unrecorded, config) == ["training.max_minutes"] * 2
    assert find_checkpoint(tmp_path / "run").name == "step-00000001"
    assert not (tmp_path / "run/interrupted.json").exists()


def ask_twice(layout: Layout, config: RunConfig) -> None:
    from megatron_tokenformer import errors

    errors.ECHO_S = 0.0

    def signal_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        time.sleep(30)

    after_step(5, signal_twice)
    loop.train(config, layout)


def test_a_second_signal_ends_it_at_once_and_harms_no_checkpoint(tmp_path: Path) -> None:
    config = config_of(tmp_path, "run")
    with pytest.raises(AssertionError, match="died"):
        run_ranks(1, ask_twice, config)
    folder = Path(config.run_dir) / "checkpoints"
    complete = complete_checkpoints(folder)
    assert complete[0].name == "step-00000002" and first_good(complete[::-1])[0] == complete[-1]
    assert not (Path(config.run_dir) / "interrupted.json").exists()
    run_ranks(1, train_toy, config)
    assert find_checkpoint(config.run_dir).name == "step-00000006"


SECOND_SIGNAL = """
import ctypes, os, signal, time
from megatron_tokenformer import errors
from megatron_tokenformer.training import signals
with signals.requests_to_leave(None) as requests:
    os.kill(os.getpid(), signal.SIGUSR1)
    while not any(requests.pending()): pass
    os.kill(os.getpid(), signal.SIGUSR1)  # a launcher's echo
    time.sleep(0.2)
    errors.ECHO_S = 0.0
    os.kill(os.getpid(), signal.SIGTERM)  # what a scheduler ends with when nobody has left
    time.sleep(0.2)
    print(requests.pending(), flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never returns, as a collective that waits for a rank that is gone
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_launchers_echo_is_no_second_signal_and_a_second_one_needs_no_main_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "[False, True, False]\n", done.stderr
    assert done.returncode == 128 + signal.SIGUSR1
