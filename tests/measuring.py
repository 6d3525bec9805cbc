"""Bytes of tensors, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory behind tensors, each block once."""
    blocks = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({block.data_ptr(): block.nbytes() for block in blocks}.values())


def allocated(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of tensors that are there after `run` and were not before, and that were at most while it ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert result is not None  # it is alive until here
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return now, most
