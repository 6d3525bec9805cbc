"""The losses of single micro-batches, of which DeepSpeed keeps the sum alone."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class MicroBatchLosses:
    """The loss function, keeping the losses of the last micro-batches to say whose samples were bad.

    Args:
        count: how many to keep: those of a step.
    """

    def __init__(self, function: Any, count: int) -> None:
        self._function, self._last = function, deque[Tensor](maxlen=count)

    def __call__(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = self._function(logits, labels)
        self._last.append(loss.detach())
        return loss

    def bad(self) -> list[int]:
        """Which of the last micro-batches have a loss that is not finite; asks the device."""
        finite = torch.isfinite(torch.stack(list(self._last))).tolist() if self._last else []
        return [place for place, good in enumerate(finite) if not good]
