"""How a model grows or shrinks: what new tokens start as, what becomes of the optimizer, what is neither."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_tokenformer.config.schema import Model, Section, Steps, Tokens
from megatron_tokenformer.errors import UserError


class Growth(Section):
    """The rule of a growth.  The defaults are exact: the grown model computes what the old one did."""

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
    allow_inexact: bool = False
    """grow under score_norm softmax too, where the function always changes"""

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
    for key in Tokens.model_fields:
        old, new = getattr(before.tokens, key), getattr(after.tokens, key)
        if new < old:
            raise UserError(
                f"growth takes no tokens away: model.tokens.{key} was {old}, the config has {new}; "
                f"--shrink does, from roles that then may not grow"
            )
    if before.tokens == after.tokens:
        raise UserError(f"nothing grows: model.tokens stays {dict(before.tokens)}; give more of them")
    if after.score_norm == "softmax" and not growth.allow_inexact:
        raise UserError(
            "under model.score_norm=softmax a new token has weight even with a zero key, so growth changes "
            "the function; allow_inexact accepts that, and the next stage tells the change of the loss"
        )


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
            f"{what} is of parameter tokens, and model.architecture=transformer has none; "
            f"a checkpoint of architecture tokenformer would work"
        )


def _keep_all_but_tokens(before: Model, after: Model, what: str) -> None:
    check_has_tokens(before, what)
    for key in Model.model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if key != "tokens" and old != new:
            raise UserError(
                f"{what} keeps model.{key}: it was {old}, the config has {new}; only tokens change"
            )
