"""Who this process is: rank, world and master address from whichever launcher started it."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel.hosts import expand_hosts

# What each launcher calls (rank, local rank, world size); the first one found is believed.
LAUNCHERS = {
    "torchrun or deepspeed": ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}

# What names one start of processes, where the launcher leaves the choice of a port to us.
JOBS = {"srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"), "mpirun": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")}


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
            return Processes(launcher, 0, local_rank, 1, "127.0.0.1", 0)
        address, port = environment.get("MASTER_ADDR"), _port(launcher, environment)
        if address is None and launcher == "srun":
            address = next(iter(expand_hosts(environment["SLURM_STEP_NODELIST"])), None)
        if address is None and environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world_size):
            address = "127.0.0.1"
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT" if port == 0 else None
        if address is None or missing:
            raise UserError(f"{launcher} set {names[0]} but not {missing}; export where rank 0 listens")
        return Processes(launcher, rank, local_rank, world_size, address, port)
    return Processes("no launcher", 0, 0, 1, "127.0.0.1", 0)


def set_device_variables(parallel: Parallel) -> None:
    """Set what CUDA reads once, when it starts, and so must be there before torch is imported.

    What the user has set stays.  docs/parallelism.md says which variables are left alone, and why.
    """
    if parallel.tensor > 1:
        # One hardware queue, so that kernels start in the order of their launch: a reduction that is launched
        # before the product beside it gets its few processors, and does not wait for the product to end.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _port(launcher: str, environment: Mapping[str, str]) -> int:
    """MASTER_PORT, else one that two jobs on a node are unlikely to share; 0 if there is no job."""
    if "MASTER_PORT" in environment:
        return int(environment["MASTER_PORT"])
    job = "".join(environment.get(name, "") + "." for name in JOBS.get(launcher, ()))
    return 10_000 + zlib.crc32(job.encode()) % 20_000 if job.strip(".") else 0


def free_port() -> int:
    """A TCP port that was free a moment ago on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
