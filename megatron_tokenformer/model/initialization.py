"""Initial values that depend on the seed and the parameter's name alone, never on the layout.

Row i of a parameter is the same number for number on any split and in a model of any height: rows are drawn
in blocks, each from a generator seeded by (seed, name, block).  So a rank draws only the blocks of its own
rows, and a grown model's new rows are those that the taller model would have started with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 64


def normal_rows(seed: int, name: str, rows: range, columns: int, std: float) -> Tensor:
    """Rows `rows` of the endless [., columns] matrix of N(0, std^2) that belongs to (seed, name); fp32."""
    return torch.cat([block for _, block in normal_row_blocks(seed, name, rows, columns, std)])


def normal_row_blocks(
    seed: int, name: str, rows: range, columns: int, std: float
) -> Iterator[tuple[int, Tensor]]:
    """The same rows as (first row, [at most 64, columns]) blocks, one at a time."""
    for block in range(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)):
        start = block * BLOCK_ROWS
        drawn = torch.empty(BLOCK_ROWS, columns, device="cpu", dtype=torch.float32)
        drawn.normal_(std=std, generator=_generator(seed, name, block))
        first, last = max(rows.start, start), min(rows.stop, start + BLOCK_ROWS)
        yield first, drawn[first - start : last - start]


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
