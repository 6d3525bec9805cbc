"""Exact statistics of document lengths in bounded memory: a count for each length, not the lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np

_SMALL = 1 << 16


class LengthCounts:
    """How many documents have each length.

    Common lengths are counted in an array, those of giants in a dictionary: as a file of T tokens has at most
    T / 65,536 of them, that stays small too.
    """

    def __init__(self) -> None:
        self._small = np.zeros(_SMALL, np.int64)
        self._large: Counter[int] = Counter()

    def add(self, lengths: np.ndarray) -> None:
        """Count [n] lengths in tokens, none of them negative."""
        small = lengths < _SMALL
        self._small += np.bincount(lengths[small], minlength=_SMALL)
        self._large.update(lengths[~small].tolist())

    def summary(self) -> dict[str, float]:
        """`mean`, `median` and `max` in tokens; all 0 without documents."""
        values, counts = self._table()
        total = int(counts.sum())
        if total == 0:
            return {"mean": 0.0, "median": 0.0, "max": 0}
        ranks = np.cumsum(counts)
        # The middle one, or the mean of the middle two.
        middle = np.searchsorted(ranks, [(total - 1) // 2, total // 2], side="right")
        return {
            "mean": int((values * counts).sum()) / total,
            "median": float(values[middle].mean()),
            "max": int(values[-1]),
        }

    def histogram(self) -> list[tuple[int, int, int]]:
        """(least, most, documents) for the lengths 0, 1, 2-3, 4-7, ..., from the first to the last in use."""
        values, counts = self._table()
        if values.size == 0:
            return []
        # frexp gives the bits of an integer below 2^53: 0 -> 0, 1 -> 1, 2 and 3 -> 2, 4 to 7 -> 3.
        bits = np.frexp(values.astype(np.float64))[1]
        sums = np.bincount(bits, weights=counts).astype(np.int64)
        return [
            (1 << bit >> 1, max((1 << bit) - 1, 0), int(sums[bit]))
            for bit in range(int(bits[0]), int(bits[-1]) + 1)
        ]

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths that occur, ascending, and how often."""
        small = np.flatnonzero(self._small)
        large = np.array(sorted(self._large), np.int64)
        counts = np.array([self._large[length] for length in large.tolist()], np.int64)
        return np.concatenate((small, large)), np.concatenate((self._small[small], counts))
