"""Who this process is: rank, world and master address from whichever launcher started it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.errors import UserError

# What each launcher calls (rank, local rank, world size); the first one found is believed.
LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}

# A launcher ends all ranks when one has ended; the main rank, which tells what is wrong, may be slower.
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    master_address: str
    master_port: int

    def export(self) -> None:
        """Put these facts where torch.distributed and DeepSpeed read them."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_address,
            MASTER_PORT=str(self.master_port),
        )


def find_processes(environment: Mapping[str, str] = os.environ) -> Processes:
    """Read the launcher's variables; without a launcher this is the only process.

    Raises:
        UserError: a launcher that says the rank but not where the first process listens.
    """
    for launcher, names in LAUNCHERS.items():
        if not all(name in environment for name in names):
            continue
        rank, local_rank, world_size = (int(environment[name]) for name in names)
        if launcher == "srun" and "SLURM_STEP_NODELIST" not in environment:
            continue  # a shell inside an allocation, not a task started by srun
        if world_size == 1:
            return Processes(launcher, 0, local_rank, 1, "127.0.0.1", _port(environment))
        address, port = environment.get("MASTER_ADDR"), _port(environment)
        if address is None and launcher == "srun":
            address = _first_host(environment["SLURM_STEP_NODELIST"])
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT" if port == 0 else None
        if address is None or missing:
            raise UserError(f"{launcher} set {names[0]} but not {missing}; export where rank 0 listens")
        return Processes(launcher, rank, local_rank, world_size, address, port)
    return Processes("no launcher", 0, 0, 1, "127.0.0.1", _port(environment))


def set_device_variables(parallel: Parallel) -> None:
    """Set what CUDA reads once, when it starts, and so must be there before torch is imported.

    What the user has set stays.  docs/parallelism.md says which variables are left alone, and why.
    """
    if parallel.tensor > 1:
        # One hardware queue, so that kernels start in the order of their launch: a reduction that is launched
        # before the product beside it gets its few processors, and does not wait for the product to end.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def tell(error: UserError) -> int:
    """Say once what every rank ends with, and a failure of one rank with its number; its exit code."""
    rank, world_size = 0, 1
    with contextlib.suppress(UserError):
        here = find_processes()
        rank, world_size = here.rank, here.world_size
    if error.exit_code == 1 and world_size > 1 and not error.everywhere:
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(PATIENCE_S)
    return error.exit_code


def _first_host(nodes: str) -> str | None:
    """The first host of a SLURM node list such as `gpu[03-07]`, which only SLURM itself can read."""
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return next(iter(listed.stdout.split()), None)


def _port(environment: Mapping[str, str]) -> int:
    """MASTER_PORT, else one that two jobs on a node do not share; 0 (any) is only good for one process."""
    if "MASTER_PORT" in environment:
        return int(environment["MASTER_PORT"])
    job = environment.get("SLURM_JOB_ID")
    return 10_000 + int(job) % 20_000 if job else 0


def free_port() -> int:
    """A TCP port that was free a moment ago on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
