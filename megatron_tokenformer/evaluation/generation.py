"""Text that a model writes after prompts: a forward pass for a batch of prompts, then one for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_tokenformer.data.tokenizers import Tokenizer
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.sampling import Sampling, choose, penalise
from megatron_tokenformer.evaluation.text_stream import TextStream
from megatron_tokenformer.model.cache import Cache
from megatron_tokenformer.model.language_model import LanguageModel

Finish = Literal["end of document", "stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What is to be gone on from."""

    ids: list[int]
    """at least one"""
    seed: tuple[int, ...] = (0,)
    """of the draws for this one: equal seeds and prompts give equal texts, in whatever batch"""


@dataclass(frozen=True)
class Written:
    """What came."""

    text: str
    ids: list[int]
    """without the end of the document"""
    finish: Finish


class PromptEncoder:
    """Texts to the ids of a document that goes on: without the end that a tokenizer's template may add."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._after = int(tokenizer.encode("a")[-1] == tokenizer.eod_id)
        empty = tokenizer.encode("")
        self.before = empty[: len(empty) - self._after]
        """what the template puts before every text"""

    def __call__(self, text: str) -> list[int]:
        """The ids of a text; of an empty one, the end of the document before it."""
        return self.continuing(text) or [self._tokenizer.eod_id]

    def continuing(self, text: str) -> list[int]:
        """The ids of a text, none of an empty one."""
        ids = self._tokenizer.encode(text)
        return ids[: len(ids) - self._after]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling = Sampling(),
    max_tokens: int = 128,
    stops: Sequence[str] = (),
    show: Callable[[int, str], None] = lambda row, text: None,
) -> list[Written]:
    """Go on from a batch of prompts, each as if it were alone.

    Args:
        max_tokens: of each text, unless the document ends before or a stop text comes.
        show: called with the number of a prompt and the text that is new, as it comes.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    rows = [_Row(tokenizer, prompt, stops) for prompt in prompts]
    device = model.embedding.weight.device
    tokens, starts = padded_left([prompt.ids for prompt in prompts], device)
    cache = Cache(starts, tokens.shape[1] + max_tokens, len(model.layers))
    seen = _seen(prompts, model.embedding.weight.shape[0], device)
    for _ in range(max_tokens):
        # The head's rows that no token has are there for the sake of the ranks: never choose one.
        logits = next_logits(model, tokens, cache)[:, : tokenizer.vocab_size]
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are NaN or infinite: the checkpoint's weights are broken", exit_code=1
            )
        if sampling.repetition_penalty != 1.0:
            logits = penalise(logits, seen[:, : tokenizer.vocab_size], sampling.repetition_penalty)
        draws = torch.tensor([row.draw() for row in rows], dtype=torch.float64, device=device)
        tokens = choose(logits, sampling, draws).unsqueeze(1)
        seen.scatter_(1, tokens, True)
        for number, (row, token) in enumerate(zip(rows, tokens[:, 0].tolist())):
            row.take(token, partial(show, number))
        if all(row.finish for row in rows):
            break
    return [row.written(partial(show, number)) for number, row in enumerate(rows)]


def next_logits(model: LanguageModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Read the next columns, ids [b, s]; the logits of what follows the last of them, fp32 [b, v]."""
    return model.embedding.logits(model.hidden(tokens, cache=cache)[-1:])[0].float()


def padded_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids that end in the same column, [b, s], and the column in which each row begins, [b]."""
    width = max(map(len, rows))
    starts = [width - len(row) for row in rows]
    ids = [[0] * start + list(row) for start, row in zip(starts, rows)]
    return torch.tensor(ids, device=device), torch.tensor(starts, device=device)


def _seen(prompts: Sequence[Prompt], vocab_size: int, device: torch.device) -> Tensor:
    """Which tokens are in each prompt, [b, v] booleans."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in zip(seen, prompts):
        row[prompt.ids] = True
    return seen.to(device)


class _Row:
    """One prompt's text on its way."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, stops: Sequence[str]) -> None:
        self._stream, self._eod_id = TextStream(tokenizer, prompt.ids, stops), tokenizer.eod_id
        self._random = np.random.default_rng(prompt.seed)
        self._ids, self._text = list[int](), ""
        self.finish: Finish | None = None

    def draw(self) -> float:
        return self._random.random()

    def take(self, token: int, show: Callable[[str], None]) -> None:
        """The next token, unless the text has ended."""
        if self.finish:
            return
        if token == self._eod_id:
            self.finish = "end of document"
            return
        self._ids.append(token)
        self._say(self._stream.push(token), show)
        if self._stream.stopped:
            self.finish = "stop"

    def written(self, show: Callable[[str], None]) -> Written:
        """All of it; shows what was held back."""
        self._say(self._stream.end(), show)
        return Written(self._text, self._ids, "stop" if self._stream.stopped else self.finish or "length")

    def _say(self, text: str, show: Callable[[str], None]) -> None:
        self._text += text
        if text:
            show(text)
