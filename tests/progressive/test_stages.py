"""The stage machine ends every stage once, however often it is killed, and refuses what it cannot trust."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.lock import exclusive
from megatron_tokenformer.progressive.plan import load_plan
from megatron_tokenformer.progressive.reconcile import train_settings

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
TINY = Path(__file__).with_name("tiny.py")
COMMANDS = ("train-a", "grow-b", "train-b", "grow-c", "train-c")
GROWN = {"grow-b": "grow-b from a/step-00000004", "grow-c": "grow-c from b/step-00000004"}


def start(path: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(TINY), "machine", str(path)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(path: Path, **variables: str) -> tuple[int, str]:
    process = start(path, **variables)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def journal(schedule: Tree) -> Tree:
    stages: Tree = json.loads((Path(schedule["run_dir"]) / "journal.json").read_text())["stages"]
    return stages


def log(schedule: Tree) -> list[str]:
    return (Path(schedule["run_dir"]) / "log.txt").read_text().splitlines()


def test_killed_at_every_point_it_goes_on_where_it_was(schedule: Tree, write: Write) -> None:
    path = write(schedule)
    points = [f"{command}:{point}" for command in COMMANDS for point in ("begin", "middle", "end")]
    for _ in points:
        code, output = call(path, KILL=" ".join(points))
        assert code == -signal.SIGKILL, output
    code, output = call(path, KILL=" ".join(points))
    assert code == 0, output
    # A growth killed at its end is made again, which nothing tells from a half-made one; a training is not.
    expected = []
    for command in COMMANDS:
        expected += [GROWN.get(command, command)] * (4 if command.startswith("grow") else 3)
    assert log(schedule) == expected
    for name, actions in journal(schedule).items():
        assert {action["status"] for action in actions.values()} == {"done"}
        assert (Path(schedule["run_dir"]) / name / "steps.txt").read_text() == "...."
    code, output = call(path)
    assert (code, log(schedule)) == (0, expected), "a second call starts nothing"


def test_a_failing_command_is_named_and_the_next_call_goes_on(schedule: Tree, write: Write) -> None:
    path = write(schedule)
    code, output = call(path, FAIL="train-b:middle")
    assert code == 1
    assert "stage 'b' (train) ended with exit code 3: MACHINE=" in output
    assert "the same call goes on from there" in output
    assert "Traceback" not in output
    assert journal(schedule)["b"]["train"]["status"] == "failed"
    assert call(path)[0] == 0
    assert journal(schedule)["b"]["train"]["seconds"] > 0


def test_the_record_of_being_finished_decides_not_the_exit_code(schedule: Tree, write: Write) -> None:
    code, output = call(write(schedule), FAIL="train-a:end")
    assert code == 0, output
    assert journal(schedule)["a"]["train"]["result"]["step"] == 4


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 85), (signal.SIGUSR1, 85)]
)
def test_a_signal_is_passed_on_and_ends_the_call(
    schedule: Tree, write: Write, number: signal.Signals, code: int
) -> None:
    process = start(write(schedule), HANG="train-a:middle")
    mark = Path(schedule["run_dir"]) / "reached-train-a-middle"
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"error: {number.name} in stage 'a' (train); the same call goes on from there" in output
    assert journal(schedule)["a"]["train"]["status"] == "interrupted"
    assert call(write(schedule))[0] == 0


@pytest.mark.parametrize("code", [85, 1])
def test_a_run_that_was_asked_to_leave_is_to_be_continued(schedule: Tree, write: Write, code: int) -> None:
    """Its record tells, as torchrun makes 1 of every exit code; and it tells of one start alone."""
    path = write(schedule)
    found, output = call(path, LEAVE=f"train-b:middle:{code}")
    assert found == 85, output
    assert "error: stage 'b' (train) left at step 3 for SIGTERM; the same call goes on from there" in output
    assert journal(schedule)["b"]["train"]["status"] == "interrupted"
    found, output = call(path, FAIL="train-b:begin")
    assert found == 1, "the record of before does not make a failure look like a request"
    assert call(path)[0] == 0
    assert (Path(schedule["run_dir"]) / "b" / "steps.txt").read_text() == "...."


def test_the_exit_code_alone_says_to_be_continued_too(schedule: Tree, write: Write) -> None:
    found, output = call(write(schedule), FAIL="train-a:middle", FAIL_CODE="85")
    assert (found, journal(schedule)["a"]["train"]["status"]) == (85, "interrupted"), output


def test_a_changed_config_of_a_done_stage_is_refused(schedule: Tree, write: Write) -> None:
    assert call(write(schedule))[0] == 0
    schedule["stages"][1]["config"]["optimizer"] = {"lr": 1e-3}
    code, output = call(write(schedule))
    run = Path(schedule["run_dir"])
    assert code == 2
    assert (
        "stage 'b' is done with other settings than the schedule has now: optimizer.lr was 0.0006" in output
    )
    assert f"delete {run / 'b'} {run / 'c'}" in output
    subprocess.run(["rm", "-r", str(run / "b")], check=True)
    code, output = call(write(schedule))
    assert code == 2
    assert (
        f"stage 'c' is begun, but 'b', which it grows from, is not done (any more); delete {run / 'c'}"
        in output
    )
    subprocess.run(["rm", "-r", str(run / "c")], check=True)
    assert call(write(schedule))[0] == 0
    assert log(schedule).count("train-a") == 1


def test_another_layout_for_a_done_stage_is_no_change(schedule: Tree, write: Write) -> None:
    assert call(write(schedule))[0] == 0
    schedule["stages"][1]["config"]["parallel"] = {"tensor": 1}
    assert call(write(schedule))[0] == 0
    assert journal(schedule)["b"]["train"]["result"]["layout"] == "tensor 2"


def test_what_decides_the_result_of_a_stage(schedule: Tree, write: Write) -> None:
    """A new key of the configuration belongs here, or into FREE_SETTINGS."""
    settings = train_settings(load_plan(write(schedule)).stages[0])
    sections = {key for key in settings if not key.startswith(("model.", "data.", "optimizer."))}
    assert sections == {
        *("checkpoint.load", "training.eval_steps", "training.global_batch_size"),
        *("training.precision", "training.seed", "training.steps"),
    }


def test_growth_not_yet_trained_on_is_made_again_when_its_settings_change(
    schedule: Tree, write: Write
) -> None:
    path = write(schedule)
    (folder := Path(schedule["run_dir"]) / "b").mkdir(parents=True)
    call(path, KILL="train-b:begin")
    entries = json.loads((folder.parent / "journal.json").read_text())
    del entries["stages"]["b"]["train"]  # as if killed between the two actions
    (folder.parent / "journal.json").write_text(json.dumps(entries))
    schedule["stages"][1]["growth"] = {"optimizer": "reset"}
    assert call(write(schedule))[0] == 0
    assert log(schedule).count(GROWN["grow-b"]) == 2
    schedule["stages"][1]["growth"] = {"optimizer": "carry"}
    assert "growth.optimizer was reset, is carry" in call(write(schedule))[1]


def test_a_run_that_the_journal_does_not_know_is_refused(schedule: Tree, write: Write) -> None:
    (Path(schedule["run_dir"]) / "a" / "checkpoints").mkdir(parents=True)
    code, output = call(write(schedule))
    assert code == 2
    assert "does not know; move it away" in output


def test_a_journal_that_is_none_is_refused(schedule: Tree, write: Write) -> None:
    Path(schedule["run_dir"]).mkdir()
    (Path(schedule["run_dir"]) / "journal.json").write_text('{"stages": 3}')
    code, output = call(write(schedule))
    assert code == 2
    assert "journal.json is not a journal" in output


def test_a_second_machine_is_refused_while_the_first_runs(schedule: Tree, write: Write) -> None:
    folder = Path(schedule["run_dir"])
    with exclusive(folder):
        code, output = call(write(schedule))
        assert code == 1
        assert f"{folder} is in use by process {os.getpid()} on " in output
    with exclusive(folder):
        pass


def test_one_stage_alone_after_those_before_it(schedule: Tree, write: Write) -> None:
    path = write(schedule)
    code, output = call(path, ONLY="b")
    assert code == 1
    assert "stage 'b' comes after 'a', which is not done" in output
    for stage in ("a", "b", "b"):
        assert call(path, ONLY=stage)[0] == 0
    assert log(schedule) == ["train-a", GROWN["grow-b"], "train-b"]


OTHER_HOST = '{"host": "node-of-before", "pid": 1, "job": "7"}'


@pytest.mark.parametrize("record", ['{"host": "node-of-before", "pid": 1}', OTHER_HOST])
def test_a_lock_of_another_host_is_never_taken_over(
    tmp_path: Path, record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if it had a SLURM job, where SLURM cannot be asked about it."""
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "lock").write_text(record)
    with pytest.raises(UserError, match="process 1 on node-of-before"), exclusive(tmp_path, patience=0.0):
        pass


def test_a_lock_of_this_very_job_before_it_was_requeued_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "lock").write_text(OTHER_HOST)
    with exclusive(tmp_path, patience=0.0):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_dead_machine_whose_command_still_runs_is_waited_for(tmp_path: Path) -> None:
    with exclusive(tmp_path) as lock:
        command = subprocess.Popen(["sleep", "1.0"], pass_fds=(lock,))
        duplicate = os.dup(lock)
    dead = subprocess.Popen(["true"])
    dead.wait()
    record = {"host": os.uname().nodename, "pid": dead.pid}
    os.pwrite(duplicate, json.dumps(record).encode(), 0)
    os.close(duplicate)
    with pytest.raises(UserError, match="or by a command that it started"), exclusive(tmp_path, patience=0.0):
        pass
    with exclusive(tmp_path, patience=20.0):
        assert command.wait() == 0
