"""Many processes that work for one: the main rank asks, all do their part, each with the whole model.

Only the main rank knows what it is all for.  So tasks are read once, and what it makes of the answers cannot
differ between ranks.  Whatever goes wrong anywhere ends the work on every rank, with the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.scoring import Scorer, Window, Writing

Result = TypeVar("Result")
Kind = Literal["score", "write"]


class RankPool:
    """The scorers of all ranks.

    Args:
        scorer: this rank's.
        rank: this one, of `size`.
        convert: makes words of what goes wrong on one rank; by default a bug stays a bug.
    """

    def __init__(
        self,
        scorer: Scorer,
        rank: int = 0,
        size: int = 1,
        convert: Callable[[Exception], UserError] | None = None,
    ) -> None:
        self.scorer, self.rank, self.size, self._convert = scorer, rank, size, convert

    def ask(self, kind: Kind, work: Sequence[Window] | Sequence[Writing]) -> list[Any]:
        """On the main rank: have this done, and get the results in order.

        Raises:
            UserError: a rank could not; on every rank.
        """
        if self.size == 1:
            return self._part(kind, work)
        self._tell("work", kind, work)
        return self._together(kind, work)

    def work(self) -> None:
        """On the others: do what the main rank asks for, until it needs no more.

        Raises:
            UserError: something went wrong, here or elsewhere; on every rank.
        """
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0)
            what, *about = told[0]
            if what == "done":
                return
            if what == "failed":
                raise UserError(about[0], exit_code=about[1], everywhere=True)
            self._together(*about)

    def run(self, act: Callable[[], Result]) -> Result | None:
        """Act on the main rank, while the others work for it; what it returns, there.

        Raises:
            UserError: something went wrong anywhere; on every rank.
        """
        if self.rank:
            self.work()
            return None
        try:
            with in_words_of(self._convert):
                result = act()
        except UserError as error:
            if not error.everywhere:  # else it has ended on the others, too
                self._tell("failed", str(error), error.exit_code)
                error.everywhere = self.size > 1
            raise
        self._tell("done")
        return result

    def _tell(self, *told: Any) -> None:
        if self.size > 1:
            dist.broadcast_object_list([told], src=0)

    def _together(self, kind: Kind, work: Sequence[Window] | Sequence[Writing]) -> list[Any]:
        from megatron_tokenformer.parallel.layout import on_all_ranks

        # Every so many-th: pieces come longest first, so that ranks have about the same to do.
        parts = on_all_ranks(lambda: self._part(kind, work[self.rank :: self.size]))
        results: list[Any] = [None] * len(work)
        for rank, part in enumerate(parts):
            results[rank :: self.size] = part
        return results

    def _part(self, kind: Kind, work: Sequence[Any]) -> list[Any]:
        with in_words_of(self._convert):
            return self.scorer.score(work) if kind == "score" else self.scorer.write(work)


@contextmanager
def in_words_of(convert: Callable[[Exception], UserError] | None) -> Iterator[None]:
    """Make words of what goes wrong; without `convert` a bug stays a bug."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if convert is None:
            raise
        raise convert(error) from error


def in_short(error: Exception) -> str:
    """What an error of somebody else's code says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
