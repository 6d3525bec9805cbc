"""A stage machine that is a SLURM job: when it puts itself back into the queue, and when not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.progressive.test_stages import Tree, Write, call, journal, log, start

USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


def scontrol(folder: Path, code: int = 0) -> dict[str, str]:
    """Variables for a machine whose scontrol notes its arguments; tests/cluster has the real one."""
    folder.mkdir()
    script = folder / "scontrol"
    refusal = "echo 'Job is gone' >&2" if code else ":"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{refusal}\nexit {code}\n')
    script.chmod(0o755)
    return {"REQUEUE": "1", "PATH": f"{folder}:{os.environ['PATH']}"}


def requeues(folder: Path) -> list[str]:
    calls = folder / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    "where, number, code, requeued, told",
    [
        ({"HANG": "train-a:middle"}, USR1, 85, True, "SIGUSR1 in stage 'a' (train)"),
        ({"HANG": "grow-b:middle"}, USR1, 85, True, "SIGUSR1 in stage 'b' (grow)"),
        ({"AWAIT": "1"}, USR1, 85, True, "SIGUSR1 before stage 'a' (train)"),
        ({"HANG": "train-a:middle"}, TERM, 85, False, "SIGTERM in stage 'a' (train)"),
        ({"HANG": "train-a:middle"}, INT, 130, False, "SIGINT in stage 'a' (train)"),
        ({"BREAK": "train-a:begin"}, USR1, 1, False, "and did not say that it has saved"),
        ({"BREAK": "train-a:middle"}, USR1, 1, True, "and did not say that it has saved"),
        ({"BREAK": "train-a:middle"}, TERM, 1, False, "and did not say that it has saved"),
    ],
)
def test_what_it_was_asked_by_decides(
    schedule: Tree,
    write: Write,
    tmp_path: Path,
    where: dict[str, str],
    number: signal.Signals,
    code: int,
    requeued: bool,
    told: str,
) -> None:
    process = start(write(schedule), **scontrol(tmp_path / "bin"), **where)
    point = "machine-begin" if "AWAIT" in where else next(iter(where.values())).replace(":", "-")
    mark = Path(schedule["run_dir"]) / f"reached-{point}"
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert told in output
    assert requeues(tmp_path / "bin") == (["requeue 77"] if requeued else [])


def test_a_cancelled_job_does_not_come_back(schedule: Tree, write: Write, tmp_path: Path) -> None:
    """The notice before its time is up came first, and SIGTERM while all was being saved."""
    process = start(write(schedule), **scontrol(tmp_path / "bin"), HANG="train-a:begin")
    while not (Path(schedule["run_dir"]) / "reached-train-a-begin").exists():
        time.sleep(0.02)
    process.send_signal(USR1)
    process.send_signal(TERM)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, requeues(tmp_path / "bin")) == (85, []), output


def test_a_run_that_left_by_itself_goes_back_into_the_queue(
    schedule: Tree, write: Write, tmp_path: Path
) -> None:
    """Such as one whose ranks alone got SIGTERM, as at the start of a preemption's grace time."""
    code, output = call(write(schedule), **scontrol(tmp_path / "bin"), LEAVE="train-a:middle:85")
    assert (code, requeues(tmp_path / "bin")) == (85, ["requeue 77"]), output
    assert "left at step 3 for SIGTERM" in output


@pytest.mark.parametrize("point, tried_again", [("train-a:middle", True), ("train-a:begin", False)])
def test_a_run_that_fails_is_tried_again_if_it_had_saved(
    schedule: Tree, write: Write, tmp_path: Path, point: str, tried_again: bool
) -> None:
    code, said = call(write(schedule), **scontrol(tmp_path / "bin"), FAIL=point)
    assert code == 1 and "stage 'a' (train) ended with exit code 3" in said
    assert requeues(tmp_path / "bin") == ["requeue 77"] * tried_again


def test_a_request_at_the_last_step_loses_nothing(schedule: Tree, write: Write, tmp_path: Path) -> None:
    process = start(write(schedule), **scontrol(tmp_path / "bin"), HANG="train-c:end")
    while not (Path(schedule["run_dir"]) / "reached-train-c-end").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(USR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, requeues(tmp_path / "bin")) == (0, []), output
    assert journal(schedule)["c"]["train"]["status"] == "done"


@pytest.mark.parametrize("there", [True, False])
def test_slurm_that_does_not_take_it_back_is_told(
    schedule: Tree, write: Write, tmp_path: Path, there: bool
) -> None:
    variables = scontrol(tmp_path / "bin", code=1)
    if not there:
        variables["PATH"] = str(tmp_path / "nothing")
    code, output = call(write(schedule), **variables, LEAVE="train-a:middle:85")
    why = "Job is gone" if there else "No such file or directory"
    assert code == 85
    assert (
        f"left at step 3 for SIGTERM; the same call goes on from there; scontrol requeue 77 failed: {why}"
        in (output)
    )
    assert log(schedule) == ["train-a"]
