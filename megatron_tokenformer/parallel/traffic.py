"""Count what this rank exchanges with others: every collective of a stretch of code, whoever calls it.

torch hands every collective, be it ours, megatron-core's or DeepSpeed's, to its dispatcher as an operator of
`c10d`, with its tensors and its group.  A dispatch mode sees them there, in the backward pass too, so nothing
is wrapped or estimated.  torch's own `CommDebugMode` stands at the same place, but counts calls only, not
bytes.  DeepSpeed's `comms_logger` sees DeepSpeed's calls only, and times them, which waits for each.

Nobody counting, the mode is not there; what remains is that `collectives.py` names the purpose of its calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tokenformer.config.traffic import (
    GRADIENTS,
    LOSS,
    PIPELINE,
    TIED_EMBEDDING,
    WEIGHTS,
    Traffic,
)
from megatron_tokenformer.parallel.collectives import purpose_of_this_call
from megatron_tokenformer.parallel.layout import Layout

SCALARS = "scalars"
"""norms, overflow flags, losses to report, counts: at most two numbers each, or integers"""

_KINDS = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_coalesced_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
}


@contextmanager
def count_traffic(layout: Layout) -> Iterator[list[Traffic]]:
    """Collect, call by call, what this thread exchanges inside the block; `config.traffic.total` sums it.

    Groups of one rank are left out, and so are other threads: those that write checkpoints.  Counting costs
    time at every operator, so it is for a step now and then.

    Raises:
        NotImplementedError: a collective of the kind that compiled code calls, which would not be counted.
    """
    with _Counter(layout) as counter:
        yield counter.counted


class _Counter(TorchDispatchMode):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.counted: list[Traffic] = []
        self.tensor_group = layout.tensor.group
        self.data_ranks = dist.get_process_group_ranks(layout.data_group)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and "barrier" not in func._opname:
            self._count(func._opname, [*args, *(kwargs or {}).values()])
        elif "c10d_functional" in func.namespace:
            # Only DTensor and compiled code call these.  Better no count than one that is too small.
            raise NotImplementedError(
                f"{func} is not counted: torch's functional collectives are not used here"
            )
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: list[Any]) -> None:
        group = next(g for g in map(_as_group, arguments) if g is not None)
        if group.size() == 1:
            return
        # Of input and output, the larger is the whole: a gather makes it, a scatter takes it.
        tensors = max((list(_tensors(a)) for a in arguments), key=lambda ts: sum(t.nbytes for t in ts))
        kind = _KINDS.get(name, name.strip("_"))
        ranks = 2 if kind in ("send", "receive") else group.size()
        size = sum(t.nbytes for t in tensors)
        self.counted.append(Traffic(self._purpose(kind, tensors, group), kind, ranks, size))

    def _purpose(self, kind: str, tensors: list[Tensor], group: dist.ProcessGroup) -> str:
        """Ours say it; who calls the others is known by the group and what is sent."""
        if (ours := purpose_of_this_call()) is not None:
            return ours
        if kind in ("send", "receive"):
            return PIPELINE
        if sum(t.numel() for t in tensors) <= 2 or not all(t.is_floating_point() for t in tensors):
            return SCALARS
        if self.tensor_group is not None and group.group_name == self.tensor_group.group_name:
            return LOSS  # megatron-core's cross entropy; DeepSpeed has groups of its own
        if dist.get_process_group_ranks(group) == self.data_ranks:
            return WEIGHTS if kind == "all-gather" else GRADIENTS
        return TIED_EMBEDDING if kind == "all-reduce" else "other"


def _as_group(argument: Any) -> dist.ProcessGroup | None:
    """A ProcessGroup as the dispatcher hands it over, boxed; None for anything else."""
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):
        return None  # the ReduceOp


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for one in argument:
            yield from _tensors(one)
