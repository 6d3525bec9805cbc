"""Small models and tokenizers for the tests of what is made of text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tokenformer.config.load import merge
from megatron_tokenformer.config.schema import Model, RunConfig
from megatron_tokenformer.data.tokenizers import ByteTokenizer
from megatron_tokenformer.model.language_model import LanguageModel, initialize
from megatron_tokenformer.parallel.collectives import TensorParallel
from tests.descriptions import describe
from tests.ranks import run_ranks
from tests.toy import toy_config, train_toy

BYTE_RECORD = {"type": "ByteTokenizer", "fingerprint": ByteTokenizer.fingerprint, "vocab_size": 257}
VOCABULARY = 260  # of bytes, an end of document, and rows that no id has


def byte_model(dense: bool = False, seed: int = 5, **changes: Any) -> LanguageModel:
    """A model of bytes that is sure of little, and whose layers all have a say."""
    tokens = {"qkv": 16, "output": 16, "ffn": 64}
    tree: dict[str, Any] = {
        "layers": 3,
        "hidden_size": 32,
        "attention_heads": 4,
        "vocab_size": VOCABULARY,
        "rotary_fraction": 0.5,
        **({"architecture": "transformer"} if dense else {"tokens": tokens}),
    }
    config = Model.model_validate({**tree, **changes})
    model = LanguageModel(config)
    initialize(model, config, seed, TensorParallel())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4.0
    return model.requires_grad_(False).eval()


def plain_logits(model: LanguageModel, ids: list[int]) -> Tensor:
    """What follows each of some ids, [s, v], without any cache or padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[:, 0]


def train_on_text(
    folder: Path, texts: str, tensor: int = 1, pipeline: int = 1, **sections: dict[str, Any]
) -> RunConfig:
    """A few steps on the bytes of a text, by so many ranks; the run's config."""
    prefix = write_text(folder, texts)
    tree: dict[str, Any] = {
        "model": {"vocab_size": VOCABULARY},
        "data": {"train": prefix, "validation": prefix, "tokenizer": {"type": "ByteTokenizer"}},
        "parallel": {"tensor": tensor, "pipeline": pipeline},
        "training": {"steps": 4, "micro_batch_size": 4},
    }
    config = toy_config(folder, **merge(tree, sections))
    run_ranks(tensor * pipeline, train_toy, config, tensor=tensor, pipeline=pipeline)
    return config


def write_text(folder: Path, text: str) -> str:
    """A described dataset of the bytes of a text; its prefix."""
    import numpy as np

    from megatron_tokenformer.data.indexed import TokenFileWriter

    prefix = str(folder / "text_text_document")
    ids = np.array([*text.encode(), 256], dtype=np.uint16)
    writer = TokenFileWriter(prefix, np.dtype("uint16"))
    writer.add(ids, np.array([len(ids)]))
    writer.finish()
    return describe(prefix, tokenizer={**BYTE_RECORD, "model": None, "eod_id": 256})


def sentencepiece_model(folder: Path) -> str:
    """The file of a small SentencePiece tokenizer with bytes for what it does not know."""
    from sentencepiece import SentencePieceTrainer

    texts = ["the cat sat on the mat", "a dog and a cat", "hello there world", "the world is round"] * 5
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "small.model"
    path.write_bytes(written.getvalue())
    return str(path)


def byte_level_bpe(folder: Path) -> str:
    """The file of a small byte-level BPE tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), Decoder()
    trainer = BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, hello there"] * 5, trainer)
    path = folder / "small.json"
    tokenizer.save(str(path))
    return str(path)


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
