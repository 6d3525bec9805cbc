"""AdamW over the flat vector that ZeRO-1 gives a rank, with learning rates of their own for parts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from megatron_tokenformer.config.schema import Optimizer


class StretchedAdamW(torch.optim.AdamW):
    """torch's fused AdamW whose one vector has stretches with learning rates of their own.

    Parameter groups would say the same of whole parameters.  Rows of one parameter cannot be in two groups,
    and a group that a pipeline stage lacks would hang DeepSpeed.
    """

    stretches: Mapping[float, Sequence[slice]] = {}
    """by their share of the group's learning rate; together the whole vector, but for what stays as it is"""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update.  A stretch's weight decay has its share too, as torch's decay is lr * weight_decay."""
        (group,) = self.param_groups
        (flat,) = group["params"]
        state = self.state[flat]
        for lr_scale, slices in self.stretches.items():
            vectors = (flat, flat.grad, state["exp_avg"], state["exp_avg_sq"])
            weights, grads, means, squares = ([vector[stretch] for stretch in slices] for vector in vectors)
            adamw(
                weights,
                grads,
                means,
                squares,
                [],
                [state["step"].clone() for _ in slices],  # the function counts up each that it is given
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"] * lr_scale,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        state["step"] += 1


def build_adamw(parameters: list[torch.nn.Parameter], optimizer: Optimizer) -> torch.optim.AdamW:
    """torch's fused AdamW with the run's settings; by stretches if old tokens have another learning rate."""
    kind = torch.optim.AdamW if optimizer.old_token_lr_scale == 1.0 else StretchedAdamW
    return kind(
        parameters,
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
