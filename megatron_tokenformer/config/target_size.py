"""How large a grown or shrunk model shall be: as token counts by role, or as a number of parameters."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_tokenformer.config.load import validate
from megatron_tokenformer.config.schema import Model, Tokens
from megatron_tokenformer.config.sizes import parameter_count
from megatron_tokenformer.errors import UserError

MULTIPLE = 32
"""token counts chosen here are multiples of this, so that products stay aligned when ranks split them"""

_DIGITS = 30
"""more than any count has; Python itself refuses thousands, with an error of its own"""
_COUNT = re.compile(rf"(\d{{1,{_DIGITS}}}(?:\.\d{{1,{_DIGITS}}})?)([KMB]?)", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(text: str, before: Tokens) -> Tokens:
    """`qkv=2144,output=2144,ffn=8576` as token counts; a role that is left out keeps its tokens.

    Raises:
        UserError: not of this form, an unknown role, one named twice, or a count that is none or too large.
    """
    counts = before.model_dump()
    named: set[str] = set()
    for part in text.split(","):
        role, equals, count = (piece.strip() for piece in part.partition("="))
        number = count.isdecimal() and len(count) <= _DIGITS and int(count) > 0
        if not equals or role not in counts or role in named or not number:
            raise UserError(
                f"--tokens {text}: '{part}' is not a count for a role; write ROLE=COUNT with commas between, "
                f"each ROLE one of {', '.join(counts)} and at most once"
            )
        named.add(role)
        counts[role] = int(count)
    return validate(Tokens, counts, f"--tokens {text}")


def parse_count(text: str) -> int:
    """`757M`, `1.4B` or `756000000` as a number.

    Raises:
        UserError: it is none of these.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"--target-params {text} is not a number of parameters; write one such as 757M or 1.4B"
        )
    return int(Fraction(match[1]) * _FACTORS[match[2].upper()])


def tokens_for(before: Model, parameters: int, shrink: bool = False) -> Tokens:
    """Tokens with which the model has about this many parameters, in the proportions that they have now.

    The role with the fewest tokens gets the nearest multiple of 32, the others follow it, each to the nearest
    multiple of 32, and none loses tokens; or with `shrink` at least 32, and none gains any.

    Raises:
        UserError: the model would not be larger than it is, or with `shrink` smaller; or be larger than any.
    """
    now = parameter_count(before)
    counts = before.tokens.model_dump()
    fewest = min(counts.values())
    fixed = now - sum(_parameters_per_token(before)[role] * count for role, count in counts.items())
    scale = Fraction(max(parameters - fixed, 0), now - fixed)
    least, limit = (MULTIPLE, min) if shrink else (0, max)
    share = Fraction(max(least, _to_multiple(scale * fewest)), fewest)
    if shrink and share >= 1:  # a role of so few tokens cannot lead: each goes its own way
        share = scale
    tokens = {role: limit(count, max(least, _to_multiple(share * count))) for role, count in counts.items()}
    chosen = validate(Tokens, tokens, f"--target-params {parameters:,}")
    after = before.model_copy(update={"tokens": chosen})
    size, what = parameter_count(after), "shrinking" if shrink else "growth"
    if (parameters >= now or size >= now) if shrink else (parameters <= now or size <= now):
        raise UserError(
            f"--target-params {parameters:,} is no {what}: the checkpoint's model has {now:,} parameters, "
            f"and with the nearest multiples of {MULTIPLE} tokens it would have {size:,}"
        )
    return chosen


def _parameters_per_token(model: Model) -> dict[str, int]:
    """Parameters that one more token of a role brings, over all layers."""
    row = 2 * model.hidden_size * model.layers
    return {"qkv": 3 * row, "output": row, "ffn": row}


def _to_multiple(count: Fraction) -> int:
    """The nearest multiple of 32; the larger of two that are as near."""
    return int((count / MULTIPLE + Fraction(1, 2)).__floor__()) * MULTIPLE
