"""The jobs of a schedule on SLURM, as text; tests/cluster submits them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.progressive.__main__ import main
from megatron_tokenformer.progressive.chain import job_files, submission
from megatron_tokenformer.progressive.journal import read_journal
from megatron_tokenformer.progressive.plan import load_plan

Tree = dict[str, Any]
Write = Callable[[Tree], Path]


def jobs(schedule: Path, *overrides: str) -> dict[str, str]:
    """The text of each stage's job, by stage."""
    plan = load_plan(schedule, list(overrides))
    made = job_files(plan, read_journal(plan.folder), str(schedule), overrides)
    return {stage.name: text for stage, _, text in made}


def test_each_stage_has_a_job_of_its_size(schedule: Tree, write: Write, tmp_path: Path) -> None:
    schedule["launch"] |= {
        "slurm": {
            "partition": "gpu",
            "time": "1-12:00:00",
            "cpus_per_task": 6,
            "extra": ["--constraint=h200"],
            "setup": ["module load cuda"],
        },
    }
    path = write(schedule)
    made = jobs(path, "stages.b.nodes=2")
    assert list(made) == ["a", "b", "c"]
    options = {
        name: [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
        for name, text in made.items()
    }
    for option in (
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=6",
        "--partition=gpu",
        "--time=1-12:00:00",
        "--signal=B:USR1@180",
        "--requeue",
        "--constraint=h200",
    ):
        assert option in options["b"]
    assert "--nodes=1" in options["a"]
    names = {option for each in options.values() for option in each if option.startswith("--job-name=")}
    assert len(names) == 1, "jobs of one name run one at a time"
    lines = made["b"].splitlines()
    machine = f"{sys.executable} -m megatron_tokenformer.progressive --launcher srun --requeue"
    assert lines[-2:] == ["module load cuda", f"exec {machine} --config {path} --stage b stages.b.nodes=2"]
    (tmp_path / "job").write_text(made["b"])
    subprocess.run(["bash", "-n", str(tmp_path / "job")], check=True)


def test_a_job_begins_when_the_one_before_has_succeeded() -> None:
    job = Path("job.sbatch")
    assert submission(job, None) == ["sbatch", "--parsable", "--dependency=singleton", "job.sbatch"]
    assert "--dependency=afterok:7,singleton" in submission(job, "7")


def test_a_job_without_gpus(schedule: Tree, write: Write) -> None:
    assert "--gpus-per-node" not in jobs(write(schedule), "launch.slurm.gpus_per_node=0")["a"]


def test_a_dry_run_prints_the_chain_and_writes_nothing(
    schedule: Tree, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(write(schedule)), "--launcher", "slurm", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--launcher srun") == 3
    assert "--dependency=afterok:JOB-OF-a,singleton" in printed
    assert not Path(schedule["run_dir"]).exists()


def test_without_sbatch_the_job_files_are_named(
    schedule: Tree, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError) as refusal:
        main(["--config", str(write(schedule)), "--launcher", "slurm"])
    job = Path(schedule["run_dir"]) / "a" / "job.sbatch"
    assert f"there is no sbatch on this host; {job} and the other stages' are written" in str(refusal.value)
    assert refusal.value.exit_code == 1
    assert job.is_file()


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--stage", "d"], "--stage d is none of a, b, c"),
        (["--launcher", "slurm", "--stage", "a"], "leave out --stage"),
        (["--requeue"], "--requeue is for a command in a SLURM job, and this is none"),
    ],
)
def test_what_cannot_be_meant(schedule: Tree, write: Write, words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        main(["--config", str(write(schedule)), *words])
