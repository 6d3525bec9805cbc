"""Bad input: what kinds there are, and how often each was met."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any, NamedTuple

from megatron_tokenformer.errors import UserError

INVALID_UTF8 = "invalid UTF-8"
MALFORMED_JSON = "malformed JSON"
NO_OBJECT = "not a JSON object"
NO_TEXT = "no text"
TEXT_NO_STRING = "text is not a string"
NO_COMPONENT = "no component"
TRUNCATED = "truncated file"
DAMAGED = "damaged file"
UNREADABLE = "unreadable file"


class Problem(NamedTuple):
    """One piece of bad input."""

    kind: str
    """one of this module's constants"""
    message: str
    """file, line and reason"""

    def error(self) -> UserError:
        """The problem as what ends a run."""
        return UserError(self.message, exit_code=1)


class Tally:
    """How often each kind of problem was met, and where first."""

    def __init__(self, counted: dict[str, Any] | None = None) -> None:
        self._counted: dict[str, dict[str, Any]] = deepcopy(counted or {})

    def add(self, problems: Iterable[Problem]) -> None:
        """Count the problems."""
        for kind, message in problems:
            here = self._counted.setdefault(kind, {"count": 0, "first": [message]})
            here["count"] += 1

    def __bool__(self) -> bool:
        return bool(self._counted)

    def as_json(self) -> dict[str, Any]:
        """`{kind: {"count": n, "first": [message]}}`: a list, so that joined datasets keep each part's."""
        return deepcopy(self._counted)

    def lines(self) -> list[str]:
        """One line for each kind, for the terminal."""
        return [
            f"{here['count']:,} x {kind}; first {here['first'][0]}" for kind, here in self._counted.items()
        ]
