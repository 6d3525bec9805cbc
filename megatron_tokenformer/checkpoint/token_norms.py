"""Norms of parameter tokens, from the bytes of a checkpoint as they are read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_tokenformer.checkpoint.manifest import WEIGHT, Shard
from megatron_tokenformer.checkpoint.shards import check_header
from megatron_tokenformer.model.names import is_key, is_token, role_of
from megatron_tokenformer.model.tau import ROLES


class TokenNorms:
    """Sums of squares of every row of K and V, from pieces of the flattened parameters in any order.

    Args:
        shapes: of the model, by canonical name.
        exact: sum in fp64.  In fp32, which is faster, the last digits depend on how rows are cut.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], exact: bool = False) -> None:
        self._exact = exact
        self._width = {name: shape[1] for name, shape in shapes.items() if is_token(name)}
        self._squares = {name: np.zeros(shapes[name][0]) for name in self._width}

    def add(self, name: str, first: int, values: np.ndarray) -> None:
        """Elements [first, first + len(values)) of a parameter, fp32; what is not K or V is passed over."""
        if name not in self._width:
            return
        width, squares = self._width[name], self._squares[name]
        values = values.astype(np.float64) if self._exact else values
        row, within = divmod(first, width)
        head = min(-within % width, len(values))
        rows = (len(values) - head) // width
        tail = head + rows * width
        if head:
            squares[row] += np.dot(values[:head], values[:head])
            row += 1
        whole = values[head:tail].reshape(rows, width)
        squares[row : row + rows] += np.einsum("ij,ij->i", whole, whole)
        if tail < len(values):
            squares[row + rows] += np.dot(values[tail:], values[tail:])

    def of(self, name: str) -> np.ndarray:
        """The norm of each row of a parameter, fp64 [rows]."""
        return np.sqrt(self._squares[name])

    def means(self, old_rows: dict[str, int], read: bool) -> dict[str, dict[str, float | None]]:
        """By role, the mean norms of `old_keys`, `new_keys`, `old_values`, `new_values` over all layers.

        Args:
            old_rows: of each parameter in the old model.
            read: whether the old rows were added; else they have no mean.

        Returns:
            None for what has no rows, or was not read.
        """
        norms: dict[str, dict[str, list[np.ndarray]]] = {role: {} for role in ROLES}
        for name in self._squares:
            rows, kind = self.of(name), "keys" if is_key(name) else "values"
            old = norms[role_of(name)].setdefault(f"old_{kind}", [])
            new = norms[role_of(name)].setdefault(f"new_{kind}", [])
            old += [rows[: old_rows[name]]] if read else []
            new.append(rows[old_rows[name] :])
        return {role: {key: mean(parts) for key, parts in each.items()} for role, each in norms.items()}


class ShardReader:
    """Takes the bytes of a shard in order and hands the weights among them to a TokenNorms.

    Raises:
        UserError: the shard's header is not what the manifest says.
    """

    def __init__(self, path: Path, shard: Shard, states: list[str], norms: TokenNorms) -> None:
        self._norms, self._place = norms, 0
        starts = check_header(path, shard, states)
        self._weights = [(starts[part.key(WEIGHT)], part) for part in shard.intervals if is_token(part.name)]

    def take(self, block: memoryview) -> None:
        """The next bytes of the file."""
        end = self._place + len(block)
        for start, interval in self._weights:
            stop = start + 4 * (interval.stop - interval.start)
            first, last = max(start, self._place), min(stop, end)
            if first < last:
                values = np.frombuffer(block[first - self._place : last - self._place], dtype="<f4")
                self._norms.add(interval.name, interval.start + (first - start) // 4, values)
        self._place = end


def mean(parts: list[np.ndarray]) -> float | None:
    """Of all elements; None if there are none."""
    rows = np.concatenate(parts) if parts else np.empty(0)
    return float(rows.mean()) if len(rows) else None
