"""Bytes of tensors, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from memory import LiveStorages
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only


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


class LiveOnRanks(LiveStorages):
    """The same where ranks exchange tensors: c10d gets copies of them, which are not counted.

    gloo's threads let go of what they have sent and received when they come to it, which would be counted now
    and then.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "c10d":
            return super().__torch_dispatch__(function, types, args, kwargs)
        pairs: list[tuple[Tensor, Tensor]] = []

        def copy(tensor: Tensor) -> Tensor:
            pairs.append((tensor, tensor.clone()))
            return pairs[-1][1]

        result = function(*tree_map_only(Tensor, copy, args), **tree_map_only(Tensor, copy, kwargs or {}))
        work = result[-1] if isinstance(result, tuple) else result
        torch._C._distributed_c10d.Work.unbox(work).wait()
        for tensor, exchanged in pairs:
            tensor.copy_(exchanged)
        return result
