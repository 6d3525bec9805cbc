"""A schedule as a chain of SLURM jobs: one for each stage, of the stage's own size, after the one before.

Each job runs the stage machine for its stage alone (`--launcher srun --stage NAME`), growth included, so the
journal is kept as ever, and a job that starts again goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

from megatron_tokenformer.errors import TO_BE_CONTINUED, UserError
from megatron_tokenformer.progressive.journal import Journal
from megatron_tokenformer.progressive.plan import Plan, Stage
from megatron_tokenformer.progressive.stages import AskedToLeave, RunFailed, pending

SCONTROL_S = 120


def submit(plan: Plan, journal: Journal, schedule: str, overrides: Sequence[str]) -> list[str]:
    """Submit a job for each stage that is not done; a line about each.

    Args:
        schedule: its file, which the jobs read again when they start.
        overrides: `key=value`, for the jobs too.

    Raises:
        UserError: there is no sbatch here (the job files are written all the same), or it refused a job.
    """
    lines: list[str] = []
    before: str | None = None
    jobs = job_files(plan, journal, schedule, overrides)
    for _, path, text in jobs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if jobs and shutil.which("sbatch") is None:
        raise UserError(
            f"there is no sbatch on this host; {jobs[0][1]} and the other stages' are written", exit_code=1
        )
    for stage, path, _ in jobs:
        done = subprocess.run(submission(path, before), capture_output=True, text=True)
        if done.returncode:
            told = f"; submitted are {', '.join(lines)}" if lines else ""
            raise UserError(f"sbatch refused {path}: {done.stderr.strip()}{told}", exit_code=1)
        before = done.stdout.strip().partition(";")[0]
        lines.append(f"stage {stage.name}: job {before} on {stage.nodes} node(s)")
    return lines


def submission(job_file: Path, before: str | None) -> list[str]:
    """The command that submits a job, to begin when the job `before` has succeeded.

    Jobs of one schedule have one name and run one at a time (singleton), so that a chain which is submitted
    twice does no harm: the second one's jobs find the stages done.
    """
    after = f"afterok:{before},singleton" if before else "singleton"
    return ["sbatch", "--parsable", f"--dependency={after}", str(job_file)]


def this_job() -> str:
    """The SLURM job that this process is.

    Raises:
        UserError: it is in none.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("--requeue is for a command in a SLURM job, and this is none")
    return job


@contextlib.contextmanager
def requeued(job: str) -> Iterator[None]:
    """Put the SLURM job around it back into the queue, if what is inside leaves and is to be continued.

    That is if it was asked to leave, or has failed on its way: for a GPU, a link or a rank that fails, SLURM
    does not.  A run that fails twice without a checkpoint between is not tried again.

    Here rather than in the job's script, so that this process can be all of the script: SLURM then gives it
    the signals that are for the script, and a growth, which is no step of the job, hears of them too.

    Raises:
        UserError: what is inside left, as it says, and SLURM would not take the job back.
    """
    try:
        yield
    except (AskedToLeave, RunFailed) as left:
        if _comes_back(left):
            # SLURM ends what it takes back; the reason is to be told first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if refused := _refused_requeue(job):
                why = f"{left}; scontrol requeue {job} failed: {refused}"
                raise UserError(why, left.exit_code) from None
        raise


def _comes_back(left: AskedToLeave | RunFailed) -> bool:
    # SIGTERM is SLURM's end of the job: it was cancelled, or its time is up, or it is taken back already.
    # A job that is cancelled would come back if it asked.
    if signal.SIGTERM in left.by:
        return False
    return left.progressed if isinstance(left, RunFailed) else left.exit_code == TO_BE_CONTINUED


def _refused_requeue(job: str) -> str | None:
    """Put the job back into the queue; why it cannot be."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SCONTROL_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {SCONTROL_S} s"
    except OSError as error:
        return str(error.strerror)
    return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else None


def job_files(
    plan: Plan, journal: Journal, schedule: str, overrides: Sequence[str]
) -> list[tuple[Stage, Path, str]]:
    """The stages that are not done, and the job of each: its file and the text."""
    todo = dict.fromkeys(stage.name for stage, _ in pending(plan, journal))
    return [
        (stage, stage.folder / "job.sbatch", job_script(plan, stage, schedule, overrides))
        for stage in plan.stages
        if stage.name in todo
    ]


def job_script(plan: Plan, stage: Stage, schedule: str, overrides: Sequence[str]) -> str:
    """The text of a stage's job."""
    wants, processes = plan.launch.slurm, stage.processes_per_node
    # Two schedules may have folders of one name; one must not wait for the other.
    mark = sha256(str(plan.folder.absolute()).encode()).hexdigest()[:6]
    gpus = processes if wants.gpus_per_node is None else wants.gpus_per_node
    options = {
        "job-name": f"{plan.folder.absolute().name}-{mark}",
        "comment": f"stage {stage.name}",
        "nodes": stage.nodes,
        "ntasks-per-node": processes,
        "gpus-per-node": gpus or None,
        "cpus-per-task": wants.cpus_per_task,
        "partition": wants.partition,
        "account": wants.account,
        "time": wants.time,
        "signal": f"B:USR1@{wants.notice_seconds}",
        "chdir": Path.cwd(),
        "output": stage.folder / "job-%j.log",
        "open-mode": "append",
        "kill-on-invalid-dep": "yes",
    }
    machine = [sys.executable, "-m", "megatron_tokenformer.progressive", "--launcher", "srun"]
    machine += ["--requeue", "--config", str(Path(schedule).absolute()), "--stage", stage.name, *overrides]
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in wants.extra)]
    # The shell becomes the machine, and what SLURM signals to the shell reaches it.
    lines += ["set -eo pipefail", *wants.setup, f"exec {shlex.join(machine)}"]
    return "\n".join(lines) + "\n"


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text else text
