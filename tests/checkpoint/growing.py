"""Growth as the command does it: planned and carried out."""

from __future__ import annotations

from pathlib import Path

from megatron_tokenformer.checkpoint.grow import carry_out
from megatron_tokenformer.checkpoint.growth_plan import plan_growth
from megatron_tokenformer.checkpoint.manifest import Manifest
from megatron_tokenformer.config.growth import Growth
from megatron_tokenformer.config.schema import RunConfig


def grow(source: Path, target: RunConfig, folder: Path, rule: Growth) -> tuple[Path, Manifest]:
    """Grow a checkpoint to the token counts of `target.model`; the new one, at step 0 of its run."""
    grown = carry_out(plan_growth(source, target, folder, rule))
    return grown.path, grown.manifest
