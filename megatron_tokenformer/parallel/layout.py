"""Start the processes' communication, and the one place where DeepSpeed's and megatron-core's layouts agree.

Both number processes with the tensor-parallel rank running fastest, then data, then pipeline.  megatron-core
makes the tensor-parallel group (its cross entropy needs it) and the data-parallel group that a batch's
positions are counted over; DeepSpeed's topology makes the rest, among it one like the latter for gradients.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core import parallel_state

from megatron_tokenformer.config.schema import Parallel
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.parallel import lifeline
from megatron_tokenformer.parallel.collectives import TensorParallel
from megatron_tokenformer.parallel.device import device_kind, take_device
from megatron_tokenformer.parallel.environment import Processes, free_port
from megatron_tokenformer.parallel.open_files import allow_open_files
from megatron_tokenformer.parallel.placement import describe_placement
from megatron_tokenformer.parallel.roll_call import open_store, roll_call
from megatron_tokenformer.quiet import quiet_start

Result = TypeVar("Result")

TOLD_RANKS = 3
"""of the ranks that fail together, so many tell why"""


@dataclass(frozen=True)
class Layout:
    """Where this process stands: its coordinates, its tensor-parallel ranks, its device."""

    processes: Processes
    hosts: tuple[str, ...]
    """of all ranks, in order"""
    tensor: TensorParallel
    topology: PipeModelDataParallelTopology
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    """the data-parallel ranks of this pipeline stage and tensor rank"""
    checkpoint_group: dist.ProcessGroup
    """all ranks, on gloo; of the threads that write checkpoints, beside training's collectives"""
    device: torch.device
    timeout: timedelta

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.processes.rank

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.processes.rank == 0

    def __str__(self) -> str:
        split = f"tensor {self.tensor.size}, pipeline {self.pipeline_size}, data {self.data_size}"
        sequence = ", sequence parallel" if self.tensor.sequence else ""
        return (
            f"{self.processes.world_size} process(es) started by {self.processes.launcher}: "
            f"{split}{sequence}; {self.device.type}, {dist.get_backend()}"
        )


def start(parallel: Parallel, processes: Processes) -> Layout:
    """Join the run's other processes, print who is where, and build every group.

    Args:
        parallel: a layout that divides the processes (`config.schema.check_world`).
        processes: who this process is (`environment.find_processes`).

    Raises:
        UserError: the processes do not find each other, there are more than GPUs on this host,
            or its GPUs do not work.
    """
    # torch 2.13 renames collectives that DeepSpeed, and we for the sake of 2.11, call by their old names.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    allow_open_files(processes)
    meeting, hosts = _meet(parallel, processes)
    if processes.launcher == "srun" and torch.cuda.device_count() == 1:
        processes = replace(processes, local_rank=0)  # --gpus-per-task shows each task its own GPU only
    device = take_device(processes)
    timeout = timedelta(minutes=parallel.timeout_minutes)
    _join(processes, device, timeout)
    del meeting  # rank 0 serves it until torch's own meeting has taken it over
    with quiet_start():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=parallel.timeout_minutes,
            create_gloo_process_groups=False,
        )
    return _locate(parallel, processes, hosts, device, timeout)


def stop() -> None:
    """Leave the groups, so that a process ends without complaints and a next run can start in it."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    lifeline.stop()


def from_main_rank(decide: Callable[[], Result]) -> Result:
    """Let the main rank decide something, and tell all ranks its answer or its mistake.

    Raises:
        UserError: the main rank's, on every rank.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            error.everywhere = True
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_main_rank(act: Callable[[], Result]) -> Result | None:
    """Let the main rank do something and keep its result, which is not sent: None on the others.

    Raises:
        UserError: the main rank's, on every rank.
    """
    kept: list[Result] = []
    from_main_rank(lambda: kept.append(act()))
    return kept[0] if kept else None


def each_rank(act: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Let every rank do something and keep its own result, which is not sent; else as `on_all_ranks`.

    Raises:
        UserError: names the ranks that could not and their hosts, on every rank.
    """
    kept: list[Result] = []
    on_all_ranks(lambda: kept.append(act()), group)
    return kept[0]


def on_all_ranks(act: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Let every rank do something and gather the results in order; if one cannot, all ranks learn why.

    Args:
        group: of all ranks; by default the one of training.

    Raises:
        UserError: names the ranks that could not and their hosts, on every rank.
    """
    mine: tuple[Result | None, str | None]
    try:
        mine = act(), None
    except (UserError, OSError) as error:
        why = f"{error.filename or ''} {error.strerror}" if isinstance(error, OSError) else error
        mine = None, f"rank {dist.get_rank()} on {socket.gethostname()}: {why}"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    failed = [reason for _, reason in everyone if reason]
    if failed:
        more = f"; and {len(failed) - TOLD_RANKS} more ranks" if len(failed) > TOLD_RANKS else ""
        raise UserError("; ".join(failed[:TOLD_RANKS]) + more, exit_code=1, everywhere=True)
    return [result for result, _ in everyone]


def limit_timeouts(timeout: timedelta) -> None:
    """Give all groups of this process the run's time-out; DeepSpeed makes its own with torch's defaults."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _meet(parallel: Parallel, processes: Processes) -> tuple[dist.Store | None, list[str]]:
    """Wait for all processes, connect them for bad news, and show the layout: before any collective.

    Returns:
        The store that they met in, if they are several, and the hosts of all ranks.
    """
    if processes.world_size == 1:
        return None, [socket.gethostname()]
    patience = timedelta(minutes=parallel.join_minutes)
    store = open_store(processes, patience)
    hosts = roll_call(store, processes, patience, device_kind())
    if processes.rank == 0:
        print("\n".join(describe_placement(hosts, parallel, processes.launcher)), flush=True)
    lifeline.start(store, processes, hosts)
    return store, hosts


def _join(processes: Processes, device: torch.device, timeout: timedelta) -> None:
    if processes.master_port == 0:
        processes = replace(processes, master_port=free_port())
        # A process that is alone serves itself; with torchrun's word torch would look for a server there.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    processes.export()
    if device.type == "cpu":
        # On CPU DeepSpeed compiles a shared-memory collective for inference at every first start: 40 s, and
        # a crash without a compiler.  An empty table of compatible operators leaves it out.
        deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if device.type == "cuda" else "gloo"
    with quiet_start(), _explained("NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"):
        # Not by DeepSpeed, which would bind the GPU to the group: then every later group is a collective of
        # all ranks, thousands of them at a thousand ranks, and connects at once, whether it is used or not.
        dist.init_process_group(backend, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)


@contextlib.contextmanager
def _explained(variable: str) -> Iterator[None]:
    """Say what may help where ranks that have met do not reach each other."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if lifeline.ends_because_of_another(0.0):
            raise
        raise UserError(
            f"{socket.gethostname()} reached rank 0, but not all other ranks; if hosts have several "
            f"networks, name the one that they share in {variable} ({str(error).splitlines()[0]})",
            exit_code=1,
        ) from None


def _locate(
    parallel: Parallel, processes: Processes, hosts: list[str], device: torch.device, timeout: timedelta
) -> Layout:
    data_size = processes.world_size // (parallel.tensor * parallel.pipeline)
    topology = PipeModelDataParallelTopology(
        num_pp=parallel.pipeline, num_mp=parallel.tensor, num_dp=data_size
    )
    here = topology.get_coord(processes.rank)
    theirs = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    if (here.pipe, here.data, here.model) != theirs:
        raise RuntimeError(f"DeepSpeed puts rank {processes.rank} at {here}, megatron-core at {theirs}")
    tensor = TensorParallel(
        parallel_state.get_tensor_model_parallel_group(),
        here.model,
        parallel.tensor,
        parallel.sequence and parallel.tensor > 1,
    )
    with _explained("GLOO_SOCKET_IFNAME"):
        checkpoint_group = dist.new_group(backend="gloo", timeout=timeout)
    return Layout(
        processes=processes,
        hosts=tuple(hosts),
        tensor=tensor,
        topology=topology,
        pipeline_rank=here.pipe,
        pipeline_size=parallel.pipeline,
        data_rank=here.data,
        data_size=data_size,
        data_group=parallel_state.get_data_parallel_group(),
        checkpoint_group=checkpoint_group,
        device=device,
        timeout=timeout,
    )
