"""Training under SLURM: by srun and by the example's batch script, through requeues and deaths."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import rows
from tests.cluster.hosts import ROOT
from tests.cluster.slurm import Slurm

PRETRAIN = ["-m", "megatron_tokenformer.training.pretrain", "--config"]
SIZE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
LONG = ["training.steps=100000", "training.eval_steps=0", "parallel.timeout_minutes=5"]
SCRIPT = str(ROOT / "examples/slurm/pretrain.sbatch")
MINUTE = 60.0


def checkpoints(folder: Path) -> int:
    return len(list(folder.glob("run/checkpoints/step-*/manifest.json")))


def test_srun_is_enough(slurm: Slurm, config: Path) -> None:
    """No variable is set by hand: rank, world, first host and port come from SLURM."""
    said = slurm.hosts.run(
        slurm.login, "srun", *SIZE, "--ntasks-per-node=2", "python", *PRETRAIN, config, "parallel.tensor=2"
    )
    assert "4 processes on 2 host(s), started by srun: tensor 2, pipeline 1, data 2" in said
    assert "n1: rank 0-1 (pipeline stage 0, data 0, tensor 0-1)" in said
    assert "n2: rank 2-3 (pipeline stage 0, data 1, tensor 0-1)" in said
    assert "warning: tensor-parallel" not in said
    assert (config.parent / "run/finished.json").exists()


def test_ranks_dealt_like_cards_are_warned_of(slurm: Slurm, config: Path) -> None:
    said = slurm.hosts.run(
        slurm.login,
        *("srun", *SIZE, "--ntasks-per-node=2", "--distribution=cyclic"),
        *("python", *PRETRAIN, config, "parallel.tensor=2", "training.steps=2"),
    )
    assert "tensor-parallel ranks 0-1 are on different hosts (n1, n2), and so are 1 more groups" in said
    assert said.index("are on different hosts") < said.index("step 0/2")


def test_a_job_that_is_requeued_goes_on_from_its_newest_checkpoint(slurm: Slurm, config: Path) -> None:
    folder, log = config.parent, config.parent / "log"
    options = [*SIZE, f"--output={log}"]
    overrides = ["training.steps=300", "checkpoint.interval=20", "checkpoint.keep_last=100"]
    job = slurm.submit(*options, SCRIPT, config, *overrides)
    slurm.wait(lambda: checkpoints(folder) >= 2, 300)
    slurm.query("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.facts(job).get("Restarts") == "1", 60)
    slurm.wait_for(job, "COMPLETED")
    said = log.read_text()
    went_on = [int(step) for step in re.findall(r"from \S+ at step (\d+),", said)]
    assert len(went_on) == 1 and went_on[0] >= 40, said
    # Of the steps before, those after the checkpoint alone were done twice.
    first, second = said.split(f"from {folder}/run/checkpoints", 1)
    assert int(re.findall(r"^step +(\d+)/300", first, re.MULTILINE)[-1]) < went_on[0] + 40
    assert int(re.findall(r"^step +(\d+)/300", second, re.MULTILINE)[0]) == went_on[0] + 1
    assert [row["step"] for row in rows(folder / "run") if "loss" in row] == list(range(1, 301))
    assert (folder / "run/finished.json").exists()


def test_a_job_that_is_told_to_leave_saves_and_goes_back_into_the_queue(slurm: Slurm, config: Path) -> None:
    """SIGUSR1 to the ranks, as `--signal=USR1@180` sends it: no step is done twice, and none is left out."""
    log = config.parent / "log"
    sizes = ["training.steps=150", "checkpoint.interval=0", "training.eval_interval=0"]
    job = slurm.submit(*SIZE, f"--output={log}", SCRIPT, config, *sizes)
    slurm.wait(lambda: log.exists() and re.search(r"step +3/", log.read_text()) is not None, 180)
    slurm.query("scancel", "--signal=USR1", job)
    slurm.wait(lambda: slurm.facts(job).get("Restarts") == "1", 60)
    slurm.wait_for(job, "COMPLETED")
    said = log.read_text()
    (left,) = re.findall(r"left at step (\d+) for SIGUSR1; the same command goes on from there", said)
    assert re.findall(r"from \S+ at step (\d+),", said) == [left]
    assert [int(step) for step in re.findall(r"^step +(\d+)/150  loss", said, re.MULTILINE)] == [
        *range(1, 151)
    ]
    assert (config.parent / "run/finished.json").exists()


def test_a_failure_is_not_tried_again(slurm: Slurm, config: Path) -> None:
    log = config.parent / "log"
    job = slurm.submit(*SIZE, f"--output={log}", SCRIPT, config, "data.train=nowhere")
    slurm.wait_for(job, "FAILED", 120)
    assert slurm.facts(job)["ExitCode"] == "2:0"
    assert log.read_text().count("error: no data at 'nowhere'") == 1


@pytest.mark.parametrize("killed", ["rank", "step"])
def test_one_rank_less_ends_the_job_within_a_minute(slurm: Slurm, config: Path, killed: str) -> None:
    """`step`: srun itself is killed, which nobody but SLURM could tell the ranks."""
    log = config.parent / "log"
    job = slurm.submit(*SIZE, f"--output={log}", SCRIPT, config, *LONG)
    slurm.wait(lambda: log.exists() and re.search(r"step +3/", log.read_text()) is not None, 180)
    since = time.monotonic()
    if killed == "rank":
        slurm.hosts.kill("n2", "python -m megatron_tokenformer.training.pretrain", signal.SIGKILL)
    else:
        slurm.hosts.run("n1", "bash", "-c", "kill -9 $(pgrep -x srun)")
    slurm.wait_for(job, "FAILED", MINUTE)
    slurm.wait(slurm.is_idle, MINUTE - (time.monotonic() - since))
    if killed == "rank":
        said = log.read_text()
        assert "error: rank 1 on n2: it ended without a word: killed" in said
        assert "Traceback" not in said


def test_a_node_that_never_comes_is_named(slurm: Slurm, config: Path) -> None:
    late = 'if [ "$SLURM_PROCID" = 1 ]; then exec sleep 300; fi; exec python "$@"'
    done = slurm.hosts.attempt(
        slurm.login,
        *("srun", *SIZE, "--kill-on-bad-exit=1", "bash", "-c", late, "bash"),
        *(*PRETRAIN, config, "parallel.join_minutes=0.3"),
        seconds=120,
    )
    assert done.returncode != 0
    assert "1 of 2 processes have not come: rank 1 (nothing came from n2); here are n1" in done.stdout
