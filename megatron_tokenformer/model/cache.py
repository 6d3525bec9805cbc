"""What a model has read, kept as keys and values, so that each next token costs one position.

A batch of prompts of unequal length is padded on the left.  Each row has its own first column, and positions
count from there: padding turns no rotary angle, and no token attends to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tokenformer.model.attention import rotate


class Cache:
    """What has been read of each row; handed to `LanguageModel.hidden` with the tokens that come next.

    Args:
        starts: [b], the column of each row's first token; those before it are padding.
        capacity: columns that will be read in all.
        layers: of the model.
    """

    def __init__(self, starts: Tensor, capacity: int, layers: int) -> None:
        self.starts, self.capacity, self.length = starts, capacity, 0
        self.pasts = [Past(self) for _ in range(layers)]
        self._padded = bool(starts.any())
        self.positions = torch.empty(0)
        self.mask: Tensor | None = None

    def read(self, columns: int) -> list[Past]:
        """Make room for so many more columns; what each layer attends to.

        Raises:
            ValueError: they are more than the capacity.
        """
        first, self.length = self.length, self.length + columns
        if self.length > self.capacity:
            raise ValueError(f"{self.length} columns in a cache of {self.capacity}")
        here = torch.arange(first, self.length, device=self.starts.device)
        self.positions = (here - self.starts.unsqueeze(1)).clamp(min=0)  # [b, s]
        self.mask = self._visible(here) if self._padded or 0 < first < self.length - 1 else None
        return self.pasts

    def _visible(self, queries: Tensor) -> Tensor:
        """[b, 1, s (query), columns (key)] booleans; padding sees itself: a row that sees nothing is NaN."""
        keys, queries = torch.arange(self.length, device=queries.device), queries.unsqueeze(-1)
        real = (self.starts[:, None, None] <= keys) & (keys <= queries)
        return (real | (keys == queries)).unsqueeze(1)


class Past:
    """The keys, rotated, and values that one layer has seen, [b, h, capacity, c] each."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._keys = self._values = torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rotary_size: int) -> Tensor:
        """Attention of new columns to themselves and all before: q, k, v [b, h, s, c] to [b, h, s, c]."""
        cache = self._cache
        first, end = cache.length - query.shape[-2], cache.length
        if first == 0:
            shape = (*key.shape[:2], cache.capacity, key.shape[-1])
            self._keys, self._values = key.new_empty(shape), value.new_empty(shape)
        query, key = (rotate(x, rotary_size, cache.positions, length=cache.capacity) for x in (query, key))
        self._keys[:, :, first:end], self._values[:, :, first:end] = key, value
        seen = self._keys[:, :, :end], self._values[:, :, :end]
        causal = cache.mask is None and first == 0
        return F.scaled_dot_product_attention(query, *seen, attn_mask=cache.mask, is_causal=causal)
