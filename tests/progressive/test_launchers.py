"""Each launcher's command line, and the SLURM job's text."""

from __future__ import annotations

import subprocess
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


def command(plan: Plan, launcher: str) -> Command:
    return LAUNCHERS[launcher](plan.stages[0], plan.launch)


def test_local_is_torchrun(schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    plan = load_plan(write(schedule))
    made = command(plan, "local")
    run_file = str(Path(schedule["run_dir"]) / "a" / "run.yaml")
    assert made.argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert made.argv[3:] == ["--standalone", "--nproc-per-node", "2", "-m", TRAINER, "--config", run_file]
    assert made.environment == {}, "the user's OMP_NUM_THREADS stays"
    with pytest.raises(UserError, match="the launcher local has this host"):
        command(load_plan(write(schedule), ["launch.nodes=2"]), "local")


def test_processes_share_the_cores(schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    plan = load_plan(write(schedule))
    assert command(plan, "local").environment == {"OMP_NUM_THREADS": "6"}
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


def test_the_slurm_job(schedule: Tree, write: Write, tmp_path: Path) -> None:
    schedule["launch"] |= {
        "nodes": 2,
        "slurm": {
            "partition": "gpu",
            "time": "1-12:00:00",
            "cpus_per_task": 6,
            "extra": ["--constraint=h200"],
            "setup": ["module load cuda"],
        },
    }
    made = command(load_plan(write(schedule)), "slurm")
    ((path, text),) = made.files.items()
    assert made.argv == ["sbatch", "--wait", str(path)]
    assert path == Path(schedule["run_dir"]) / "a" / "job.sbatch"
    assert not path.exists(), "making a command writes nothing"
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    for option in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=6",
        "--partition=gpu",
        "--time=1-12:00:00",
        "--requeue",
        "--dependency=singleton",
        "--constraint=h200",
    ):
        assert option in options
    lines = text.splitlines()
    srun = f"exec srun --kill-on-bad-exit=1 --cpus-per-task=6 {sys.executable} -m {TRAINER} --config "
    assert lines[-1].startswith(srun)
    assert lines.index("module load cuda") < lines.index("export MASTER_ADDR MASTER_PORT")
    (tmp_path / "job").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)


def test_a_slurm_job_without_gpus(schedule: Tree, write: Write) -> None:
    plan = load_plan(write(schedule), ["launch.slurm.gpus_per_node=0"])
    (text,) = command(plan, "slurm").files.values()
    assert "--gpus-per-node" not in text


def test_the_growth_command(schedule: Tree, write: Write) -> None:
    schedule["stages"][1]["growth"] = {"tau": "anneal", "tau_steps": 5, "optimizer": "reset"}
    stage = load_plan(write(schedule)).stages[1]
    words = grow_command(stage, Path("from")).argv
    folder = str(stage.folder)
    assert Path(words[1]).parts[-2:] == ("tools", "grow_checkpoint.py")
    assert words[2:] == [
        *("--load", "from", "--config", f"{folder}/run.yaml", "--save", f"{folder}/init"),
        *("--tau", "anneal", "--keys", "zero", "--values", "normal", "--optimizer", "reset"),
        *("--tau-steps", "5"),
    ]


@pytest.mark.parametrize("launcher", LAUNCHERS)
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


def test_without_sbatch_the_job_file_is_named(
    schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as refusal:
        main(["--config", str(write(schedule)), "--launcher", "slurm"])
    job = Path(schedule["run_dir"]) / "a" / "job.sbatch"
    assert f"there is no sbatch on this host; {job} is written" in str(refusal.value)
    assert refusal.value.exit_code == 1
    assert job.is_file()
