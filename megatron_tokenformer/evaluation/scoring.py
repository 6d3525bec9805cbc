"""How likely given tokens are after others, and what a model writes after them: many at once, in any order.

Batches are as large as memory allows.  Work comes longest first, so that what does not fit is found at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from megatron_tokenformer.data.tokenizers import Tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.generation import Prompt, generate
from megatron_tokenformer.evaluation.perplexity import LOGITS_AT_ONCE
from megatron_tokenformer.evaluation.sampling import Sampling
from megatron_tokenformer.model.language_model import LanguageModel

Work = TypeVar("Work", bound="Window | Writing")
Result = TypeVar("Result")

CPU_TOKENS = 4_096
"""of a batch on a CPU, where more are not faster"""
VALUES_PER_CHANNEL = 64
"""that a token of a batch is first thought to take on a GPU; where it takes more, the batch is halved"""
MOST_TOKENS = 262_144
"""of a batch, beyond which it gains nothing"""


@dataclass(frozen=True)
class Window:
    """Ids that are read once, for the endings that they share."""

    inputs: list[int]
    endings: list[list[int]]
    """ids to score, each predicted by the last so many of the inputs"""

    manner = None

    @property
    def length(self) -> int:
        """Columns that it takes."""
        return len(self.inputs)


@dataclass(frozen=True)
class Writing:
    """Ids to go on from."""

    prompt: Prompt
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]

    @property
    def length(self) -> int:
        """Columns that it takes."""
        return len(self.prompt.ids) + self.max_tokens

    @property
    def manner(self) -> tuple[Sampling, int, tuple[str, ...]]:
        """What those of a batch have in common."""
        return self.sampling, self.max_tokens, self.stops


@dataclass(frozen=True)
class Deadline:
    """When to give up."""

    minutes: float
    """that there were"""
    at: float
    """in time.monotonic()"""

    @classmethod
    def after(cls, minutes: float) -> Deadline:
        """So many minutes from now."""
        return cls(minutes, time.monotonic() + 60.0 * minutes)


@dataclass
class Scorer:
    """A model, and how it is to work."""

    model: LanguageModel
    tokenizer: Tokenizer
    rows: int | None = None
    """of a batch; None: as many as fit"""
    deadline: Deadline | None = None
    """at which it gives up; None: never"""
    shows: bool = True
    """whether a progress bar is shown"""
    _tokens: int = field(default=0, init=False)

    def score(self, windows: Sequence[Window]) -> list[list[tuple[float, bool]]]:
        """Of each ending of each window: the log-probability, and whether all its ids are the likeliest."""
        return self._in_batches(windows, self._score_batch, "score")

    def write(self, work: Sequence[Writing]) -> list[str]:
        """The text of each."""
        return self._in_batches(work, self._write_batch, "write")

    @torch.inference_mode()
    def _score_batch(self, windows: Sequence[Window]) -> list[list[tuple[float, bool]]]:
        device, width = self.model.embedding.weight.device, max(window.length for window in windows)
        # On the right, where a causal model does not see it.
        padded = [window.inputs + [0] * (width - window.length) for window in windows]
        hidden = self.model.hidden(torch.tensor(padded, device=device))  # [s, b, d]
        where, rows, targets = list[int](), list[int](), list[int]()
        for row, window in enumerate(windows):
            for ending in window.endings:
                where += range(window.length - len(ending), window.length)
                rows += [row] * len(ending)
                targets += ending
        wanted = torch.tensor(targets, device=device)
        found = iter(zip(*(part.tolist() for part in self._log_likelihoods(hidden[where, rows], wanted))))
        return [[_summed([next(found) for _ in ending]) for ending in window.endings] for window in windows]

    def _log_likelihoods(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of targets [n] after [n, d]: log-probabilities in fp64, and whether nothing was likelier."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.embedding.weight.shape[0])
        losses, likeliest = [], []
        for x, wanted in zip(hidden.split(at_once), targets.split(at_once)):
            logits = self.model.embedding.logits(x).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            likeliest.append(logits.argmax(-1) == wanted)
        return -torch.cat(losses).double(), torch.cat(likeliest)

    def _write_batch(self, work: Sequence[Writing]) -> list[str]:
        prompts = [one.prompt for one in work]
        written = generate(self.model, self.tokenizer, prompts, *work[0].manner)
        return [text.text for text in written]

    def _in_batches(
        self, work: Sequence[Work], act: Callable[[Sequence[Work]], list[Result]], name: str
    ) -> list[Result]:
        results: list[Result] = []
        with tqdm(total=len(work), unit="request", desc=name, disable=None if self.shows else True) as bar:
            while len(results) < len(work):
                if self.deadline is not None and time.monotonic() > self.deadline.at:
                    raise UserError(
                        f"the evaluation takes longer than {self.deadline.minutes:g} minutes: "
                        f"{len(results):,} of {len(work):,} requests to {name} are done",
                        exit_code=1,
                    )
                batch = self._next_batch(work, len(results))
                try:
                    results += act(batch)
                except torch.OutOfMemoryError:
                    self._halve(batch)
                    continue
                bar.update(len(batch))
        return results

    def _next_batch(self, work: Sequence[Work], start: int) -> Sequence[Work]:
        """Alike pieces from `start` on, as many as are to be done at once."""
        self._tokens = self._tokens or self._first_guess()
        first = work[start]
        rows = self.rows or max(1, self._tokens // first.length)
        return [*takewhile(lambda piece: piece.manner == first.manner, work[start : start + rows])]

    def _first_guess(self) -> int:
        """Tokens of a batch, by the memory that is free."""
        weight = self.model.embedding.weight
        if weight.device.type != "cuda":
            return CPU_TOKENS
        free, _ = torch.cuda.mem_get_info(weight.device)
        fit = free // (VALUES_PER_CHANNEL * weight.shape[1] * weight.element_size())
        return max(1, min(fit, MOST_TOKENS))

    def _halve(self, batch: Sequence[Work]) -> None:
        if len(batch) == 1 or self.rows:
            smaller = "" if len(batch) == 1 else "; a smaller --batch-size, or auto, may"
            raise UserError(
                f"{len(batch)} x {batch[0].length} tokens do not fit into the device's memory{smaller}", 1
            )
        torch.cuda.empty_cache()
        self._tokens = len(batch) * batch[0].length // 2


def _summed(found: list[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(likelihood for likelihood, _ in found), all(likeliest for _, likeliest in found)
