"""What the canonical names of parameters say: `layers.3.attention.query.key_tokens` is a K of role qkv."""

from __future__ import annotations

from megatron_tokenformer.model.tau import ROLES

KEY_TOKENS, VALUE_TOKENS = "key_tokens", "value_tokens"
"""how the names of every K and every V end"""


def is_token(name: str) -> bool:
    """Whether a parameter's rows are parameter tokens."""
    return name.rsplit(".", 1)[-1] in (KEY_TOKENS, VALUE_TOKENS)


def is_key(name: str) -> bool:
    """Whether a parameter is a K."""
    return name.rsplit(".", 1)[-1] == KEY_TOKENS


def values_of(keys: str) -> str:
    """The V of the Pattention that this is the K of."""
    return keys.removesuffix(KEY_TOKENS) + VALUE_TOKENS


def role_of(name: str) -> str:
    """The key of `model.tokens` that counts the rows of this parameter."""
    part = name.split(".")[-2]
    return part if part in ROLES else "qkv"
