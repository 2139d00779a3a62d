"""Streaming attention as a block mask: the first tokens and the nearest ones.

References:
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024 (arXiv
    2309.17453): keeping the first few tokens keeps the softmax in shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bitmaps import EMPTY, FULL, mask_of_kinds
from .mask import BlockMask

__all__ = ["streaming_mask"]


def streaming_mask(
    n: int, sink: int, recent: int, *, block: int = 128, causal: bool = False
) -> BlockMask:
    """Return the mask that keeps the first tokens and the nearest ones.

    Query q keeps key k if k < sink or |q - k| < recent, and k <= q where causal.

    Args:
        n: tokens, queries and keys alike.
        sink: tokens at the beginning that all queries keep.
        recent: how near kept tokens lie; 1 keeps the query's own place alone, 0 none.
        block: size of a block.
        causal: whether only keys up to the query's place are kept.

    Raises:
        ValueError: if sink or recent is negative.
    """
    if sink < 0 or recent < 0:
        raise ValueError(f"sink={sink}, recent={recent}: expected 0 or more tokens")
    count = -(-n // block)
    step = torch.arange(count)
    # how far apart two blocks are, and how many keys of the block are in the sink, settle all
    apart = step[:, None] - step + count
    inside = (sink - step * block).clamp(0, block)
    pairs = apart + 2 * count * inside
    spans = _Spans(count, recent, block, causal)
    return mask_of_kinds(spans.settle(pairs), spans.bitmaps, n, block)


class _Spans:
    """Pairs of blocks by a number: how far apart they are + 2 count x keys in the sink."""

    def __init__(self, count: int, recent: int, block: int, causal: bool) -> None:
        self.count, self.recent, self.block, self.causal = count, recent, block, causal

    def _parts(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return q - k of the blocks' first tokens, and the keys in the sink."""
        apart = (pairs % (2 * self.count) - self.count) * self.block
        return apart, pairs // (2 * self.count)

    def settle(self, pairs: Tensor) -> Tensor:
        """Return the kinds of the pairs: -1 for none, -2 for full, the number where partial."""
        apart, inside = self._parts(pairs)
        least, most = apart - self.block + 1, apart + self.block - 1  # of q - k
        some = (inside > 0) | ((least < self.recent) & (most > -self.recent))
        whole = (inside == self.block) | (least.abs().maximum(most.abs()) < self.recent)
        if self.causal:
            some, whole = some & (most >= 0), whole & (least >= 0)
        return torch.where(whole, FULL, torch.where(some, pairs, EMPTY))

    def bitmaps(self, pairs: Tensor) -> Tensor:
        """Return the tiles of partial pairs, bool [n, block, block]."""
        apart, inside = (x[:, None, None] for x in self._parts(pairs))
        place = torch.arange(self.block)
        away = apart + place[:, None] - place
        kept = (place < inside) | (away.abs() < self.recent)
        return kept & (away >= 0) if self.causal else kept
