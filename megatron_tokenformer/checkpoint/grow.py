"""Growth: append parameter tokens to every Pattention of a checkpoint.

    K' = [K; K_new]    V' = [V; V_new]

New tokens are rows at the end, so every stored interval of the old model is an interval of the new one,
element for element.  Growing is: copy the shards as they are, and add one shard with the new rows.

With K_new = 0 and tau kept, the function is exactly the same: a new token's score is 0, so it adds nothing
to the row total that scores are normalised by, and its weight is gelu(0) = 0.  (Under softmax a score of 0
has weight, so growth there is not exact.)
"""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint import store
from megatron_tokenformer.checkpoint.manifest import (
    WEIGHT,
    Interval,
    Manifest,
    Shard,
    read_manifest,
)
from megatron_tokenformer.checkpoint.shards import IntervalReader, copy_shard, verify_shard, write_shard
from megatron_tokenformer.config.growth import Growth, check_growth
from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.model.initialization import normal_row_blocks
from megatron_tokenformer.model.language_model import full_shapes, initial_std
from megatron_tokenformer.model.tau import (
    ROLES,
    Taus,
    TauSchedule,
    constant_tau,
    taus_from_json,
    taus_to_json,
)

ZERO_BLOCK = 256 * 1024


def grow(source: Path, target: RunConfig, folder: Path, rule: Growth) -> tuple[Path, Manifest]:
    """Grow a checkpoint to the token counts of `target.model`; return the new one, at step 0 of its run.

    Reads and writes in blocks of rows; no more than one is in memory.  The source is left as it is.

    Raises:
        UserError: the models differ in more than tokens, a shard is damaged, the folder is that of a run, or
            it cannot be written; nothing new is then there.
    """
    old = read_manifest(source)
    before = validate(Model, old.config.get("model", {}), str(source))
    check_growth(before, target.model, rule)
    others = [path.name for path in store.complete_checkpoints(folder) if path.name != store.step_name(0)]
    if others:
        raise UserError(f"{folder} holds {others[-1]}, so it is a run's; grow into a folder of its own")
    temporary = folder / store.temporary_name(0)
    try:
        store.make_empty(temporary)
        grown = _write_grown(source, old, before, target, temporary, rule)
        return store.publish(temporary, grown), grown
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot grow {source} into {folder}: {error.strerror}", exit_code=1) from None


def _write_grown(
    source: Path, old: Manifest, before: Model, target: RunConfig, temporary: Path, rule: Growth
) -> Manifest:
    """Write the shards of the grown checkpoint, and return its manifest."""
    states = [WEIGHT] if rule.optimizer == "reset" else old.states
    shards = _old_shards(source, old, states, temporary)
    new = temporary / f"grown-{len(old.history) + 1:03d}.safetensors"
    shards.append(_new_rows(new, states, target, old, rule))
    entry = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "from": str(source),
        "step": old.step,
        "val_loss": old.val_loss,
        "tokens_before": before.tokens.model_dump(),
        "tokens_after": target.model.tokens.model_dump(),
        "parameters_before": parameter_count(before),
        "parameters_after": parameter_count(target.model),
        **rule.model_dump(),
    }
    return replace(
        old,
        config=target.model_dump(mode="json"),
        step=0,
        adam_step=old.adam_step if rule.optimizer == "carry" else 0,
        taus=taus_to_json(grown_taus(taus_from_json(old.taus), old.step, target.model, rule)),
        shapes={name: list(shape) for name, shape in full_shapes(target.model).items()},
        states=states,
        shards=shards,
        history=[*old.history, entry],
    )


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


def _old_shards(source: Path, old: Manifest, states: list[str], folder: Path) -> list[Shard]:
    """The old shards in the new folder: as bytes if all states stay, else rewritten without the others."""
    shards = []
    total = sum(shard.size for shard in old.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="old rows", disable=None) as bar:
        for shard in old.shards:
            if states == old.states:
                copy_shard(source, shard, folder, bar.update)
                shards.append(shard)
            else:
                verify_shard(source, shard, bar.update)
                kept = _stored(IntervalReader(source, old), shard, states)
                shards.append(write_shard(folder / shard.file, shard.intervals, states, kept))
    return shards


def _stored(reader: IntervalReader, shard: Shard, states: list[str]) -> Iterator[Tensor]:
    for interval in shard.intervals:
        for state in states:
            yield from (values for _, values in reader.read(interval, state))


def _new_rows(path: Path, states: list[str], target: RunConfig, old: Manifest, rule: Growth) -> Shard:
    """A shard with the rows that the old model does not have."""
    added = [
        (name, range(old.shapes[name][0], shape[0]), shape[1])
        for name, shape in full_shapes(target.model).items()
        if list(shape) != old.shapes[name]
    ]
    intervals = [Interval(name, rows.start * width, rows.stop * width) for name, rows, width in added]

    def blocks() -> Iterator[Tensor]:
        for name, rows, width in tqdm(added, unit="tensor", desc="new rows", disable=None):
            start = rule.keys if name.endswith("key_tokens") else rule.values
            for state in states:
                if state == WEIGHT and start == "normal":
                    std = initial_std(target.model, name)
                    yield from (b for _, b in normal_row_blocks(target.training.seed, name, rows, width, std))
                else:
                    yield from _zeros(len(rows) * width)

    return write_shard(path, intervals, states, blocks())


def _zeros(count: int) -> Iterator[Tensor]:
    """This many zeros, in blocks."""
    block = torch.zeros(min(count, ZERO_BLOCK))
    for first in range(0, count, ZERO_BLOCK):
        yield block[: count - first]
