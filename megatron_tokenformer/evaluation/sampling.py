"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tokenformer.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What is asked for; by default greedy.

    Raises:
        UserError: a value that means nothing.
    """

    temperature: float = 0.0
    """logits are divided by it; 0 takes the most likely token"""
    top_k: int = 0
    """only the k most likely tokens; 0: all"""
    top_p: float = 1.0
    """only the most likely tokens that together have this probability, at least one"""
    repetition_penalty: float = 1.0
    """of tokens that were there already: a logit above 0 is divided by it, one below multiplied
    (arXiv 1909.05858)"""

    def __post_init__(self) -> None:
        bad = [
            ("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "a number from 0 up"),
            ("top-k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top-p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < 1e6, "above 0"),
        ]
        for name, value, good, must_be in bad:
            if not good:
                raise UserError(f"--{name} {value:g} must be {must_be}")


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """The next token of each row, [b, v] logits to [b] ids.

    The choice inverts the distribution's cumulative sum, in the order of ids: a row depends on its own draw
    alone, whatever the batch, and the last digits of the logits all but never matter.

    Args:
        draws: [b], uniform in [0, 1), fp64.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    reached = _kept((logits.double() / sampling.temperature).softmax(-1), sampling).cumsum(-1)
    place = torch.searchsorted(reached, draws.unsqueeze(-1) * reached[:, -1:], right=True)
    last = (reached < reached[:, -1:]).sum(-1, keepdim=True)  # where rounding reaches the whole sum
    return place.minimum(last).squeeze(-1)


def _kept(likely: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [b, v], but 0 of the tokens that top_k and top_p leave out."""
    if not sampling.top_k and sampling.top_p == 1.0:
        return likely
    ordered, ids = likely.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    ordered = ordered / ordered.sum(-1, keepdim=True)
    ordered = ordered.where(ordered.cumsum(-1) - ordered < sampling.top_p, 0.0)
    return torch.zeros_like(likely).scatter(-1, ids, ordered)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were there less likely: [b, v] logits, and booleans of the same shape."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
