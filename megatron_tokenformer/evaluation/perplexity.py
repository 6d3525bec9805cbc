"""The loss of a checkpoint on datasets: the mean over their tokens, in nats, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.config.schema import Precision
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.datasets import Batch, Dataset, Reading, open_dataset
from megatron_tokenformer.evaluation.load import Stored, load_model, one_device, open_checkpoint
from megatron_tokenformer.model.language_model import LanguageModel

if TYPE_CHECKING:  # importing it takes DeepSpeed and megatron-core, which one process does without
    from megatron_tokenformer.parallel.layout import Layout

LOGITS_AT_ONCE = 16 * 1024 * 1024
"""elements; 64 MB in fp32, whatever the vocabulary and the batch"""


@dataclass(frozen=True)
class Score:
    """What a dataset, or all of several, came to."""

    name: str
    nats: float
    """summed over the tokens"""
    tokens: int
    """that were predicted and count"""
    bytes: float | None
    """of the text that these tokens stand for; None if no description tells"""
    component: str | None = None
    """whose documents these are, where a description tells"""

    @property
    def val_loss(self) -> float:
        """Mean in nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers, as the loss is not."""
        return None if self.bytes is None else self.nats / math.log(2) / self.bytes

    def as_json(self) -> dict[str, Any]:
        """The figures that scripts rely on."""
        return {
            "val_loss": self.val_loss,
            "val_ppl": math.exp(min(self.val_loss, 700.0)),
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint and the datasets to evaluate it on, opened and found to belong together."""

    stored: Stored
    reading: Reading
    datasets: list[Dataset]


def open_evaluation(
    load: str | Path, prefixes: Sequence[str], verify: bool = False, **reading: int | bool | None
) -> Evaluation:
    """Open everything, so that what cannot work is told before the model is loaded.

    Args:
        load: a checkpoint, a folder of them, or a run's.
        verify: read the whole checkpoint first, and compare its hashes.
        reading: fields of `Reading` that are not to be as in the checkpoint's config; None leaves one.

    Raises:
        UserError: no checkpoint there, a damaged one, or a dataset that does not fit it.
    """
    stored = open_checkpoint(load, verify)
    how = Reading.like(stored.config, **reading)
    about = how, stored.config.model.vocab_size, stored.path, stored.manifest.tokenizer
    return Evaluation(stored, how, [open_dataset(prefix, *about) for prefix in prefixes])


@torch.inference_mode()
def evaluate(opened: Evaluation, precision: Precision = "auto", layout: Layout | None = None) -> list[Score]:
    """The score of each dataset, the same on every rank.

    Args:
        layout: of the processes that share the batches out, each with the whole model; None: one alone.

    Raises:
        UserError: a damaged checkpoint, an id beyond the vocabulary, data that change meanwhile, or a loss
            that is not a number.
    """
    rank, size = (layout.data_rank, layout.data_size) if layout else (0, 1)
    device = layout.device if layout else one_device()
    model = load_model(opened.stored.path, opened.stored.manifest, precision, device)
    sums = torch.zeros(len(opened.datasets), 2, dtype=torch.float64, device=device)
    batches = sum(len(range(rank, data.batch_count, size)) for data in opened.datasets)
    with tqdm(total=batches, unit="batch", desc="evaluate", disable=None if rank == 0 else True) as bar:
        for place, data in zip(sums, opened.datasets):
            for batch in data.batches(rank, size):
                place += summed_loss(model, batch, device)
                bar.update()
            data.file.pair.check_unchanged()
    if layout is not None:
        dist.all_reduce(sums, group=layout.data_group)
    return [_score(data, *totals) for data, totals in zip(opened.datasets, sums.tolist())]


def summed_loss(model: LanguageModel, batch: Batch, device: torch.device) -> Tensor:
    """The cross entropy of a batch summed over the targets that count, and their number: [2], fp64.

    Logits are made, in fp32, for a part of the positions at a time.
    """
    positions = None if batch.positions is None else batch.positions.to(device)
    hidden = model.hidden(batch.inputs.to(device), positions).flatten(0, 1)  # [s * b, d]
    targets, counted = (labels.to(device).t().flatten() for labels in (batch.targets, batch.counted))
    rows = max(1, LOGITS_AT_ONCE // model.embedding.weight.shape[0])
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for x, wanted, counts in zip(hidden.split(rows), targets.split(rows), counted.split(rows)):
        losses = F.cross_entropy(model.embedding.logits(x).float(), wanted, reduction="none")
        nats += losses[counts].sum(dtype=torch.float64)
    return torch.stack((nats, counted.sum().double()))


def total(scores: Sequence[Score]) -> Score:
    """The score of all datasets together: each token, and each byte, counts the same."""
    sizes = [score.bytes for score in scores]
    known = None if None in sizes else math.fsum(size for size in sizes if size is not None)
    return Score("total", math.fsum(s.nats for s in scores), sum(s.tokens for s in scores), known)


def _score(data: Dataset, nats: float, tokens: float) -> Score:
    prefix = data.file.prefix
    if tokens == 0:
        raise UserError(f"no token of {prefix} counts: data.eod_mask_loss leaves out all that were read")
    if not math.isfinite(nats):
        raise UserError(f"the loss on {prefix} is {nats}: the checkpoint's weights are broken", exit_code=1)
    # In proportion: a part of a dataset stands for that part of its text.
    size = None if data.text_bytes is None else data.text_bytes * tokens / data.targets
    return Score(prefix, nats, int(tokens), size, data.component)
