"""A dataset with one marked token, and ways to make the numbers of its sample go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.batches import open_blend
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.model.ends import Embedding
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training import engine
from megatron_tokenformer.training.loop import train
from tests.toy import VOCABULARY

MARK = VOCABULARY - 1
LENGTH = 32
SEED = 1234


def write_marked(folder: Path, position: int, tokens: int = 20_000) -> str:
    """A dataset whose sample at this position of the training order has the token MARK, and no other has."""
    prefix = str(folder / "toy_text_document")
    ids = np.cumsum(np.random.default_rng(0).integers(0, 3, size=tokens)) % MARK
    write(prefix, ids)
    sample = open_blend([(1.0, prefix)], LENGTH, SEED)[position]
    (found,) = (
        i for i in range(0, tokens - LENGTH, LENGTH) if np.array_equal(ids[i : i + LENGTH + 1], sample)
    )
    ids[found + LENGTH // 2] = MARK
    write(prefix, ids)
    return prefix


def write(prefix: str, ids: np.ndarray) -> None:
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).unlink(missing_ok=True)
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    writer.add(ids.astype(np.uint16), np.array([len(ids)]))
    writer.finish()


def inject(kind: str) -> None:
    """Make this process compute wrongly where it meets the mark.

    Args:
        kind: `activations` are infinite; or of a micro-batch the `loss` alone is infinite, its gradient not;
            or the `gradient` alone is; or the loss and its gradient are forty times what they are (`spike`).
    """
    if kind == "activations":
        forward = Embedding.forward

        def broken(self: Embedding, tokens: Tensor) -> Tensor:
            x = forward(self, tokens)
            return x.masked_fill((tokens.t() == MARK).unsqueeze(-1), float("inf"))

        Embedding.forward = broken  # type: ignore[method-assign]
        return
    loss_of = engine.language_model_loss

    def wrong(logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_of(logits, labels)
        if not (labels[0] == MARK).any():
            return loss
        if kind == "gradient" and loss.requires_grad:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return {"loss": loss + float("inf"), "spike": 40.0 * loss}.get(kind, loss)

    engine.language_model_loss = wrong


def train_injected(layout: Layout, config: RunConfig, kind: str) -> Any:
    """Train on this rank with an injection, for `run_ranks`."""
    inject(kind)
    return train(config, layout)
