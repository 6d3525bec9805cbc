"""Net2Net: widen a dense model by splitting its channels, heads and inner channels (arXiv 1511.05641).

Every axis of n channels becomes one of n' in which channel j is a copy of old channel j mod n: of the
residual stream, of heads (their size is kept, so j mod n copies whole heads), of the MLP's inner channels.
What is copied computes the same, and what reads copies shares its weight among them:

    W'[.., j] = W[.., j mod n] * share[.., j],    the shares of the copies of one channel sum to 1

If n' is a multiple of n, mean and variance over channels stay too, so LayerNorm does, and the function is
exactly the same.  Otherwise some channels have more copies than others, and under LayerNorm it changes.

Shares are drawn for each element.  With one share for each copy the gradients of two copies would be
multiples of each other, and Adam, to which such are equal, would keep them copies for ever.

Moments are carried as estimates of the gradients to come.  The gradients of a parameter's m copies sum to the
old one, so each has 1/m of it, on average over shares: the first moment is divided by m, the second by m^2.
A weight that is shared among what it reads keeps its gradient, for what it reads is what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.checkpoint.blocks import read_block
from megatron_tokenformer.checkpoint.manifest import FIRST_MOMENT, SECOND_MOMENT, WEIGHT, Interval, Manifest
from megatron_tokenformer.checkpoint.resize import (
    ResizePlan,
    check_folder,
    new_manifest,
    read_source,
)
from megatron_tokenformer.checkpoint.shards import IntervalReader, verify_shard, write_shard
from megatron_tokenformer.checkpoint.step_zero import write_whole
from megatron_tokenformer.config.growth import Widening, changes_of_widening, check_widening
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.model.initialization import normal_rows
from megatron_tokenformer.model.language_model import full_shapes

BLOCK_ELEMENTS = 1024 * 1024

Axis = Literal[0, 1]
Draw = Callable[[range], Tensor]
READING_AXIS: dict[str, Axis] = {
    "query.weight": 1,
    "key.weight": 1,
    "value.weight": 1,
    "output.weight": 0,  # stored transposed, [in, out]
    "up.weight": 1,
    "down.weight": 0,
    "final_norm.gain_minus_one": 1,  # the head sums over what the final norm gives out
    "final_norm.bias": 1,
}
"""By the end of a parameter's name, the axis along which it reads channels; any other is copied alone.  A
vector counts as a matrix of one row."""


@dataclass(frozen=True)
class WideningPlan(ResizePlan):
    """A widening that can be carried out."""

    rule: Widening

    kind = "net2net"
    verb = "grow"

    @property
    def new_bytes(self) -> int:
        """Size of the wider model, in all states."""
        return 4 * len(self.states) * parameter_count(self.target.model)


@dataclass(frozen=True)
class Split:
    """How one parameter becomes a larger one; all sizes count a vector as a matrix of one row."""

    name: str
    old: tuple[int, int]
    new: tuple[int, int]
    reads: Axis | None
    """the axis along which weights are shared among copies"""

    def copies(self, axis: Axis) -> Tensor:
        """How many copies there are of each old channel of an axis, [old]."""
        old, new = self.old[axis], self.new[axis]
        return new // old + (torch.arange(old) < new % old).int()

    @cached_property
    def column_of(self) -> Tensor:
        """The old column that each new one is a copy of, [new]."""
        return torch.arange(self.new[1]) % self.old[1]


def plan_widening(source: Path, target: RunConfig, folder: Path, rule: Widening) -> WideningPlan:
    """Check that a dense checkpoint can grow to the width of `target.model`; writes nothing.

    Raises:
        UserError: the models differ in more than width, the function would change without being allowed to,
            the manifest is damaged, or the folder is that of a run.
    """
    old, before = read_source(source)
    check_widening(before, target.model, rule)
    check_folder(source, folder, WideningPlan.verb)
    return WideningPlan(source.absolute(), folder, old, before, target, rule)


def carry_out(plan: WideningPlan) -> tuple[Path, Manifest]:
    """Write the wider checkpoint and return it.

    Reads the old one for its hashes, then block by block as often as channels are copied; a few blocks of
    rows are in memory.

    Raises:
        UserError: there is no room for it, a shard is damaged, or the folder cannot be written; nothing new
            is then there.
    """

    def write(folder: Path) -> Manifest:
        _verify(plan)
        path = folder / f"widened-{len(plan.old.history) + 1:03d}.safetensors"
        splits = splits_of(plan)
        intervals = [Interval(split.name, 0, split.new[0] * split.new[1]) for split in splits]
        shard = write_shard(path, intervals, plan.states, _widened(plan, splits))
        exact = not changes_of_widening(plan.before, plan.target.model)
        return new_manifest(plan, {}, [shard], {"exact": exact}, exact)

    return write_whole(plan.folder, plan.doing, plan.new_bytes, write)


def splits_of(plan: WideningPlan) -> list[Split]:
    """What becomes of every parameter."""
    found = []
    for name, shape in full_shapes(plan.target.model).items():
        old, new = ((1, *s)[-2:] for s in (plan.old.shapes[name], shape))
        reads = READING_AXIS.get(".".join(name.split(".")[-2:]))
        found.append(Split(name, (old[0], old[1]), (new[0], new[1]), reads))
    return found


def _verify(plan: WideningPlan) -> None:
    with tqdm(total=plan.stored_bytes, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for shard in plan.old.shards:
            verify_shard(plan.source, shard, plan.old.states, bar.update)


def _widened(plan: WideningPlan, splits: list[Split]) -> Iterator[Tensor]:
    """The elements of the wider model: tensor by tensor, state by state, in blocks of rows."""
    reader = IntervalReader(plan.source, plan.old)
    for split in tqdm(splits, unit="tensor", desc="wider", disable=None):
        draw, width = _draws(plan, split), split.old[1]
        for state in plan.states:
            for first, rows in _blocks(split):
                wanted = Interval(split.name, rows.start * width, rows.stop * width)
                block = read_block(reader, wanted, state).view(len(rows), width)[:, split.column_of]
                if state == WEIGHT:
                    yield _share(block, split, first, rows, draw, plan.rule.spread)
                else:
                    yield _estimate(block, split, state, rows)


def _draws(plan: WideningPlan, split: Split) -> Draw:
    """Standard normal numbers, fp64, that belong to (seed, name, number of the growth, new row)."""
    seed, stream = plan.target.training.seed, f"{split.name}/net2net of growth {len(plan.old.history) + 1}"
    return lambda rows: normal_rows(seed, stream, rows, split.new[1], 1.0).double()


def _blocks(split: Split) -> Iterator[tuple[int, range]]:
    """New rows in blocks, as (first new row, the old rows that they are copies of)."""
    (old, new), most = (split.old[0], split.new[0]), max(1, BLOCK_ELEMENTS // split.new[1])
    first = 0
    while first < new:
        start = first % old
        rows = range(start, min(start + most, old, start + new - first))
        yield first, rows
        first += len(rows)


def _share(block: Tensor, split: Split, first: int, rows: range, draw: Draw, spread: float) -> Tensor:
    """Weights [rows, new columns], copied: shared among copies along the axis that reads them."""
    if split.reads is None:
        return block
    own, copies = draw(range(first, first + len(rows))), split.copies(split.reads)
    if split.reads == 0:
        copies = copies[rows.start : rows.stop, None]
        starts = range(rows.start, split.new[0], split.old[0])
        drawn = [draw(range(start, min(start + len(rows), split.new[0]))) for start in starts]
        mean = _sum(drawn, dim=0) / copies
    else:
        mean = (_sum(own.split(split.old[1], dim=1), dim=1) / copies)[:, split.column_of]
        copies = copies[split.column_of]
    share = (1.0 + spread * (own - mean)) / copies
    offset = 1.0 if split.name.endswith("gain_minus_one") else 0.0
    return ((block + offset) * share - offset).float()


def _sum(copies: Sequence[Tensor], dim: int) -> Tensor:
    """The sum of tensors of which the last may be shorter along `dim`, as if zeros followed."""
    total = copies[0].clone()
    for copy in copies[1:]:
        total.narrow(dim, 0, copy.shape[dim]).add_(copy)
    return total


def _estimate(block: Tensor, split: Split, state: str, rows: range) -> Tensor:
    """Moments [rows, new columns], copied: as they are likely to be for the gradients of copies."""
    power = {FIRST_MOMENT: 1, SECOND_MOMENT: 2}[state]
    if split.reads != 0:
        block = block / split.copies(0)[rows.start : rows.stop, None] ** power
    if split.reads != 1:
        block = block / split.copies(1)[split.column_of] ** power
    return block
