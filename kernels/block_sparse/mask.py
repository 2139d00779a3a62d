"""Which blocks of an attention map are kept: the mask type of all block-sparse backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lists import RowLists, check_block

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["BlockMask", "Rule"]

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""As in FlexAttention: (batch, head, query index, key index), each a scalar -> bool scalar."""


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Kept blocks of an [Nq, Nk] attention map, full or partial, as int32 row lists.

    A full block is computed without looking at a mask; a partial one has a bitmap. The last
    row and column of blocks may reach past the sequence: what lies past it is never attended
    to, in whichever list the block stands. Queries without any kept key give output 0 and
    log-sum-exp -inf.

    Make one with `of_blocks`, `from_dense`, `from_rule`, `from_flex` or `full`; they check
    what they are given. The lists are shared by all batch entries (heads) where their first
    (second) dimension is 1.

    Args:
        nq: queries.
        nk: keys.
        block: rows and columns of a block: 32, 64, 128 or 256.
        lists: the full blocks.
        parts: the partial blocks; none is also in `lists`.
        part_bits: which bitmap each entry of `parts.idx` has, int32 [count].
        bits: int32 [U, block, block / 32]; bit j of word w of row i = key 32 w + j.
        order: int32 [R], in which a kernel should take the rows: those next to each other run
            at the same time and should need the same keys. Rows with most blocks first if not
            given.
    """

    nq: int
    nk: int
    block: int
    lists: RowLists
    parts: RowLists
    part_bits: Tensor
    bits: Tensor
    order: Tensor | None = field(default=None)
    _moved: dict[torch.device, BlockMask] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_block(self.block)
        if self.nq < 1 or self.nk < 1:
            raise ValueError(f"a mask of {self.nq} x {self.nk} tokens: expected at least 1 x 1")
        if self.order is None:
            work = (self.lists.counts + self.parts.counts).sum((0, 1))
            order = work.argsort(descending=True, stable=True).to(torch.int32)
            object.__setattr__(self, "order", order)

    # -- makers --------------------------------------------------------------------------

    @classmethod
    def of_blocks(cls, keep: Tensor, nq: int, nk: int, block: int = 128) -> BlockMask:
        """Return the mask with these blocks kept as a whole.

        Args:
            keep: bool [R, C], [H, R, C] or [B, H, R, C], B and H 1 where shared.
            nq: queries; R is their number of blocks, rounded up.
            nk: keys.
            block: size of a block.
        """
        keep = _four(keep, "keep")
        want = (-(-nq // block), -(-nk // block))
        if keep.shape[2:] != want:
            raise ValueError(
                f"keep has {keep.shape[2]} x {keep.shape[3]} blocks, but {nq} x {nk} tokens in "
                f"blocks of {block} make {want[0]} x {want[1]}"
            )
        return cls.of_lists(RowLists.of(keep), nq, nk, block)

    @classmethod
    def of_lists(
        cls,
        lists: RowLists,
        nq: int,
        nk: int,
        block: int = 128,
        *,
        order: Tensor | None = None,
        check: bool = True,
    ) -> BlockMask:
        """Return the mask with these full blocks and no partial ones.

        Args:
            lists: the blocks.
            nq: queries.
            nk: keys.
            block: size of a block.
            order: int32 [R], in which a kernel should take the rows.
            check: False for lists that are right by construction, to save the time.
        """
        parts = RowLists.empty(*lists.counts.shape)
        none = torch.zeros(0, dtype=torch.int32)
        mask = cls(nq, nk, block, lists, parts, none, none.view(0, block, block // 32), order)
        if check:
            mask.check()
        return mask

    @classmethod
    def full(cls, nq: int, nk: int, block: int = 128) -> BlockMask:
        """Return the mask that keeps everything."""
        return cls.of_blocks(torch.ones(-(-nq // block), -(-nk // block)).bool(), nq, nk, block)

    @classmethod
    def from_dense(cls, mask: Tensor, block: int = 128) -> BlockMask:
        """Return the mask of a bool map [Nq, Nk], [H, Nq, Nk] or [B, H, Nq, Nk]."""
        from .build import from_dense

        return from_dense(_four(mask, "mask"), block)

    @classmethod
    def from_rule(
        cls, rule: Rule, nq: int, nk: int, block: int = 128, *, batch: int = 1, heads: int = 1
    ) -> BlockMask:
        """Return the mask of a rule, evaluated a row of blocks at a time.

        Args:
            rule: (batch, head, query, key) -> bool, the `mask_mod` of FlexAttention.
            nq: queries.
            nk: keys.
            block: size of a block.
            batch: batch entries the rule tells apart; 1 if it tells none.
            heads: heads the rule tells apart.
        """
        from .build import from_rule

        return from_rule(rule, nq, nk, block, batch, heads)

    @classmethod
    def from_flex(cls, mask: Any) -> BlockMask:
        """Return the mask of a `torch.nn.attention.flex_attention.BlockMask`."""
        from .build import from_flex

        return from_flex(mask)

    def to_flex(self) -> Any:
        """Return this mask as a `torch.nn.attention.flex_attention.BlockMask`."""
        from .build import to_flex

        return to_flex(self)

    def take_heads(self, heads: slice) -> BlockMask:
        """Return the mask of some of the heads; itself where all of them share one."""
        if self.heads == 1:
            return self
        lists, _ = self.lists.take_heads(heads)
        parts, mine = self.parts.take_heads(heads)
        part_bits = self.part_bits[mine]
        return BlockMask(
            self.nq, self.nk, self.block, lists, parts, part_bits, self.bits, self.order
        )

    # -- what it says --------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return -(-self.nq // self.block)

    @property
    def cols(self) -> int:
        """Columns of blocks."""
        return -(-self.nk // self.block)

    @property
    def batch(self) -> int:
        """Batch entries with lists of their own; 1 if shared."""
        return self.lists.ptr.shape[0]

    @property
    def heads(self) -> int:
        """Heads with lists of their own; 1 if shared."""
        return self.lists.ptr.shape[1]

    @property
    def num_blocks(self) -> int:
        """Kept blocks, full and partial, over all lists."""
        return len(self.lists.idx) + len(self.parts.idx)

    @property
    def density(self) -> float:
        """Kept part of all blocks, in [0, 1]: what attention costs beside dense."""
        return self.num_blocks / (self.batch * self.heads * self.rows * self.cols)

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.lists.idx.device

    def __str__(self) -> str:
        shared = "" if self.batch == self.heads == 1 else f"{self.batch} x {self.heads} lists, "
        return (
            f"{self.nq} x {self.nk} tokens in {self.rows} x {self.cols} blocks of {self.block}, "
            f"{shared}{self.num_blocks} kept ({len(self.parts.idx)} partial), "
            f"density {self.density:.4f}"
        )

    def __repr__(self) -> str:
        return f"<BlockMask of {self}>"

    def blocks(self) -> Tensor:
        """Return which blocks are kept, bool [B, H, R, C]."""
        return self.lists.table(self.cols) | self.parts.table(self.cols)

    def dense(self) -> Tensor:
        """Return the whole map, bool [B, H, Nq, Nk]; for tests and small sizes."""
        size = self.block
        out = self.lists.table(self.cols).repeat_interleave(size, 2).repeat_interleave(size, 3)
        tiles = out.view(-1, size, self.cols, size)
        tiles[self.parts.owners, :, self.parts.idx.long()] = self.tiles(self.part_bits)
        return out[:, :, : self.nq, : self.nk]

    def tiles(self, which: Tensor) -> Tensor:
        """Return bitmaps by number [n] as bool [n, block, block]."""
        words = self.bits[which.long()]
        shifts = torch.arange(32, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & 1).flatten(-2).bool()

    def picture(self, cell: int = 0) -> Image:
        """Return a drawing: full blocks dark, partial ones lighter, one list beside the other.

        Args:
            cell: pixels of a block; 0 for what makes a list about 360 pixels wide.
        """
        from .picture import draw

        return draw(self, cell)

    # -- use -----------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask on a device; copied once, then remembered."""
        device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
        if device == self.device:
            return self
        if device not in self._moved:
            with torch.inference_mode(False):  # the copy outlives this call
                self._moved[device] = BlockMask(
                    self.nq, self.nk, self.block,
                    self.lists.to(device), self.parts.to(device),
                    self.part_bits.to(device), self.bits.to(device),
                    None if self.order is None else self.order.to(device),
                )  # fmt: skip
        return self._moved[device]

    def check(self) -> None:
        """Refuse lists that do not make a mask; the makers have done so already.

        Raises:
            ValueError: what was expected of which tensor, and what it holds.
        """
        self.lists.check("lists", self.rows, self.cols)
        self.parts.check("parts", self.rows, self.cols)
        if self.lists.ptr.shape != self.parts.ptr.shape:
            raise ValueError(
                f"lists are for {tuple(self.lists.ptr.shape[:2])} batch entries and heads, parts "
                f"for {tuple(self.parts.ptr.shape[:2])}"
            )
        order = self.order
        assert order is not None
        if order.dtype != torch.int32 or sorted(order.tolist()) != list(range(self.rows)):
            raise ValueError(
                f"order is {order.dtype} {tuple(order.shape)}, expected torch.int32 with each of "
                f"the {self.rows} rows once"
            )
        words = (self.block, self.block // 32)
        if self.bits.dtype != torch.int32 or self.bits.shape[1:] != words:
            raise ValueError(
                f"bits are {self.bits.dtype} {tuple(self.bits.shape)}, expected torch.int32 "
                f"[U, {words[0]}, {words[1]}]"
            )
        if self.part_bits.dtype != torch.int32 or self.part_bits.shape != self.parts.idx.shape:
            raise ValueError("part_bits must be int32, one number for each entry of parts.idx")
        if len(self.part_bits) and not 0 <= int(self.part_bits.max()) < len(self.bits):
            raise ValueError(f"part_bits name a bitmap that is not among the {len(self.bits)}")
        if not len(self.parts.idx):
            return
        twice = self.lists.table(self.cols) & self.parts.table(self.cols)
        if bool(twice.any()):
            raise ValueError(f"block {twice.nonzero()[0].tolist()} is both full and partial")


def _four(x: Tensor, name: str) -> Tensor:
    if x.dtype != torch.bool or not 2 <= x.ndim <= 4:
        raise ValueError(
            f"{name} is {x.dtype} with {x.ndim} dimensions, expected torch.bool with 2 to 4"
        )
    return x[(None,) * (4 - x.ndim)]
