"""What all ranks know alike before a step changes the weights: the loss, and whether somebody must leave.

One sum of two numbers over all ranks, where DeepSpeed waits for the gradient's norm anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.signals import REASONS


@dataclass(frozen=True)
class Agreement:
    """The same on every rank."""

    loss: float | None
    """mean over the global batch; None where it is not finite on some rank"""
    leave: str | None
    """one of REASONS, if any rank has it"""


def agree(mine: Tensor | None, requests: Sequence[bool], layout: Layout) -> Agreement:
    """Sum this rank's part with all others'.

    Args:
        mine: mean loss of this rank's micro-batches, on its device; None before the last stage.
        requests: which of REASONS this rank has.
    """
    # How many ranks have each reason, as the digits of one number.
    base = layout.processes.world_size + 1
    code = sum(base**place for place, asked in enumerate(requests) if asked)
    told = torch.tensor([0.0, code], dtype=torch.float64).to(layout.device, non_blocking=True)
    if mine is not None:
        told[0] = mine.double() / (layout.data_size * layout.tensor.size)
    dist.all_reduce(told)
    loss, code = told.tolist()
    reasons = [reason for place, reason in enumerate(REASONS) if int(code) // base**place % base]
    return Agreement(loss if math.isfinite(loss) else None, reasons[0] if reasons else None)
