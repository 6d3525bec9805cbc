"""Shrinking: take from every Pattention the parameter tokens that reach least.

    reach_i = ||K_i|| ||V_i||

The score of token i is proportional to ||K_i||, and what it adds to the output to ||V_i||.  The tokens of
least reach go, each Pattention choosing its own; those that stay keep their order, their values and their
Adam moments, and tau is kept.

A token with a zero key has no score, so taking it away changes nothing: a growth that has not been trained
is undone exactly.  Any other token was part of the row total that scores are normalised by, so the function
changes.  (Under softmax it always does.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint.blocks import read_blocks
from megatron_tokenformer.checkpoint.manifest import Interval, Manifest
from megatron_tokenformer.checkpoint.resize import (
    ResizePlan,
    check_folder,
    new_manifest,
    read_source,
)
from megatron_tokenformer.checkpoint.shards import verify_shard, write_shard
from megatron_tokenformer.checkpoint.step_zero import write_whole
from megatron_tokenformer.checkpoint.token_norms import ShardReader, TokenNorms, mean
from megatron_tokenformer.config.growth import Shrinking, check_shrink
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.model.names import is_key, role_of, values_of
from megatron_tokenformer.model.tau import ROLES, Taus, constant_tau, taus_from_json

BLOCK_ELEMENTS = 1024 * 1024


@dataclass(frozen=True)
class ShrinkPlan(ResizePlan):
    """A shrinking that can be carried out."""

    rule: Shrinking

    kind = "shrink"
    verb = "shrink"

    @property
    def new_bytes(self) -> int:
        """Size of what stays, in all states."""
        return 4 * len(self.states) * parameter_count(self.target.model)


@dataclass(frozen=True)
class Choice:
    """Which tokens of a checkpoint stay."""

    kept: dict[str, np.ndarray]
    """rows that stay of each K and V, in order, by canonical name"""
    reach: dict[str, dict[str, float | None]]
    """by role the mean reach of the tokens that are `kept` and `dropped`, over all layers"""
    exact: bool
    """whether the function stays the same: all that go have zero keys, and those have no weight"""


def plan_shrink(source: Path, target: RunConfig, folder: Path, rule: Shrinking) -> ShrinkPlan:
    """Check that a checkpoint can shrink to the token counts of `target.model`; writes nothing.

    Raises:
        UserError: the models differ in more than tokens, the manifest is damaged, or the folder is that of a
            run.
    """
    old, before = read_source(source)
    check_shrink(before, target.model)
    check_folder(source, folder, ShrinkPlan.verb)
    return ShrinkPlan(source.absolute(), folder, old, before, target, rule)


def carry_out(plan: ShrinkPlan) -> tuple[Path, Manifest]:
    """Write the shrunk checkpoint and return it.

    Reads the old one twice, for norms and hashes, then for what stays; a block of rows is in memory.

    Raises:
        UserError: there is no room for it, a shard is damaged, or the folder cannot be written; nothing new
            is then there.
    """

    def write(folder: Path) -> Manifest:
        choice = choose(plan)
        path = folder / f"shrunk-{len(plan.old.history) + 1:03d}.safetensors"
        widths = {name: math.prod(shape[1:]) for name, shape in plan.old.shapes.items()}
        intervals = [
            Interval(name, 0, len(choice.kept.get(name, range(shape[0]))) * widths[name])
            for name, shape in plan.old.shapes.items()
        ]
        shard = write_shard(path, intervals, plan.states, _kept(plan, choice, widths))
        told = {"reach": choice.reach, "exact": choice.exact}
        return new_manifest(plan, shrunk_taus(plan), [shard], told, choice.exact)

    return write_whole(plan.folder, plan.doing, plan.new_bytes, write)


def shrunk_taus(plan: ShrinkPlan) -> Taus:
    """tau of the next run: its value at the step where the old one stopped."""
    return {role: constant_tau(tau.at(plan.old.step)) for role, tau in taus_from_json(plan.old.taus).items()}


def choose(plan: ShrinkPlan) -> Choice:
    """Read the old checkpoint whole, checking its hashes, and find the tokens of most reach.

    Of two that reach as far the earlier one stays.

    Raises:
        UserError: a shard is damaged.
    """
    old, tokens = plan.old, plan.target.model.tokens
    norms = TokenNorms(old.shapes, exact=True)
    with tqdm(total=plan.stored_bytes, unit="B", unit_scale=True, desc="norms", disable=None) as bar:
        for shard in old.shards:
            look = ShardReader(plan.source / shard.file, shard, old.states, norms).take
            verify_shard(plan.source, shard, old.states, bar.update, look)
    kept: dict[str, np.ndarray] = {}
    reaches: dict[str, dict[str, list[np.ndarray]]] = {r: {"kept": [], "dropped": []} for r in ROLES}
    exact = plan.before.score_norm != "softmax"
    for keys in filter(is_key, old.shapes):
        values, role = values_of(keys), role_of(keys)
        reach = norms.of(keys) * norms.of(values)
        order = np.argsort(-reach, kind="stable")
        stay, go = np.split(order, [getattr(tokens, role)])
        kept[keys] = kept[values] = np.sort(stay)
        reaches[role]["kept"].append(reach[stay])
        reaches[role]["dropped"].append(reach[go])
        exact = exact and not norms.of(keys)[go].any()
    means = {role: {key: mean(parts) for key, parts in each.items()} for role, each in reaches.items()}
    return Choice(kept, means, exact)


def _kept(plan: ShrinkPlan, choice: Choice, widths: dict[str, int]) -> Iterator[Tensor]:
    """The elements that stay: tensor by tensor, state by state, in blocks of rows."""
    for name, width in tqdm(widths.items(), unit="tensor", desc="kept rows", disable=None):
        rows = max(1, BLOCK_ELEMENTS // width)
        for state in plan.states:
            for first, values in read_blocks(plan.source, plan.old, name, state, rows * width):
                if name not in choice.kept:
                    yield values
                    continue
                block, start = values.view(-1, width), first // width
                kept = choice.kept[name]
                here = kept[np.searchsorted(kept, start) : np.searchsorted(kept, start + len(block))]
                if len(here):
                    yield block[torch.from_numpy(here - start)]
