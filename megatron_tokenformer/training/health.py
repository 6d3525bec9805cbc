"""A step whose numbers have gone wrong never changes the weights, nor Adam's moments.

The gate stands before the optimizer's step, when the gradients are there.  A loss that is not finite, or a
spike that is to be left out, holds AdamW back on all ranks: the weights are then gathered as they were.
Gradients that are not finite DeepSpeed 0.19.8 keeps out itself, in both of its optimizers, by the norm, which
is a sum over all ranks: without clipping too.  In fp16 that is how the loss scale is found, and no setback.
But it never looks at the loss, which can be infinite while the gradients are finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from megatron_tokenformer.checkpoint.engine_state import LOSS_SCALER_STATE, adam_state
from megatron_tokenformer.config.schema import RunConfig, Training
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.agreement import agree
from megatron_tokenformer.training.engine import Engine
from megatron_tokenformer.training.local_gradients import LocalGradients
from megatron_tokenformer.training.progress import Progress
from megatron_tokenformer.training.signals import Requests

Cause = Literal["loss", "gradient", "spike"]


@dataclass(frozen=True)
class Verdict:
    """On one step; the same on every rank."""

    cause: Cause | None = None
    """what is wrong; None: nothing"""
    loss: float | None = None
    """mean over the global batch; None if it is not finite"""
    usual: float | None = None
    """the median that the loss is measured by, if there is one yet"""
    changed: bool = True
    """whether the weights were updated"""


class Gate:
    """Stands in the place of the optimizer's step, and decides."""

    def __init__(
        self, config: RunConfig, layout: Layout, engine: Engine, progress: Progress, requests: Requests
    ) -> None:
        self._training, self._layout, self._engine = config.training, layout, engine
        self._progress, self._requests = progress, requests
        self.verdict = Verdict()
        """on the last step"""
        self.leave: str | None = None
        """why all ranks shall leave after it; None: they shall not"""
        self.gradients = LocalGradients(engine.deepspeed)
        """this rank's own of the last step, before they were summed"""
        zero: Any = engine.deepspeed.optimizer
        self._zero, self._step = zero, zero.step
        scaler = getattr(zero, "loss_scaler", None)
        self._scaler = scaler if isinstance(scaler, DynamicLossScaler) else None
        if self._scaler is not None:
            # It would raise a bare Exception; what its end means is for the policy to say.
            self._scaler.raise_error_at_min_scale = False
        zero.step = self.step

    def step(self, *arguments: Any, **named: Any) -> None:
        """Agree, then update the weights or hold them."""
        agreement = agree(self._mean_loss(), self._requests.pending(), self._layout)
        self.leave = agreement.leave
        verdict = judge(agreement.loss, self._progress.recent_losses, self._training)
        scaling = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        if verdict.changed:
            self._step(*arguments, **named)
        else:
            with _held(self._zero, self._scaler):
                self._step(*arguments, **named)
        if verdict.changed and self._zero.overflow:
            cause = verdict.cause if scaling else "gradient"
            verdict = Verdict(cause, agreement.loss, verdict.usual, changed=False)
        self.verdict = verdict

    def _mean_loss(self) -> Tensor | None:
        """Of this rank's micro-batches; None before the last stage."""
        engine = self._engine.deepspeed
        return engine.total_loss / engine.gradient_accumulation_steps() if engine.is_last_stage() else None


def judge(loss: float | None, recent: Sequence[float], training: Training) -> Verdict:
    """What a step's loss says, against those of the steps before.

    Args:
        loss: None if it is not finite.
    """
    usual = median(recent) if 2 * len(recent) >= training.spike_window else None
    if loss is None:
        return Verdict("loss", None, usual, changed=False)
    if usual is not None and loss > training.spike_factor * usual:
        return Verdict("spike", loss, usual, changed=training.on_spike == "log")
    return Verdict(None, loss, usual)


@contextlib.contextmanager
def _held(zero: Any, scaler: DynamicLossScaler | None) -> Iterator[None]:
    """AdamW does nothing inside; DeepSpeed's step does all else, such as freeing the gradients."""
    adam_state(zero)  # DeepSpeed asks for it after AdamW's first step
    # A loss that is not finite says nothing of the scale that gradients need.
    before = {key: getattr(scaler, key) for key in LOSS_SCALER_STATE} if scaler else {}
    zero.optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        del zero.optimizer.step
        for key, value in before.items():
            setattr(scaler, key, value)
