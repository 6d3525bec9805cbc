"""Learning-rate schedules: their shape at the points that people know, as functions of the step alone."""

from __future__ import annotations

import math

import pytest

from megatron_tokenformer.config.schema import Optimizer
from megatron_tokenformer.training.schedule import learning_rate


def rate(schedule: str, step: int, steps: int = 110, warmup: int = 10) -> float:
    optimizer = Optimizer(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=warmup, wsd_decay_fraction=0.25)
    return learning_rate(optimizer, step, steps)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_moves_at_once(schedule: str) -> None:
    assert [rate(schedule, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(schedule, 0, warmup=0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "schedule, middle, late, end",
    [
        ("cosine", 0.55, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.875)), 0.1),
        ("linear", 0.55, 0.1 + 0.9 * 0.125, 0.1),
        ("constant", 1.0, 1.0, 1.0),
        ("wsd", 1.0, 0.55, 0.1),
    ],
)
def test_after_warmup(schedule: str, middle: float, late: float, end: float) -> None:
    found = [rate(schedule, 10 + passed) for passed in (50, 87.5, 100, 200)]
    assert found == pytest.approx([middle, late, end, end])
