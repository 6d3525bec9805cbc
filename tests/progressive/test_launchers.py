"""Each launcher's command line, and the SLURM job's text."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.__main__ import main
from megatron_tokenformer.progressive.launchers import LAUNCHERS, Command, grow_command
from megatron_tokenformer.progressive.plan import Plan, load_plan

Tree = dict[str, Any]
Write = Callable[[Tree], Path]
TRAINER = "megatron_tokenformer.training.pretrain"
GROWER = "megatron_tokenformer.commands.grow_checkpoint"


def command(plan: Plan, launcher: str) -> Command:
    return LAUNCHERS[launcher](plan.stages[0], plan.launch)


def test_local_is_torchrun(schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plan = load_plan(write(schedule))
    made = command(plan, "local")
    run_file = str(Path(schedule["run_dir"]) / "a" / "run.yaml")
    assert made.argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert made.argv[3:] == ["--standalone", "--nproc-per-node", "2", "-m", TRAINER, "--config", run_file]
    patience = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # of torchrun, which else kills ranks that save
    assert made.environment == patience, "the user's OMP_NUM_THREADS stays"
    with pytest.raises(UserError, match="the launcher local has this host"):
        command(load_plan(write(schedule), ["launch.nodes=2"]), "local")


def test_processes_share_the_cores(schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    plan = load_plan(write(schedule))
    assert command(plan, "local").environment["OMP_NUM_THREADS"] == "6"
    assert command(plan, "deepspeed").environment == {"OMP_NUM_THREADS": "6"}


def test_deepspeed_here_and_on_hosts(schedule: Tree, write: Write) -> None:
    words = command(load_plan(write(schedule)), "deepspeed").argv
    assert Path(words[0]).name == "deepspeed"
    assert words[words.index("--num_gpus") + 1] == "2"
    assert words[words.index("--module") + 1 :][:2] == [TRAINER, "--config"]
    assert "--hostfile" not in words
    with pytest.raises(UserError, match=r"launch\.hostfile=FILE"):
        command(load_plan(write(schedule), ["launch.nodes=2"]), "deepspeed")
    hosts = load_plan(write(schedule), ["launch.nodes=2", "launch.hostfile=hosts"])
    words = command(hosts, "deepspeed").argv
    assert words[words.index("--hostfile") :][:4] == ["--hostfile", "hosts", "--num_nodes", "2"]
    given = command(hosts, "deepspeed").environment["PDSH_SSH_ARGS_APPEND"]
    assert "ServerAliveInterval" in given, "a host that is cut off does not keep ssh waiting"


def test_srun_takes_its_part_of_the_allocation(
    schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = load_plan(write(schedule), ["launch.nodes=2", "launch.processes_per_node=1"])
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(UserError, match="here is none; submit examples/slurm/progressive"):
        command(plan, "srun")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    with pytest.raises(UserError, match="wants nodes=2, and this SLURM job has 1"):
        command(plan, "srun")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made = command(plan, "srun")
    sizes = ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"]
    assert made.argv[:6] == ["srun", "--kill-on-bad-exit=1", *sizes]
    assert made.argv[6:9] == [sys.executable, "-m", TRAINER]
    assert made.environment == {"OMP_NUM_THREADS": "6"}
    assert made.leave_signal == signal.SIGUSR1


def test_the_growth_command(schedule: Tree, write: Write) -> None:
    schedule["stages"][1]["growth"] = {"tau": "anneal", "tau_steps": 5, "optimizer": "reset"}
    stage = load_plan(write(schedule)).stages[1]
    words = grow_command(stage, Path("from")).argv
    folder = str(stage.folder)
    assert words[:3] == [sys.executable, "-m", GROWER]
    assert words[3:] == [
        *("--load", "from", "--config", f"{folder}/run.yaml", "--save", f"{folder}/init"),
        *("--tau", "anneal", "--keys", "zero", "--values", "normal", "--optimizer", "reset"),
        *("--tau-steps", "5"),
    ]


@pytest.mark.parametrize("launcher", ["local", "deepspeed"])
def test_a_dry_run_prints_all_and_writes_nothing(
    schedule: Tree, write: Write, launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write(schedule)), "--launcher", launcher, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    headings = [line for line in printed.splitlines() if line.startswith("# stage")]
    assert headings == [
        "# stage a: train (data 2)",
        "# stage b: grow (tensor 2)",
        "# stage b: train (tensor 2)",
        "# stage c: grow (pipeline 2)",
        "# stage c: train (pipeline 2)",
    ]
    assert printed.count(TRAINER) == 3
    assert not Path(schedule["run_dir"]).exists()
