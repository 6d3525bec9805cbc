"""The stage machine on SLURM: in one allocation and as a chain of jobs, through requeues."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import ROOT
from tests.cluster.slurm import Slurm
from tests.toy import toy_config

SIZE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    """Two stages: one node, then two with twice the tokens; long enough to be interrupted."""
    common = toy_config(tmp_path, checkpoint={"interval": 20}, training={"steps": 120}).model_dump(
        mode="json"
    )
    del common["run_dir"], common["checkpoint"]["load"]
    del common["model"]["tokens"]
    stages = [
        {"name": "small", "config": {"model": {"tokens": {"qkv": 16, "output": 16, "ffn": 64}}}},
        {"name": "large", "config": {"model": {"tokens": {"qkv": 32, "output": 32, "ffn": 128}}}, "nodes": 2},
    ]
    slurm = {"gpus_per_node": 0, "cpus_per_task": 1}
    path = tmp_path / "schedule.yaml"
    launch = {"nodes": 1, "processes_per_node": 1, "slurm": slurm}
    tree = {"run_dir": str(tmp_path / "runs"), "launch": launch, "common": common, "stages": stages}
    path.write_text(yaml.safe_dump(tree))
    return path


def journal(schedule: Path) -> dict[str, Any]:
    path = schedule.parent / "runs/journal.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def status(schedule: Path) -> dict[str, str]:
    """What is done, by stage and step."""
    return {
        f"{stage} {step}": action["status"]
        for stage, actions in journal(schedule).items()
        for step, action in actions.items()
    }


def saved(schedule: Path, stage: str) -> int:
    return len(list(schedule.parent.glob(f"runs/{stage}/checkpoints/step-*/manifest.json")))


DONE = {"small train": "done", "large grow": "done", "large train": "done"}


def test_in_one_allocation_through_a_requeue(slurm: Slurm, schedule: Path) -> None:
    log = schedule.parent / "log"
    script = ROOT / "examples/slurm/progressive.sbatch"
    job = slurm.submit(*SIZE, f"--output={log}", script, schedule)
    slurm.wait(lambda: saved(schedule, "large") >= 1, 300)
    before = journal(schedule)
    slurm.query("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.facts(job).get("Restarts") == "1", 60)
    slurm.wait_for(job, "COMPLETED")
    assert status(schedule) == DONE
    after = journal(schedule)
    assert after["small"] == before["small"], "what was done is not done again"
    assert after["large"]["grow"] == before["large"]["grow"]
    said = log.read_text()
    assert said.count("== stage large: grow") == 1
    assert said.count("== stage large: train") == 2
    assert "2 processes on 2 host(s), started by srun" in said
    assert f"from {schedule.parent}/runs/large/checkpoints/step-" in said
    assert (schedule.parent / "runs/report.md").exists()


def test_a_time_limit_puts_the_job_back_into_the_queue(slurm: Slurm, schedule: Path) -> None:
    """SIGUSR1 to the script, which is the stage machine: it tells the ranks, which save, and requeues."""
    log = schedule.parent / "log"
    script = ROOT / "examples/slurm/progressive.sbatch"
    limit = ["--time=2", "--signal=B:USR1@20"]  # which SLURM may send up to a minute earlier
    sizes = ["common.training.steps=1000000", "common.checkpoint.interval=0"]
    job = slurm.submit(*SIZE, *limit, f"--output={log}", script, schedule, *sizes)
    slurm.wait(lambda: slurm.facts(job).get("Restarts") == "1", 240)
    went_on = re.compile(r"from \S+ at step (\d+),")
    slurm.wait(lambda: went_on.search(log.read_text()) is not None, 120)
    slurm.query("scancel", job)  # whose SIGTERM asks to leave too, but not to come back
    slurm.wait_for(job, "CANCELLED", 60)
    slurm.wait(slurm.is_idle, 60)
    said = log.read_text()
    left = re.findall(
        r"error: SIGUSR1 in stage 'small' \(train\), which left at step (\d+) for SIGUSR1;", said
    )
    came = went_on.findall(said)
    assert came and came == left[: len(came)]
    assert status(schedule)["small train"] == "interrupted"


def test_as_a_chain_of_jobs_of_the_stages_own_sizes(slurm: Slurm, schedule: Path) -> None:
    machine = ["python", "-m", "megatron_tokenformer.progressive", "--launcher", "slurm"]
    said = slurm.hosts.run(slurm.login, *machine, "--config", schedule)
    first, second = (line.split()[3] for line in said.splitlines())
    assert "stage small" in said and "on 1 node(s)" in said and "on 2 node(s)" in said
    slurm.wait(lambda: saved(schedule, "small") >= 1, 300)
    assert slurm.state(second) == "PENDING"
    slurm.query("scontrol", "requeue", first)  # what waits for it goes on waiting
    slurm.wait(lambda: slurm.facts(first).get("Restarts") == "1", 60)
    slurm.wait_for(first, "COMPLETED")
    slurm.wait_for(second, "COMPLETED")
    assert status(schedule) == DONE
    nodes = {job: slurm.facts(job)["NumNodes"] for job in (first, second)}
    assert nodes == {first: "1", second: "2"}
    log = (schedule.parent / f"runs/small/job-{first}.log").read_text()
    assert f"from {schedule.parent}/runs/small/checkpoints/step-" in log
    again = slurm.hosts.run(slurm.login, *machine, "--config", schedule)
    assert again == "every stage is done\n"


def test_a_stage_that_fails_cancels_those_after_it(slurm: Slurm, schedule: Path) -> None:
    machine = [
        "python",
        "-m",
        "megatron_tokenformer.progressive",
        "--launcher",
        "slurm",
        "--config",
        schedule,
    ]
    said = slurm.hosts.run(slurm.login, *machine, "common.data.train=nowhere")
    first, second = (line.split()[3] for line in said.splitlines())
    slurm.wait_for(first, "FAILED")
    slurm.wait_for(second, "CANCELLED", 60)
    assert "no data at 'nowhere'" in (schedule.parent / f"runs/small/job-{first}.log").read_text()
