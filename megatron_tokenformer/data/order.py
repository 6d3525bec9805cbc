"""Which sample comes when: a pure function of the position, the weights and the seed.

Two rules, both constant in time and memory, so that nothing has to be built, cached or shared at the start:
the windows of a source are visited in the order of a seeded bijection per epoch (`permute`), and a
blend of sources follows one table of 65,536 places that repeats for ever (`BlendTable`).
Changing either rule changes what every resumed run sees next; the tests pin the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from megatron_tokenformer.errors import UserError

BLOCK = 65_536
_ROUNDS = 6
_MASK = (1 << 64) - 1
# The multiplier and shifts of splitmix64's finaliser (Steele, Lea and Flood 2014), a strong cheap mixer.
_MULTIPLIER = 0xBF58476D1CE4E5B9


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where the seeded bijection of epoch `epoch` sends `index`; both lie in `range(size)`.

    A Feistel network on the smallest power of two that holds `size`, walked along its cycle until it is
    back inside `range(size)` (Black and Rogaway 2002): under two walks on average (a few more for sizes
    below 8), a few microseconds, no table.

    Raises:
        ValueError: `index` is not in `range(size)`.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    # Four bits at least: on fewer the halves are too small to shuffle anything.
    bits = max(4, (size - 1).bit_length())
    low_bits = bits // 2
    high_bits = bits - low_bits
    keys = _round_keys(seed, epoch)
    while True:
        high, low = index >> low_bits, index & ((1 << low_bits) - 1)
        width, other_width = high_bits, low_bits
        for key in keys:
            mixed = ((low ^ key) * _MULTIPLIER) & _MASK
            mixed = ((mixed ^ (mixed >> 29)) * _MULTIPLIER) & _MASK
            # The halves trade places, so their widths do; an even number of rounds restores them.
            high, low = low, high ^ ((mixed >> 32) & ((1 << width) - 1))
            width, other_width = other_width, width
        index = (high << low_bits) | low
        if index < size:
            return index


@lru_cache(maxsize=1024)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def apportion(weights: Sequence[float], places: int = BLOCK) -> list[int]:
    """Share `places` among the weights by largest remainder, at least one place each.

    In exact fractions, so that every machine shares alike.  Each count is less than one place away from its
    exact share, unless some weights are so small that they are rounded up to one place: the largest sources
    give those.

    Raises:
        UserError: no weights, more weights than places, or a weight that is not a positive finite number.
    """
    if not weights:
        raise UserError("a blend needs at least one source")
    if len(weights) > places:
        raise UserError(f"a blend of {len(weights)} sources; at most {places} are possible")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"blend weight {weight} is not a positive number; leave such a source out")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    quotas = [weight * places / total for weight in exact]
    counts = [max(1, math.floor(quota)) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda s: counts[s] - quotas[s])
    for source in by_remainder[: max(0, places - sum(counts))]:
        counts[source] += 1
    for _ in range(sum(counts) - places):
        counts[counts.index(max(counts))] -= 1
    return counts


class BlendTable:
    """The deterministic rule of a blend: position -> (source, index within the source).

    `counts[s]` of every block of 65,536 positions belong to source `s`, spread evenly: place `j` of a
    source wants to sit at `(j + 1/2) / counts[s]` of the block, and the wishes are sorted.  After any number
    `p` of positions a source among `k` has had `p * counts[s] / 65536` of them, within
    `1 + k * counts[s] / 65536`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = apportion(weights)
        sources = np.repeat(np.arange(len(self.counts)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        wishes = (2 * ranks + 1) / (2 * np.asarray(self.counts)[sources])
        places = np.lexsort((sources, wishes))
        self._sources = sources[places].astype(np.int32)
        self._ranks = ranks[places].astype(np.int32)

    def locate(self, position: int) -> tuple[int, int]:
        """The source at `position` (0, 1, ...) and how many earlier positions were the same source's.

        Raises:
            ValueError: a negative position.
        """
        if position < 0:
            raise ValueError(f"position {position} is negative")
        block, place = divmod(position, BLOCK)
        source = int(self._sources[place])
        return source, block * self.counts[source] + int(self._ranks[place])
