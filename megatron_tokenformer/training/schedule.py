"""The learning rate as a pure function of the step, so that nothing about it needs storing."""

from __future__ import annotations

import math

from megatron_tokenformer.config.schema import Optimizer


def learning_rate(optimizer: Optimizer, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0, in a run of `steps` steps.

    Warm-up is linear and its first step already moves.  Then, with p the share of the remaining steps that
    has passed: `cosine` and `linear` go from lr to min_lr over p; `constant` stays; `wsd` (warm-up, stable,
    decay) stays and falls linearly to min_lr in its last part.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    passed = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * _height(optimizer, min(1.0, passed))


def _height(optimizer: Optimizer, passed: float) -> float:
    if optimizer.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * passed))
    if optimizer.schedule == "linear":
        return 1.0 - passed
    if optimizer.schedule == "wsd" and optimizer.wsd_decay_fraction > 0.0:
        return min(1.0, (1.0 - passed) / optimizer.wsd_decay_fraction)
    return 1.0
