"""Configuration of a Tokenformer, or of its dense twin, for transformers.

This file and `modeling_tokenformer.py` lie in the model's folder and need nothing but torch and transformers.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

ARCHITECTURES = ("tokenformer", "transformer")
SCORE_NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
ROLES = ("qkv", "output", "ffn")


class TokenformerConfig(PreTrainedConfig):
    """The network.  The defaults are a 124M Tokenformer.

    Args:
        architecture: `tokenformer` (arXiv 2410.23168), or `transformer`, a dense GPT for comparisons, which
            has neither tokens nor tau nor a score norm.
        tokens: parameter tokens of a layer's Pattentions by role: `qkv` (each of the three), `output`, `ffn`.
        tau: what scales normalised scores, by role.  A number of its own: it starts at the root of the number
            of tokens, and is kept where a model grows.
        score_norm: how scores become weights: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`.
        max_position_embeddings: the sequence length of training; nothing in the model depends on it.
        rotary_fraction: share of each head's channels that is rotated.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    architecture: str = "tokenformer"
    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    tokens: dict[str, int] | None = None
    tau: dict[str, float] | None = None
    score_norm: str | None = None
    max_position_embeddings: int = 1024
    rotary_fraction: float = 0.25
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture is {self.architecture!r}; it is one of {', '.join(ARCHITECTURES)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.is_dense:
            self.tokens = self.tau = self.score_norm = None
        else:
            self.tokens = dict(self.tokens or {"qkv": 576, "output": 576, "ffn": 2304})
            self.tau = {role: math.sqrt(self.tokens[role]) for role in ROLES} | dict(self.tau or {})
            self.score_norm = self.score_norm or SCORE_NORMS[0]
            if self.score_norm not in SCORE_NORMS:
                raise ValueError(f"score_norm is {self.score_norm!r}; it is one of {', '.join(SCORE_NORMS)}")
        super().__post_init__(**kwargs)

    @property
    def is_dense(self) -> bool:
        """Whether its layers are a dense Transformer's."""
        return self.architecture == "transformer"

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Rotated channels of one head: even, at least 2 unless the fraction is 0."""
        return 2 * max(int(self.head_size * self.rotary_fraction) // 2, self.rotary_fraction > 0)
