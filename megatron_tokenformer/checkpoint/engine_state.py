"""DeepSpeed's ZeRO-1 partitions as intervals of parameters, and their way to and from a checkpoint.

ZeRO-1 flattens a stage's parameters into one fp32 vector and gives each data-parallel rank a stretch of it.
`fragments` says which interval of which parameter each piece of that stretch is.  The names used to find out
are DeepSpeed's private ones; `tests/checkpoint/test_engine_state.py` tells when they change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, nn

from megatron_tokenformer.checkpoint.manifest import (
    MOMENTS,
    STATES,
    WEIGHT,
    Interval,
    Manifest,
)
from megatron_tokenformer.checkpoint.shards import IntervalReader
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.language_model import canonical_parameters
from megatron_tokenformer.parallel.layout import Layout

LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's state that this rank's optimizer holds."""

    interval: Interval
    states: dict[str, Tensor]
    """views of the optimizer's own fp32 memory, one for each of STATES"""
    offset: int
    """where they begin in the flat vector of the rank"""
    owned: bool
    """whether this rank is the one to save it (tied and replicated parameters are on several)"""


def fragments(module: nn.Module, zero: Any, layout: Layout) -> Iterator[Fragment]:
    """What this rank holds of each parameter, in fp32.

    Args:
        module: the pipeline stage.
        zero: DeepSpeed's DeepSpeedZeroOptimizer (fp32, fp16) or BF16_Optimizer.
    """
    (flat,) = flat_partitions(zero)
    state = adam_state(zero)
    for name, parameter in canonical_parameters(module):
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        split = parameter.tensor_model_parallel  # type: ignore[attr-defined]
        start = mapping.lp_fragment_address.start + (layout.tensor.rank * parameter.numel() if split else 0)
        here = mapping.hp_fragment_address
        vectors = {WEIGHT: flat, **{moment: state[moment] for moment in MOMENTS}}
        first_holder = layout.pipeline_rank == 0 or not name.startswith("embedding.")
        yield Fragment(
            Interval(name, start, start + here.numel),
            {key: vector.detach().narrow(0, here.start, here.numel) for key, vector in vectors.items()},
            offset=here.start,
            owned=first_holder and (split or layout.tensor.rank == 0),
        )


def flat_partitions(zero: Any) -> list[Tensor]:
    """The fp32 vectors of this rank's optimizer groups."""
    name = "fp32_groups_flat_partition"  # BF16_Optimizer
    if hasattr(zero, "single_partition_of_fp32_groups"):
        name = "single_partition_of_fp32_groups"  # DeepSpeedZeroOptimizer
    partitions: list[Tensor] = getattr(zero, name)
    return partitions


def adam_state(zero: Any) -> dict[str, Tensor]:
    """AdamW's state of this rank's vector: step and moments, made as AdamW would if it has not yet."""
    (flat,) = flat_partitions(zero)
    state: dict[str, Tensor] = zero.optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat)
    return state


def with_optimizer(manifest: Manifest, zero: Any) -> Manifest:
    """A manifest with the optimizer's counters of this moment."""
    return replace(
        manifest,
        states=list(STATES),
        adam_step=int(adam_state(zero)["step"]),
        loss_scaler=_loss_scaler_state(zero),
    )


@torch.no_grad()
def load(module: nn.Module, zero: Any, layout: Layout, folder: Path, manifest: Manifest) -> None:
    """Read this rank's intervals of a checkpoint that any layout wrote, and nothing else of it.

    Raises:
        UserError: a shard or the loss scaler's state is not what the manifest says.
    """
    if manifest.loss_scaler and manifest.loss_scaler.keys() != set(LOSS_SCALER_STATE):
        raise UserError(f"checkpoint {folder} is damaged: loss_scaler is {manifest.loss_scaler}", exit_code=1)
    reader = IntervalReader(folder, manifest)
    state = adam_state(zero)
    for fragment in fragments(module, zero, layout):
        for key in STATES:
            if key not in manifest.states:
                fragment.states[key].zero_()
                continue
            for first, values in reader.read(fragment.interval, key):
                offset = first - fragment.interval.start
                fragment.states[key].narrow(0, offset, values.numel()).copy_(values)
    state["step"].fill_(manifest.adam_step)
    scaler = getattr(zero, "loss_scaler", None)
    if isinstance(scaler, DynamicLossScaler) and manifest.loss_scaler:
        for key in LOSS_SCALER_STATE:
            setattr(scaler, key, type(getattr(scaler, key))(manifest.loss_scaler[key]))
    zero.update_lp_params()


def _loss_scaler_state(zero: Any) -> dict[str, float]:
    scaler = getattr(zero, "loss_scaler", None)
    return {k: getattr(scaler, k) for k in LOSS_SCALER_STATE} if isinstance(scaler, DynamicLossScaler) else {}
