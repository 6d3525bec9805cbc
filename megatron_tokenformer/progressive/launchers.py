"""The commands that start a stage's processes: torchrun here, deepspeed here or on hosts, a SLURM job.

A launcher is a function from a stage to its command; it starts nothing and writes nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.environment import free_port
from megatron_tokenformer.progressive.plan import Stage
from megatron_tokenformer.progressive.schema import Launch

TRAINER = "megatron_tokenformer.training.pretrain"
REMOTE_SECONDS = 90.0  # network file systems keep what they know of a folder for up to a minute


@dataclass(frozen=True)
class Command:
    """What to execute."""

    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """variables added to this process's"""
    files: dict[Path, str] = field(default_factory=dict)
    """files to write first"""
    settle_seconds: float = 0.0
    """how long files written by it, on other hosts, may take to show here"""

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.argv)])


Launcher = Callable[[Stage, Launch], Command]


def local(stage: Stage, launch: Launch) -> Command:
    """torchrun on this host.

    Raises:
        UserError: the stage wants several nodes.
    """
    if stage.nodes > 1:
        raise UserError(
            f"stage '{stage.name}' wants nodes={stage.nodes}, and the launcher local has this host; "
            f"use --launcher deepspeed with launch.hostfile, or --launcher slurm"
        )
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv += [
        "--nproc-per-node",
        str(stage.processes_per_node),
        "-m",
        TRAINER,
        "--config",
        str(stage.run_file),
    ]
    return Command(argv, _threads(stage))


def deepspeed(stage: Stage, launch: Launch) -> Command:
    """The `deepspeed` of this environment, on this host or on those of `launch.hostfile`.

    Raises:
        UserError: several nodes without a hostfile, or no `deepspeed` beside this Python.
    """
    beside = Path(sys.executable).with_name("deepspeed")
    executable = str(beside) if beside.exists() else shutil.which("deepspeed")
    if executable is None:
        raise UserError(f"no deepspeed executable in {beside.parent} or in PATH; install the requirements")
    if stage.nodes > 1 and launch.hostfile is None:
        raise UserError(
            f"stage '{stage.name}' wants nodes={stage.nodes}; give their names in launch.hostfile=FILE "
            f"(lines of 'host slots={stage.processes_per_node}')"
        )
    argv = [executable, "--log_level", "error"]
    # With --num_gpus it would take the first GPUs, whichever the user has chosen.
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if launch.hostfile is not None or len(chosen) != stage.processes_per_node or not all(chosen):
        argv += ["--num_gpus", str(stage.processes_per_node)]
    if launch.hostfile is not None:
        argv += ["--hostfile", launch.hostfile, "--num_nodes", str(stage.nodes)]
    argv += ["--master_port", str(free_port()), "--module", TRAINER, "--config", str(stage.run_file)]
    return Command(argv, _threads(stage), settle_seconds=REMOTE_SECONDS if launch.hostfile else 0.0)


def slurm(stage: Stage, launch: Launch) -> Command:
    """A job of its own, submitted and waited for.

    Jobs of one stage have one name and run one at a time: a call that was killed leaves its job in the
    queue, and the next call's waits for it and then finds the training done or goes on with it.
    """
    job_file = stage.folder / "job.sbatch"
    argv = ["sbatch", "--wait", str(job_file)]
    return Command(argv, files={job_file: job_script(stage, launch)}, settle_seconds=REMOTE_SECONDS)


def job_script(stage: Stage, launch: Launch) -> str:
    """The text of a stage's SLURM job."""
    wants, processes = launch.slurm, stage.processes_per_node
    # Two schedules may have equal folder and stage names; a dependency between their jobs would be wrong.
    mark = sha256(str(stage.folder.absolute()).encode()).hexdigest()[:6]
    gpus = processes if wants.gpus_per_node is None else wants.gpus_per_node
    options = {
        "job-name": f"{stage.folder.parent.name}-{stage.name}-{mark}",
        "nodes": stage.nodes,
        "ntasks-per-node": processes,
        "gpus-per-node": gpus or None,
        "cpus-per-task": wants.cpus_per_task,
        "partition": wants.partition,
        "account": wants.account,
        "time": wants.time,
        "chdir": Path.cwd(),
        "output": stage.folder / "job-%j.log",
        "open-mode": "append",
        "dependency": "singleton",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{key}={_quoted(value)}" for key, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in wants.extra)]
    trainer = shlex.join([sys.executable, "-m", TRAINER, "--config", str(stage.run_file)])
    cores = f" --cpus-per-task={wants.cpus_per_task}" if wants.cpus_per_task else ""
    lines += [
        "set -eo pipefail",
        *wants.setup,
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
        'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"',
        "# srun takes this shell's place, so that signals to the job reach the training",
        f"exec srun --kill-on-bad-exit=1{cores} {trainer}",
    ]
    return "\n".join(lines) + "\n"


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "slurm": slurm}


def grow_command(stage: Stage, source: Path) -> Command:
    """Grow the checkpoint `source` into the stage's start.

    Raises:
        UserError: the package is installed without the repository's tools.
    """
    tool = Path(__file__).parents[2] / "tools" / "grow_checkpoint.py"
    if not tool.is_file():
        raise UserError(f"{tool} is not there; run from a checkout of the repository (pip install -e .)")
    growth = stage.growth
    argv = [sys.executable, str(tool), "--load", str(source)]
    argv += ["--config", str(stage.run_file), "--save", str(stage.grown)]
    argv += ["--tau", growth.tau, "--keys", growth.keys, "--values", growth.values]
    argv += ["--optimizer", growth.optimizer]
    argv += ["--tau-steps", str(growth.tau_steps)] if growth.tau_steps else []
    argv += ["--old-token-noise", str(growth.old_token_noise)] if growth.old_token_noise else []
    argv += ["--allow-inexact"] if growth.allow_inexact else []
    return Command(argv)


def _threads(stage: Stage) -> dict[str, str]:
    """Each process computes with its share of the cores, unless the user says otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // stage.processes_per_node))}


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if " " in text else text
