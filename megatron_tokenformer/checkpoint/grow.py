"""Growth: append parameter tokens to every Pattention of a checkpoint.

    K' = [K; K_new]    V' = [V; V_new]

New tokens are rows at the end, so every stored interval of the old model is an interval of the new one,
element for element.  Growing is: copy or link the shards as they are, and add one with the new rows.

With K_new = 0 and tau kept, the function is exactly the same: a new token's score is 0, so it adds nothing
to the row total that scores are normalised by, and its weight is gelu(0) = 0.  (Under softmax a score of 0
has weight, so growth there is not exact.)
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint.growth_plan import GrowthPlan, OldRows
from megatron_tokenformer.checkpoint.manifest import (
    WEIGHT,
    Interval,
    Manifest,
    Shard,
)
from megatron_tokenformer.checkpoint.resize import new_manifest
from megatron_tokenformer.checkpoint.shards import IntervalReader, copy_shard, verify_shard, write_shard
from megatron_tokenformer.checkpoint.step_zero import check_space, write_whole
from megatron_tokenformer.checkpoint.token_norms import ShardReader, TokenNorms
from megatron_tokenformer.config.growth import Growth, changes_of_function
from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.initialization import normal_row_blocks, normal_rows
from megatron_tokenformer.model.language_model import full_shapes, initial_std
from megatron_tokenformer.model.names import is_key, is_token
from megatron_tokenformer.model.tau import (
    ROLES,
    Taus,
    TauSchedule,
    constant_tau,
    taus_from_json,
)

ZERO_BLOCK = 256 * 1024

# Other file systems, those without links, a file of another user's, and one with too many links already.
CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Grown:
    """A checkpoint that a growth has made."""

    path: Path
    manifest: Manifest
    old_rows: OldRows


def carry_out(plan: GrowthPlan) -> Grown:
    """Write the grown checkpoint and return it.

    Reads and writes in blocks of rows; no more than one is in memory.  The source is left as it is.

    Raises:
        UserError: there is no room for it, a shard is damaged, or the folder cannot be written; nothing new
            is then there.
    """
    linked = False

    def write(folder: Path) -> Manifest:
        nonlocal linked
        linked = plan.link and _link_or_tell(plan, folder)
        return _write_grown(plan, folder, linked)

    path, manifest = write_whole(plan.folder, plan.doing, plan.needed_bytes(plan.will_link), write)
    return Grown(path, manifest, "copied" if plan.old_rows == "linked" and not linked else plan.old_rows)


def _write_grown(plan: GrowthPlan, folder: Path, linked: bool) -> Manifest:
    """Write the shards of the grown checkpoint, and return its manifest."""
    old, model, rule = plan.old, plan.target.model, plan.rule
    norms = TokenNorms(full_shapes(model))
    shards = _old_shards(plan, folder, linked, norms)
    shards.append(_new_rows(folder / f"grown-{len(old.history) + 1:03d}.safetensors", plan, norms))
    old_rows = {name: shape[0] for name, shape in old.shapes.items()}
    told = {"norms": norms.means(old_rows, read=plan.verify or not linked)}
    taus = grown_taus(taus_from_json(old.taus), old.step, model, rule)
    exact = not changes_of_function(model, rule)
    return new_manifest(plan, taus, shards, told, exact)


def grown_taus(taus: Taus, step: int, model: Model, rule: Growth) -> Taus:
    """tau of the next run, from its value at the step where the old one stopped."""
    grown: Taus = {}
    for role in ROLES:
        now, natural = taus[role].at(step), math.sqrt(getattr(model.tokens, role))
        grown[role] = {
            "keep": constant_tau(now),
            "anneal": TauSchedule(now, natural, rule.tau_steps or 0),
            "sqrt": constant_tau(natural),
        }[rule.tau]
    return grown


def _link_or_tell(plan: GrowthPlan, folder: Path) -> bool:
    """Hard-link the old shards into the new folder, all or none; where it cannot be done, say so.

    A shard is created under a temporary name, and from then on only renamed and deleted.  So two checkpoints
    may have the same file, and deleting one leaves it to the other.
    """
    made: list[Path] = []
    try:
        for shard in plan.old.shards:
            # Resolved: a link to a symbolic link would depend on what that one points to.
            os.link((plan.source / shard.file).resolve(), folder / shard.file)
            made.append(folder / shard.file)
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        for path in made:
            path.unlink()
        print(f"cannot link {plan.source} into {plan.folder}: {error.strerror}; copying instead", flush=True)
        check_space(plan.folder, plan.doing, plan.needed_bytes(link=False))
        return False
    return True


def _old_shards(plan: GrowthPlan, folder: Path, linked: bool, norms: TokenNorms) -> list[Shard]:
    """The old shards in the new folder: as bytes if nothing in them changes, else rewritten."""
    source, old, states = plan.source, plan.old, plan.states
    shards = []
    total = sum(shard.size for shard in old.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="old rows", disable=None) as bar:
        for shard in old.shards:
            look = ShardReader(source / shard.file, shard, old.states, norms).take
            if plan.rewrites:
                verify_shard(source, shard, old.states, bar.update, look)
                shards.append(write_shard(folder / shard.file, shard.intervals, states, _stored(plan, shard)))
                continue
            if not linked:
                copy_shard(source, shard, old.states, folder, bar.update, look)
            elif plan.verify:
                verify_shard(source, shard, old.states, bar.update, look)
            shards.append(shard)
    return shards


def _stored(plan: GrowthPlan, shard: Shard) -> Iterator[Tensor]:
    """The states of a shard that stay, with noise on the old tokens if the rule has any."""
    reader = IntervalReader(plan.source, plan.old)
    for interval in shard.intervals:
        noisy = plan.rule.old_token_noise > 0 and is_token(interval.name)
        for state in plan.states:
            for first, values in reader.read(interval, state):
                if noisy and state == WEIGHT:
                    values = values + _noise(plan, interval.name, first, len(values))
                yield values


def _noise(plan: GrowthPlan, name: str, first: int, count: int) -> Tensor:
    """Elements of the noise that belongs to (seed, name, number of the growth), whatever the shards are."""
    width = plan.old.shapes[name][1]
    rows = range(first // width, -(-(first + count) // width))
    stream = f"{name}/noise of growth {len(plan.old.history) + 1}"
    noise = normal_rows(plan.target.training.seed, stream, rows, width, plan.rule.old_token_noise)
    start = first - rows.start * width
    return noise.flatten()[start : start + count]


def _new_rows(path: Path, plan: GrowthPlan, norms: TokenNorms) -> Shard:
    """A shard with the rows that the old model does not have."""
    model, seed = plan.target.model, plan.target.training.seed
    intervals = [
        Interval(new.name, new.rows.start * new.width, new.rows.stop * new.width) for new in plan.added
    ]
    zeros = torch.zeros(ZERO_BLOCK)  # one for all: filling it again and again took a fifth of the time

    def blocks() -> Iterator[Tensor]:
        for new in tqdm(plan.added, unit="tensor", desc="new rows", disable=None):
            start = plan.rule.keys if is_key(new.name) else plan.rule.values
            for state in plan.states:
                if state == WEIGHT and start == "normal":
                    std = initial_std(model, new.name)
                    for row, block in normal_row_blocks(seed, new.name, new.rows, new.width, std):
                        norms.add(new.name, row * new.width, block.flatten().numpy())
                        yield block
                    continue
                for left in range(len(new.rows) * new.width, 0, -len(zeros)):
                    yield zeros[:left]

    return write_shard(path, intervals, plan.states, blocks())
