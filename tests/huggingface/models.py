"""Models of every kind that are small enough to export in a moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_tokenformer.checkpoint.manifest import read_manifest
from megatron_tokenformer.checkpoint.portable import PortableModel, write_native
from megatron_tokenformer.config.schema import Model, Tokenizer
from megatron_tokenformer.evaluation.load import load_model
from megatron_tokenformer.model.language_model import LanguageModel, full_shapes

VOCABULARY = 64
SCORE_NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
KINDS = (*SCORE_NORMS, "transformer")


@dataclass(frozen=True)
class Pair:
    """A model, exported, and loaded natively."""

    portable: PortableModel
    folder: Path
    native: LanguageModel

    def load(self, **options: Any) -> PreTrainedModel:
        """As anybody would load it."""
        return load_hf(self.folder, **options)

    def logits(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """The native model's, [b, s, v]."""
        return self.native(ids, positions).transpose(0, 1)


def load_hf(folder: Path, **options: Any) -> PreTrainedModel:
    """A folder through the class that picks classes."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def portable_model(
    kind: str, tokenizer: Tokenizer | None = None, vocabulary: int = VOCABULARY
) -> PortableModel:
    """Two layers of random numbers, large enough to show in the logits; tau as after a growth."""
    of_kind: dict[str, Any] = {"architecture": kind}
    if kind != "transformer":
        of_kind = {"tokens": {"qkv": 16, "output": 12, "ffn": 40}, "score_norm": kind}
    model = Model(
        **of_kind, layers=2, hidden_size=32, attention_heads=4, vocab_size=vocabulary, rotary_fraction=0.5
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 0.3 * torch.randn(shape, generator=generator) for name, shape in full_shapes(model).items()
    }
    taus = {} if model.is_dense else {"qkv": math.sqrt(13), "output": 3.0, "ffn": math.sqrt(31)}
    readers = {name: tensor.clone for name, tensor in tensors.items()}
    return PortableModel(model, 48, taus, readers, tokenizer)


def native_model(portable: PortableModel, folder: Path) -> LanguageModel:
    """The model as evaluation loads it: written as a checkpoint, and read."""
    path = write_native(portable, folder)
    return load_model(path, read_manifest(path), "fp32", torch.device("cpu"))


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_same(logits: Tensor, expected: Tensor) -> None:
    """Logits are the same in fp32: to 1e-5 of the largest, or of 1."""
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5 * size)
