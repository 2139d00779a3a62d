"""Masks from bool maps, from rules, and from FlexAttention's BlockMask and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from .bitmaps import pack
from .lists import RowLists, check_block
from .mask import BlockMask, Rule

__all__ = ["from_dense", "from_flex", "from_rule", "to_flex"]


def from_dense(mask: Tensor, block: int) -> BlockMask:
    """Return the mask of a bool map [B, H, Nq, Nk]."""
    batch, heads, nq, nk = mask.shape
    strips = _Strips(batch, heads, nq, nk, block)
    for b in range(batch):
        for h in range(heads):
            for start in range(0, nq, block):
                strips.add(mask[b, h, start : start + block])
    return strips.mask()


def from_rule(rule: Rule, nq: int, nk: int, block: int, batch: int, heads: int) -> BlockMask:
    """Return the mask of a rule, a row of blocks at a time."""
    strips = _Strips(batch, heads, nq, nk, block)
    keys = torch.arange(nk)
    for b in range(batch):
        for h in range(heads):
            for start in range(0, nq, block):
                queries = torch.arange(start, min(start + block, nq))
                strips.add(_evaluate(rule, b, h, queries, keys))
    return strips.mask()


def _evaluate(rule: Rule, b: int, h: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Return the rule at all pairs, bool [queries, keys]."""
    device = queries.device
    mapped = torch.vmap(
        torch.vmap(rule, in_dims=(None, None, None, 0)), in_dims=(None, None, 0, None)
    )
    out = mapped(torch.tensor(b, device=device), torch.tensor(h, device=device), queries, keys)
    if not isinstance(out, Tensor) or out.dtype != torch.bool:
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"the rule returned {got}, expected a bool for each (b, h, query, key)")
    return out


class _Strips:
    """Collects full and partial blocks from the rows of blocks of a map, in order."""

    def __init__(self, batch: int, heads: int, nq: int, nk: int, block: int) -> None:
        check_block(block)
        self.shape = batch, heads, -(-nq // block)
        self.nq, self.nk, self.block = nq, nk, block
        self.full: list[Tensor] = []
        self.part: list[Tensor] = []
        self.tiles: list[Tensor] = []

    def add(self, strip: Tensor) -> None:
        """Take the next strip, bool [<= block, Nk]."""
        block, high = self.block, strip.shape[0]
        wide = functional.pad(strip.cpu(), (0, -self.nk % block, 0, block - high))
        tiles = wide.view(block, -1, block).transpose(0, 1)  # [C, block, block]
        kept = tiles.sum((1, 2))
        widths = torch.full_like(kept, block)
        widths[-1] = self.nk - (len(kept) - 1) * block
        whole = kept == high * widths
        part = (kept > 0) & ~whole
        self.full.append(whole.nonzero()[:, 0].to(torch.int32))
        self.part.append(part.nonzero()[:, 0].to(torch.int32))
        self.tiles.append(pack(tiles[part]))

    def mask(self) -> BlockMask:
        """Return the mask, each bitmap stored once."""
        lists, parts = (self._lists(entries) for entries in (self.full, self.part))
        tiles = torch.cat(self.tiles)
        bits, which = (tiles, torch.zeros(0)) if not len(tiles) else _unique(tiles)
        mask = BlockMask(
            self.nq, self.nk, self.block, lists, parts,
            which.to(torch.int32), bits,
        )  # fmt: skip
        mask.check()
        return mask

    def _lists(self, entries: list[Tensor]) -> RowLists:
        counts = torch.tensor([len(e) for e in entries]).view(self.shape)
        return RowLists.from_counts(counts, torch.cat(entries))


def _unique(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different tiles, and which of them each one is."""
    rows, which = tiles.flatten(1).unique(dim=0, return_inverse=True)
    return rows.view(-1, *tiles.shape[1:]), which


# -- FlexAttention -----------------------------------------------------------------------


def from_flex(mask: Any) -> BlockMask:
    """Return the mask of a FlexAttention BlockMask; its rule is evaluated on partial blocks."""
    sizes = tuple(mask.BLOCK_SIZE)
    if sizes[0] != sizes[1]:
        raise ValueError(f"this FlexAttention mask has blocks of {sizes}; square ones are needed")
    nq, nk = mask.seq_lengths
    batch, heads = mask.kv_num_blocks.shape[:2]
    partial = _ordered(mask.kv_num_blocks, mask.kv_indices, -(-nk // sizes[1]))
    strips = _Strips(batch, heads, nq, nk, sizes[0])
    whole = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        whole = _ordered(mask.full_kv_num_blocks, mask.full_kv_indices, partial.shape[-1])
    for b, h, r in torch.cartesian_prod(*map(torch.arange, strips.shape)).tolist():
        strips.add(_flex_strip(mask, whole[b, h, r], partial[b, h, r], (b, h, r), nq, nk))
    return strips.mask()


def _flex_strip(
    mask: Any, whole: Tensor, partial: Tensor, at: tuple[int, int, int], nq: int, nk: int
) -> Tensor:
    b, h, r = at
    block, device = mask.BLOCK_SIZE[0], mask.kv_indices.device
    queries = torch.arange(r * block, min((r + 1) * block, nq), device=device)
    strip = whole.repeat_interleave(block)[:nk].expand(len(queries), nk).clone()
    for c in partial.nonzero()[:, 0].tolist():
        keys = torch.arange(c * block, min((c + 1) * block, nk), device=device)
        tile = _evaluate(mask.mask_mod, b, h, queries, keys)
        strip[:, c * block : c * block + len(keys)] = tile.cpu()
    return strip


def _ordered(counts: Tensor, indices: Tensor, cols: int) -> Tensor:
    """Return the bool table [B, H, R, C] of FlexAttention's counts and indices."""
    counts, indices = counts.cpu(), indices.cpu()
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    table = torch.zeros(*counts.shape, cols + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(used, indices, cols).long(), True)
    return table[..., :cols]


def to_flex(mask: BlockMask, *, rule_of_full: bool = True) -> Any:
    """Return a mask as FlexAttention's BlockMask, whose rule looks the bits up.

    Args:
        mask: the mask.
        rule_of_full: whether a mask without partial blocks gets a rule too. FlexAttention's
            eager form goes by the rule alone; its compiled one does not ask it about full
            blocks, but pays for it with shared memory.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    whole, part = mask.lists.table(mask.cols), mask.parts.table(mask.cols)
    which = _numbers(mask)
    block, bits, batch, heads = mask.block, mask.bits, mask.batch, mask.heads
    ruled = rule_of_full or len(bits) > 0
    if not len(bits):  # FlexAttention traces the look-up even if no block is partial
        bits = torch.zeros(1, block, block // 32, dtype=torch.int32, device=mask.device)

    def rule(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        own_b, own_h = (b if batch > 1 else b * 0), (h if heads > 1 else h * 0)
        number = which[own_b, own_h, q_idx // block, kv_idx // block]
        key = kv_idx % block
        word = bits[number.clamp_min(0), q_idx % block, key // 32]
        return (number == -2) | ((number >= 0) & (((word >> (key % 32)) & 1) != 0))

    return FlexMask.from_kv_blocks(
        part.sum(-1, dtype=torch.int32), _sorted_first(part),
        whole.sum(-1, dtype=torch.int32), _sorted_first(whole),
        BLOCK_SIZE=block, mask_mod=rule if ruled else None, seq_lengths=(mask.nq, mask.nk),
    )  # fmt: skip


def _numbers(mask: BlockMask) -> Tensor:
    """Return int32 [B, H, R, C]: the bitmap of a partial block, -2 for a full one, -1 for none."""
    out = torch.where(mask.lists.table(mask.cols), -2, -1).to(torch.int32)
    out.view(-1, mask.cols)[mask.parts.owners, mask.parts.idx.long()] = mask.part_bits
    return out


def _sorted_first(table: Tensor) -> Tensor:
    """Return int32 [B, H, R, C]: the kept columns of each row in order, then the others."""
    return table.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
