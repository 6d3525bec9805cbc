"""Whether this rank's own gradients are finite, before they are summed with other ranks'.

Afterwards every rank has the bad numbers of one, and nobody could tell whose GPU, or samples, they are of.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn


class LocalGradients:
    """Looks at a rank's gradients in every step: one pass over them, which no host waits for.

    Args:
        engine: DeepSpeed's pipeline engine, which gets a map of its own of what carries out its instructions,
            as `phases.py` explains.
    """

    def __init__(self, engine: Any) -> None:
        self._largest: Tensor | None = None
        instructions = dict(engine._INSTRUCTION_MAP)
        reduce = instructions[schedule.ReduceTiedGrads]  # the first reduction of a step, tied weights or none

        def looked_at(engine: Any, **operands: Any) -> None:
            self._largest = largest_gradient(engine.module)
            reduce(engine, **operands)

        instructions[schedule.ReduceTiedGrads] = looked_at
        engine._INSTRUCTION_MAP = instructions

    def are_bad(self) -> bool:
        """Whether one of the last step's was not finite; asks the device."""
        return self._largest is not None and not bool(torch.isfinite(self._largest))


def largest_gradient(module: nn.Module) -> Tensor | None:
    """The largest absolute value of all that is accumulated, NaN and infinity included; None of nothing.

    In bf16 DeepSpeed accumulates beside the parameters, in fp32.
    """
    accumulated = (getattr(parameter, "_hp_grad", parameter.grad) for parameter in module.parameters())
    gradients = [gradient for gradient in accumulated if gradient is not None]
    return torch.nn.utils.get_total_norm(gradients, norm_type=float("inf")) if gradients else None
