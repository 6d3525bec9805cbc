"""How a model grows or shrinks: what is new starts as, what becomes of the optimizer, what is neither."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_tokenformer.config.schema import Model, Section, Steps, Tokens
from megatron_tokenformer.errors import UserError

OF_TOKENS = ("keys", "values", "tau", "tau_steps", "old_token_noise")
"""keys of Growth that say what becomes of parameter tokens"""


class Growth(Section):
    """The rule of a growth.  The defaults are exact: the grown model computes what the old one did.

    A Tokenformer grows in tokens, a dense model in width (Net2Net); `widening` is the latter's part of it.
    """

    keys: Literal["zero", "normal"] = "zero"
    """new rows of K; zero keys have no weight until they have learned"""
    values: Literal["normal", "zero"] = "normal"
    """new rows of V"""
    tau: Literal["keep", "anneal", "sqrt"] = "anneal"
    """anneal: from where it is to sqrt(n) over `tau_steps` steps; keep: it stays; sqrt: it jumps at once"""
    tau_steps: Steps | None = None
    """steps of the next stage over which tau is annealed; by default half of them"""
    optimizer: Literal["carry", "reset"] = "carry"
    """carry: old rows keep their Adam moments and the step count, new rows start at zero; reset: all do"""
    old_token_noise: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """standard deviation of normal noise that is added to the old rows of K and V; above 0 is inexact"""
    spread: float = Field(0.5, ge=0.0, allow_inf_nan=False)
    """of a dense model: how unequally weights are shared among the copies of a channel that they read, as a
    standard deviation relative to equal shares; 0 leaves the copies equal for ever"""
    allow_inexact: bool = False
    """grow although the function changes: under score_norm softmax, or to a width that is no multiple"""

    @model_validator(mode="after")
    def _can_work(self) -> Growth:
        if self.keys == self.values == "zero":
            raise ValueError("growth.keys=zero with growth.values=zero never learns; values=normal works")
        if self.tau != "anneal" and self.tau_steps is not None:
            raise ValueError(
                f"growth.tau={self.tau} with growth.tau_steps={self.tau_steps}; "
                f"tau_steps belongs to tau=anneal"
            )
        return self

    def in_a_stage_of(self, steps: int) -> Growth:
        """The same rule with `tau_steps` filled in, for a next stage of so many steps."""
        if self.tau != "anneal" or self.tau_steps is not None:
            return self
        return self.model_copy(update={"tau_steps": max(1, steps // 2)})

    def widening(self) -> Widening:
        """The rule for a dense model.

        Raises:
            UserError: it says something of tokens.
        """
        given = [key for key in OF_TOKENS if key in self.model_fields_set]
        if given:
            raise UserError(
                f"growth.{given[0]} is for parameter tokens, and model.architecture=transformer has none; "
                f"leave it out"
            )
        return Widening(**{key: getattr(self, key) for key in Widening.model_fields})


class Widening(Section):
    """The rule of widening a dense model: copies of channels, and shares of what reads them."""

    spread: float = 0.5
    """as Growth has it"""
    optimizer: Literal["carry", "reset"] = "carry"
    """carry: copies share the moments as they will share gradients, the count goes on; reset: all are 0"""
    allow_inexact: bool = False
    """widen to what is no multiple of the width, too"""


class Shrinking(Section):
    """The rule of taking tokens away: those of least reach go, tau is kept."""

    optimizer: Literal["carry", "reset"] = "carry"
    """carry: rows that stay keep their Adam moments and the step count; reset: all start at zero"""


def check_growth(before: Model, after: Model, growth: Growth) -> None:
    """Refuse what is not growth of tokens, or would change the function without being asked to.

    Raises:
        UserError: names the key and both values.
    """
    _keep_all_but_tokens(before, after, "growth")
    if "spread" in growth.model_fields_set:
        raise UserError("growth.spread is for dense models, and this is a tokenformer; leave it out")
    for key in Tokens.model_fields:
        old, new = getattr(before.tokens, key), getattr(after.tokens, key)
        if new < old:
            raise UserError(
                f"growth takes no tokens away: model.tokens.{key} was {old}, the config has {new}; "
                f"--shrink takes them away, and then no role may grow"
            )
    if before.tokens == after.tokens:
        raise UserError(f"nothing grows: model.tokens stays {dict(before.tokens)}; give more of them")
    if after.score_norm == "softmax" and not growth.allow_inexact:
        raise UserError(
            "under model.score_norm=softmax a new token has weight even with a zero key, so growth changes "
            "the function; allow_inexact accepts that, and the next stage tells the change of the loss"
        )


def check_any_growth(before: Model, after: Model, growth: Growth) -> None:
    """`check_widening` of two dense models, `check_growth` of any others.

    Raises:
        UserError: see there.
    """
    if before.is_dense and after.is_dense:
        check_widening(before, after, growth.widening())
    else:
        check_growth(before, after, growth)


WIDTHS = ("hidden_size", "attention_heads")
"""keys of Model that change when a dense model is widened"""


def check_widening(before: Model, after: Model, rule: Widening) -> None:
    """Refuse what is not growth of a dense model's width, or changes the function without being asked to.

    Raises:
        UserError: names the key and both values.
    """
    if not before.is_dense:
        raise UserError("only dense models are widened; model.architecture=tokenformer grows in tokens")
    for key in Model.model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if key not in WIDTHS and old != new:
            raise UserError(
                f"growth of a dense model keeps model.{key}: it was {old}, the config has {new}; only "
                f"model.hidden_size and model.attention_heads change"
            )
    old, new = before.hidden_size, after.hidden_size
    if new == old:
        raise UserError(f"nothing grows: model.hidden_size stays {old}; give a larger one")
    if new < old:
        raise UserError(f"growth takes no channels away: model.hidden_size was {old}, the config has {new}")
    if before.head_size != after.head_size:
        heads = f"model.attention_heads={new // before.head_size} would work"
        if new % before.head_size:
            heads = f"a model.hidden_size that {before.head_size} divides would work"
        raise UserError(
            f"growth of a dense model keeps the size of a head: it was {before.head_size} "
            f"({old} / {before.attention_heads}), the config has {after.head_size} "
            f"({new} / {after.attention_heads}); {heads}"
        )
    reasons = changes_of_widening(before, after)
    if reasons and not rule.allow_inexact:
        raise UserError(
            f"{reasons[0]}, so the function would change; model.hidden_size={-(-new // old) * old} would be "
            f"exact, and allow_inexact accepts the change, which the next stage tells"
        )


def changes_of_widening(before: Model, after: Model) -> list[str]:
    """Why the wider model does not compute what the old one did; empty if it does, exactly."""
    old, new = before.hidden_size, after.hidden_size
    if new % old == 0:
        return []
    return [f"{new} channels are no multiple of {old}, so LayerNorm counts some more often than others"]


def check_shrink(before: Model, after: Model) -> None:
    """Refuse what is not taking tokens away.

    Raises:
        UserError: names the key and both values.
    """
    _keep_all_but_tokens(before, after, "shrinking")
    for key in Tokens.model_fields:
        old, new = getattr(before.tokens, key), getattr(after.tokens, key)
        if new > old:
            raise UserError(f"shrinking adds no tokens: model.tokens.{key} was {old}, the config has {new}")
    if before.tokens == after.tokens:
        raise UserError(f"nothing shrinks: model.tokens stays {dict(before.tokens)}; give fewer of them")


def changes_of_function(model: Model, growth: Growth) -> list[str]:
    """Why the grown model does not compute what the old one did; empty if it does, exactly.

    Args:
        model: the old or the grown one; they differ in tokens alone.
    """
    reasons = {
        "under score_norm=softmax a new token has weight even with a zero key": model.score_norm == "softmax",
        "keys=normal gives new tokens weight at once": growth.keys == "normal",
        f"noise of {growth.old_token_noise:g} is added to the old tokens": growth.old_token_noise > 0,
        "tau=sqrt scales every weight anew": growth.tau == "sqrt",
    }
    return [reason for reason, holds in reasons.items() if holds]


def check_has_tokens(model: Model, what: str) -> None:
    """Refuse `growth` or `shrinking` of a dense model.

    Raises:
        UserError: it is one.
    """
    if model.is_dense:
        raise UserError(
            f"{what} is for parameter tokens, and model.architecture=transformer has none; a dense model "
            f"only grows in width, to the model.hidden_size of another --config"
        )


def _keep_all_but_tokens(before: Model, after: Model, what: str) -> None:
    check_has_tokens(before, what)
    for key in Model.model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if key != "tokens" and old != new:
            raise UserError(
                f"{what} keeps model.{key}: it was {old}, the config has {new}; only tokens change"
            )
