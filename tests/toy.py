"""A dataset and a run small enough for a test, and a few ways to look at a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tokenformer.config.load import merge, validate
from megatron_tokenformer.config.schema import RunConfig
from megatron_tokenformer.data.indexed import TokenFileWriter
from megatron_tokenformer.parallel.layout import Layout
from megatron_tokenformer.training.loop import train

VOCABULARY = 64
DENSE = {"architecture": "transformer", "tokens": None}
"""what makes the toy's model a dense one"""


def write_tokens(folder: Path, name: str = "toy", tokens: int = 40_000, seed: int = 0) -> str:
    """Write a dataset with something to learn (steps of 0, 1 or 2 around a circle); return its prefix."""
    prefix = str(folder / f"{name}_text_document")
    steps = np.random.default_rng(seed).integers(0, 3, size=tokens)
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    writer.add((np.cumsum(steps) % VOCABULARY).astype(np.uint16), np.diff([*range(0, tokens, 100), tokens]))
    writer.finish()
    return prefix


def write_documents(
    folder: Path, name: str, documents: int = 1_000, longest: int = 20, seed: int = 0, eod_id: int = 0
) -> str:
    """Write described documents of 1 to `longest` tokens, each ended by `eod_id`; return their prefix."""
    prefix = str(folder / f"{name}_text_document")
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, size=documents)
    tokens = 1 + np.cumsum(random.integers(0, 3, size=lengths.sum())) % (VOCABULARY - 1)
    tokens[np.cumsum(lengths) - 1] = eod_id
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    writer.add(tokens.astype(np.uint16), lengths)
    writer.finish()
    tokenizer = {"type": "none", "fingerprint": "none", "vocab_size": VOCABULARY, "eod_id": eod_id}
    counts = {"documents": documents, "tokens": len(tokens), "append_eod": True}
    Path(f"{prefix}.json").write_text(json.dumps({**counts, "tokenizer": tokenizer}))
    return prefix


def toy_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of a two-layer model in `folder`, with changes by section."""
    prefix = folder / "toy_text_document"
    if not prefix.with_suffix(".idx").exists():
        write_tokens(folder)
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "layers": 2,
            "hidden_size": 32,
            "attention_heads": 4,
            "tokens": {"qkv": 16, "output": 16, "ffn": 64},
            "vocab_size": VOCABULARY,
            "rotary_fraction": 0.5,
        },
        "data": {"train": str(prefix), "validation": str(prefix), "sequence_length": 32},
        "optimizer": {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 2},
        "training": {
            "steps": 10,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "precision": "fp32",
            "log_interval": 1,
            "eval_interval": 0,
            "eval_steps": 2,
        },
        "checkpoint": {"interval": 0},
    }
    return validate(RunConfig, merge(tree, sections), "toy")


def train_toy(layout: Layout, config: RunConfig) -> None:
    """Train on this rank, for `run_ranks`."""
    train(config, layout)
