"""The commands that start a stage's processes: torchrun here, deepspeed here or on hosts, srun in a job.

A launcher is a function from a stage to its command; it starts nothing and writes nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.environment import free_port
from megatron_tokenformer.progressive.plan import Stage
from megatron_tokenformer.progressive.schema import Launch

TRAINER = "megatron_tokenformer.training.pretrain"
GROWER = "megatron_tokenformer.commands.grow_checkpoint"
SSH_PATIENCE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=6"
"""without it ssh waits for ever for a host that has lost power or network"""
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
    leave_signal: signal.Signals = signal.SIGTERM
    """what asks it to save and end"""

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
    # torchrun would kill its ranks after 30 s; that of a rank that does not end, the others' end sees to.
    patience = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    return Command(argv, {**_threads(stage), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience})


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
    if launch.hostfile is None:
        return Command(argv, _threads(stage))
    patience = os.environ.get("PDSH_SSH_ARGS_APPEND", SSH_PATIENCE)
    variables = {**_threads(stage), "PDSH_SSH_ARGS_APPEND": patience}
    return Command(argv, variables, settle_seconds=REMOTE_SECONDS)


def srun(stage: Stage, launch: Launch) -> Command:
    """A step of the SLURM allocation that the stage machine runs in.

    Raises:
        UserError: it runs in none, or in one with fewer nodes than the stage wants.
    """
    nodes = os.environ.get("SLURM_JOB_NUM_NODES")
    if nodes is None:
        raise UserError(
            "the launcher srun starts stages inside a SLURM allocation, and here is none; submit "
            "examples/slurm/progressive.sbatch, or let --launcher slurm submit a job for each stage"
        )
    if stage.nodes > int(nodes):
        raise UserError(
            f"stage '{stage.name}' wants nodes={stage.nodes}, and this SLURM job has {nodes}; ask for "
            f"more, or let --launcher slurm submit a job for each stage"
        )
    cores = launch.slurm.cpus_per_task or os.environ.get("SLURM_CPUS_PER_TASK")
    argv = ["srun", "--kill-on-bad-exit=1", f"--nodes={stage.nodes}"]
    argv += [f"--ntasks={stage.nodes * stage.processes_per_node}"]
    argv += [f"--ntasks-per-node={stage.processes_per_node}"]
    argv += [f"--cpus-per-task={cores}"] if cores else []
    argv += [sys.executable, "-m", TRAINER, "--config", str(stage.run_file)]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))} if cores else _threads(stage)
    # SIGTERM it does not hand on: it kills the ranks, KillWait seconds later, whether they have saved or not.
    return Command(argv, threads, settle_seconds=REMOTE_SECONDS, leave_signal=signal.SIGUSR1)


LAUNCHERS: dict[str, Launcher] = {"local": local, "deepspeed": deepspeed, "srun": srun}


def grow_command(stage: Stage, source: Path) -> Command:
    """Grow the checkpoint `source` into the stage's start."""
    growth = stage.growth
    argv = [sys.executable, "-m", GROWER, "--load", str(source)]
    argv += ["--config", str(stage.run_file), "--save", str(stage.grown)]
    if stage.config.model.is_dense:
        argv += ["--spread", str(growth.spread)]
    else:
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
