"""tau, the number that scales normalised scores: part of the function that a model computes.

It starts at sqrt(n).  When a model grows from n to n + m tokens it is kept, so that the function does not
change, or kept and then led to sqrt(n + m) over the next steps.  It is stored with the model, as a schedule:
a pure function of the step, like the learning rate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.tokenformer import TokenformerLayer

ROLES = ("qkv", "output", "ffn")


@dataclass(frozen=True)
class TauSchedule:
    """From `start` at step 0 linearly to `end` at step `steps`, and `end` from there on."""

    start: float
    end: float
    steps: int = 0

    def at(self, step: int) -> float:
        """tau for optimizer step `step`, counted from 0."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps


Taus = dict[str, TauSchedule]
"""A schedule for each of ROLES; none in a dense model."""


def constant_tau(value: float) -> TauSchedule:
    """A tau that stays."""
    return TauSchedule(value, value)


def initial_taus(model: Model) -> Taus:
    """sqrt(n) for each role: what a model starts with."""
    if model.is_dense:
        return {}
    return {role: constant_tau(math.sqrt(getattr(model.tokens, role))) for role in ROLES}


def taus_to_json(taus: Taus) -> dict[str, Any]:
    """As a manifest stores them."""
    return {role: asdict(schedule) for role, schedule in taus.items()}


def taus_from_json(stored: dict[str, Any]) -> Taus:
    """The inverse of `taus_to_json`."""
    return {
        role: TauSchedule(stored[role]["start"], stored[role]["end"], int(stored[role]["steps"]))
        for role in ROLES
        if role in stored
    }


def set_taus(module: nn.Module, taus: Taus, step: int) -> None:
    """Give every Pattention of the layers inside `module` its tau for this step."""
    values = {role: schedule.at(step) for role, schedule in taus.items()}
    for layer in module.modules():
        if isinstance(layer, TokenformerLayer):
            attention = layer.attention
            attention.query.tau = attention.key.tau = attention.value.tau = values["qkv"]
            attention.output.tau = values["output"]
            layer.ffn.tau = values["ffn"]
