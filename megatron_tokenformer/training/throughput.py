"""How fast a run is: tokens, operations and their share of the device's peak, and memory."""

from __future__ import annotations

import resource

import torch
import torch.distributed as dist

from megatron_tokenformer.config.pipeline_cut import bubble_share
from megatron_tokenformer.config.schema import Precision, RunConfig
from megatron_tokenformer.config.sizes import device_peak, step_flops, tokens_per_step
from megatron_tokenformer.parallel.layout import Layout


def throughput(
    config: RunConfig, layout: Layout, precision: Precision, micro_batches: int, seconds: float
) -> dict[str, float]:
    """The figures of a step of so many micro-batches on each rank that took so many seconds.

    All ranks must call it.

    Returns:
        tokens_per_s (all ranks), tflops_per_device, mfu where the device's peak is known, bubble (by formula)
        where there are pipeline stages, and peak_memory_bytes of the rank that has held most: allocated on a
        GPU, resident without one.
    """
    per_device = step_flops(config) / seconds / layout.processes.world_size
    row = {
        "tokens_per_s": tokens_per_step(config) / seconds,
        "tflops_per_device": per_device / 1e12,
        "peak_memory_bytes": peak_memory_bytes(layout.device),
    }
    if config.parallel.pipeline > 1:
        row["bubble"] = bubble_share(config.parallel.pipeline, micro_batches)
    peak = peak_flops(layout.device, precision)
    return row if peak is None else {**row, "mfu": per_device / peak}


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """The device's peak in FLOP/s in this precision; None off the GPU, for unknown ones, and in fp32."""
    return device_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that any rank's process has held so far.  All ranks must call it."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    else:
        own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most = torch.tensor(own, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
