"""Old tokens after a growth: frozen, or trained at a smaller learning rate than the new ones.

Old are the rows of every K and V that were there before the last growth.  They are rows of parameters whose
other rows train, and so cut through everything that knows parameters only: a frozen row takes no gradient (it
does not count in the gradient's norm either), no weight decay, and keeps its Adam moments as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tokenformer.checkpoint.engine_state import fragments
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.config.schema import Optimizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import canonical_parameters
from megatron_tokenformer.model.names import is_token, role_of
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.optimizer import StretchedAdamW


def slowed_rows(optimizer: Optimizer, manifest: Manifest | None) -> dict[str, int]:
    """By canonical name, the rows of each K and V that were there before the last growth.

    Args:
        manifest: of the checkpoint that the run goes on from, if any.

    Returns:
        Nothing if they train as the others do.

    Raises:
        UserError: they shall not, but the model has not grown, or has shrunk since.
    """
    if optimizer.old_token_lr_scale == 1.0:
        return {}
    last = manifest.history[-1] if manifest is not None and manifest.history else {}
    before = last.get("tokens_before")
    shrunk = last.get("kind") == "shrink"
    if manifest is None or shrunk or before is None:
        other = "was shrunk since" if shrunk else "does not say that it has"
        found = "starts anew" if manifest is None else f"goes on from one that {other}"
        raise UserError(
            f"optimizer.old_token_lr_scale={optimizer.old_token_lr_scale:g} is for a run from a checkpoint "
            f"that has grown, and this run {found}; optimizer.old_token_lr_scale=1 would work"
        )
    return {name: before[role_of(name)] for name in manifest.shapes if is_token(name)}


def slow_old_tokens(
    module: nn.Module, zero: Any, layout: Layout, rows: Mapping[str, int], lr_scale: float
) -> None:
    """Give the old rows of this rank's part `lr_scale` times the learning rate; 0 freezes them.

    Args:
        module: the pipeline stage.
        zero: DeepSpeed's optimizer around a StretchedAdamW.
        rows: as `slowed_rows` gives them.
    """
    stretches: dict[float, list[slice]] = {1.0: [], lr_scale: []}
    widths = {name: parameter.shape[-1] for name, parameter in canonical_parameters(module)}
    for fragment in fragments(module, zero, layout):
        interval, start = fragment.interval, fragment.offset
        size = interval.stop - interval.start
        old = min(max(rows.get(interval.name, 0) * widths[interval.name] - interval.start, 0), size)
        stretches[lr_scale].append(slice(start, start + old))
        stretches[1.0].append(slice(start + old, start + size))
    if lr_scale == 0.0:
        del stretches[lr_scale]
        _stop_gradients(module, layout, rows)
    adamw: StretchedAdamW = zero.optimizer
    adamw.stretches = {
        scale: [stretch for stretch in slices if stretch.start < stretch.stop]
        for scale, slices in stretches.items()
    }


def _stop_gradients(module: nn.Module, layout: Layout, rows: Mapping[str, int]) -> None:
    """Gradients of old rows are 0 from the start, so that no reduction or norm sees them."""
    for name, parameter in canonical_parameters(module):
        if name in rows:
            first = layout.tensor.rank * len(parameter)
            frozen = min(max(rows[name] - first, 0), len(parameter))
            parameter.register_hook(_without_rows(frozen))


def _without_rows(frozen: int) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        # Not in place: what computed the gradient may still need it.
        return torch.cat([torch.zeros_like(gradient[:frozen]), gradient[frozen:]])

    return hook
