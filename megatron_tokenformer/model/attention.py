"""Causal self-attention of heads, and the layer's attention whose four projections are Pattentions.

Under tensor parallelism tokens are split inside the projections and heads inside the attention itself, so
a layer changes from the one to the other and back:

    x ->(copy | gather) q, k, v scores ->(sum) weights -> partial q, k, v ->(scatter onto heads)
      -> attention of local heads ->(gather heads) output scores ->(sum) weights -> partial output
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_tokenformer.config.schema import Model
from megatron_tokenformer.model.pattention import Pattention, partials
from megatron_tokenformer.parallel.collectives import TensorParallel, gather_from_ranks, scatter_sum

if TYPE_CHECKING:
    from megatron_tokenformer.model.cache import Past


class Attention(nn.Module):
    """Multi-head causal attention, [s, b, d] to this rank's part of [s, b, d]."""

    def __init__(self, model: Model, ranks: TensorParallel, recompute_scores: bool = False) -> None:
        super().__init__()
        d, tokens = model.hidden_size, model.tokens
        self.ranks, self.head_size, self.rotary_size = ranks, model.head_size, model.rotary_size

        def projection(n: int) -> Pattention:
            return Pattention(d, d, n, model.score_norm, ranks, recompute_scores)

        self.query, self.key, self.value = (projection(tokens.qkv) for _ in range(3))
        self.output = projection(tokens.output)

    def forward(self, x: Tensor, positions: Tensor | None = None, past: Past | None = None) -> Tensor:
        """Attend to earlier positions: all of them, or with `positions` [b, s] those of the same document."""
        parts = partials(x, (self.query, self.key, self.value))  # one sum of totals for the three
        if self.ranks.size > 1:  # and one scatter onto this rank's heads
            parts = scatter_sum(torch.stack(parts, dim=2), self.ranks, dim=-1).unbind(2)  # [s, b, 3, d/p]
        query, key, value = parts
        context = attend(query, key, value, self.head_size, self.rotary_size, positions, past)
        return self.output.partial(gather_from_ranks(context, self.ranks, dim=-1))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    rotary_size: int,
    positions: Tensor | None,
    past: Past | None = None,
) -> Tensor:
    """Causal attention of this rank's heads: q, k, v, [s, b, d/p] each, to [s, b, d/p].

    Args:
        rotary_size: channels of a head that are rotated.
        positions: [b, s], where documents do not see each other; see `rotate` and `same_document`.
        past: what was read before, to attend to as well, and which then holds these too.
    """
    query, key, value = (
        part.unflatten(-1, (-1, head_size)).permute(1, 2, 0, 3) for part in (query, key, value)
    )
    if past is None:
        query, key = (rotate(heads, rotary_size, positions) for heads in (query, key))
        mask = None if positions is None else document_mask(positions, query.dtype)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    else:
        context = past.attend(query, key, value, rotary_size)
    return context.permute(2, 0, 1, 3).flatten(start_dim=2)  # [b, h/p, s, c] -> [s, b, d/p]


_masks = WeakTensorKeyDictionary()


@torch.compiler.disable
def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where `same_document` is true, else minus infinity.

    Made once for a micro-batch, and kept as long as the tensor of its positions, which nobody may change:
    every layer keeps the mask for backward, and it has the sequence's length squared.  A layer that is
    computed again (training.recompute=layer) gets another tensor, and makes a mask of its own.
    """
    mask: Tensor | None = _masks.get(positions)
    if mask is None or mask.dtype != dtype:
        with torch.inference_mode(False):  # whoever comes first, training can use it
            hidden = ~same_document(positions)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            mask.masked_fill_(hidden, -torch.inf)
        _masks[positions] = mask
    return mask


def same_document(positions: Tensor) -> Tensor:
    """Which positions attend to which, [b, 1, s (query), s (key)] booleans: causal, inside one document.

    Args:
        positions: [b, s], the place of each token in its document, 0 at the document's first.
    """
    places = torch.arange(positions.shape[-1], device=positions.device)
    first = (places - positions).unsqueeze(-1)  # where in the window the query's document starts
    return ((first <= places) & (places <= places.unsqueeze(-1))).unsqueeze(1)


def rotate(
    x: Tensor,
    size: int,
    positions: Tensor | None = None,
    base: float = 10_000.0,
    length: int | None = None,
) -> Tensor:
    """Rotary embedding of the first `size` channels of x, [b, h, s, c] (arXiv 2104.09864; in halves).

    Args:
        positions: [b, s], what to rotate by; by default 0, 1, 2, ...
        length: positions are below it; by default below s.
    """
    if size == 0:
        return x
    tables = _rotary_tables if torch.compiler.is_compiling() else _kept_tables  # a graph keeps its own
    cos, sin = tables(length or x.shape[-2], size, base, x.device)
    if positions is not None:
        cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    turned, kept = x[..., :size].float(), x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), kept), dim=-1)


@lru_cache(maxsize=8)
def _kept_tables(length: int, size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever comes first, training can use them
        return _rotary_tables(length, size, base, device)


def _rotary_tables(length: int, size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, [length, size] each.

    Made where they are used, in fp32: a buffer would be cast to bf16 with the module, and lose positions.
    """
    frequency = base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()
