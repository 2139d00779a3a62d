"""Compact row lists: for each row of blocks, the columns of the blocks that are kept."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RowLists", "check_block"]


def check_block(block: int) -> None:
    """Refuse a size of blocks that the kernels do not have."""
    if block not in (32, 64, 128, 256):
        raise ValueError(f"block={block}: expected 32, 64, 128 or 256")


@dataclass(frozen=True, eq=False)
class RowLists:
    """Sorted column numbers of the kept blocks, row after row, for each batch entry and head.

    Args:
        ptr: int32 [B, H, R + 1]; row r of (b, h) is `idx[ptr[b, h, r] : ptr[b, h, r + 1]]`. B
            and H are 1 where the lists are shared.
        idx: int32 [count].
    """

    ptr: Tensor
    idx: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, rows: int) -> RowLists:
        """Return lists without any block."""
        ptr = torch.zeros(batch, heads, rows + 1, dtype=torch.int32)
        return cls(ptr, torch.zeros(0, dtype=torch.int32))

    @classmethod
    def of(cls, keep: Tensor) -> RowLists:
        """Return the lists of a bool table [B, H, R, C]."""
        counts = keep.sum(-1, dtype=torch.int64)
        return cls.from_counts(counts, keep.nonzero()[:, 3].to(torch.int32))

    @classmethod
    def from_counts(cls, counts: Tensor, idx: Tensor) -> RowLists:
        """Return lists from the number of entries of each row [B, H, R] and all entries."""
        ends = counts.flatten().cumsum(0).view(counts.shape)
        ptr = torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
        return cls(ptr.to(torch.int32), idx)

    @property
    def counts(self) -> Tensor:
        """Entries of each row, int32 [B, H, R]."""
        return self.ptr.diff(dim=-1)

    @property
    def owners(self) -> Tensor:
        """Which row of the B x H x R rows each entry belongs to, int64 [count]."""
        rows = self.counts.flatten().long()
        return torch.repeat_interleave(torch.arange(len(rows), device=rows.device), rows)

    def row(self, b: int, h: int, r: int) -> slice:
        """Return where the entries of one row lie."""
        start, stop = self.ptr[b, h, r : r + 2].tolist()
        return slice(start, stop)

    def take_heads(self, heads: slice) -> tuple[RowLists, Tensor]:
        """Return the lists of some heads, and which of the entries they have, bool [count]."""
        total, rows = self.counts.shape[1:]
        chosen = torch.zeros(total, dtype=torch.bool, device=self.idx.device)
        chosen[heads] = True
        mine = chosen[self.owners // rows % total]
        return RowLists.from_counts(self.counts[:, heads].long(), self.idx[mine]), mine

    def table(self, cols: int) -> Tensor:
        """Return the bool table [B, H, R, C]."""
        batch, heads, rows = self.counts.shape
        out = torch.zeros(batch * heads * rows, cols, dtype=torch.bool, device=self.idx.device)
        out[self.owners, self.idx.long()] = True
        return out.view(batch, heads, rows, cols)

    def to(self, device: torch.device) -> RowLists:
        """Return the lists on a device."""
        return RowLists(self.ptr.to(device), self.idx.to(device))

    def check(self, name: str, rows: int, cols: int) -> None:
        """Refuse lists that a kernel would follow out of the sequence.

        Raises:
            ValueError: what was expected of which tensor, and what it holds.
        """
        _check_tensor(f"{name}.ptr", self.ptr, 3)
        _check_tensor(f"{name}.idx", self.idx, 1)
        if self.ptr.shape[-1] != rows + 1:
            raise ValueError(
                f"{name}.ptr has {self.ptr.shape[-1]} entries a head, expected one more than the "
                f"{rows} rows of blocks"
            )
        flat = self.ptr.flatten(0, 1)
        bounds = [0, *itertools.chain(*((f[0].item(), f[-1].item()) for f in flat))]
        joined = all(a == b for a, b in zip(bounds[::2], bounds[1::2], strict=False))
        if bool((flat.diff(dim=-1) < 0).any()) or not joined or bounds[-1] != len(self.idx):
            raise ValueError(
                f"{name}.ptr must rise from 0 to the {len(self.idx)} entries of {name}.idx, row "
                "after row and head after head"
            )
        self._check_entries(name, cols)

    def _check_entries(self, name: str, cols: int) -> None:
        if not len(self.idx):
            return
        low, high = self.idx.min().item(), self.idx.max().item()
        if low < 0 or high >= cols:
            raise ValueError(f"{name}.idx runs from {low} to {high}, expected 0 to {cols - 1}")
        same_row = self.owners.diff() == 0
        if bool((same_row & (self.idx.diff() <= 0)).any()):
            raise ValueError(f"{name}.idx must rise within each row: it is unsorted or repeats")


def _check_tensor(name: str, x: Tensor, dims: int) -> None:
    if x.dtype != torch.int32 or x.ndim != dims:
        raise ValueError(
            f"{name} is {x.dtype} with {x.ndim} dimensions, expected torch.int32 with {dims}"
        )
