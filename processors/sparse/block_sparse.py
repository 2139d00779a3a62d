"""Sparse attention by a rule of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from attnctl.errors import OptionError
from attnctl.kernels import BlockMask, TileOrder

from .shapes import VideoTokens
from .sparse import Pattern, SparseAttention

__all__ = ["BlockSparse", "Rule"]

Rule = Callable[[VideoTokens], BlockMask | tuple[BlockMask, TileOrder]]
"""What is kept of a sequence; with an order of the tokens where the mask wants another."""


@dataclass(frozen=True)
class BlockSparse(SparseAttention):
    """Block-sparse self-attention of video models, by any rule.

        from attnctl.kernels import Window, window_mask

        def near(tokens):
            windows = Window(3), Window(9), Window(9)  # frames, rows, columns
            return window_mask(tokens.grid, windows, (1, 8, 16), text=tokens.text)

        attnctl.patch(pipe, attnctl.BlockSparse(rule=near))

    Args:
        rule: `rule(tokens)` returns the `BlockMask` of the sequence, or a mask and the
            `TileOrder` that it is for (then the text counts as behind the video). It is called
            once per run for each size of a sequence.
        dense_layers: how many of the first blocks stay dense.
        start: fraction of the run up to which all attention stays dense.
        stop: fraction of the run from which it is dense again.
        dense_steps: further windows of dense steps, such as "steps:0-12 0.9-1".
        heads: selector; the heads not named stay dense, which then costs both.
        backend: of `attnctl.kernels.block_sparse_attention`.
    """

    rule: Rule | None = None

    name: ClassVar[str] = "block-sparse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.rule):
            raise OptionError(
                f"block-sparse: rule={self.rule!r}: expected a function from VideoTokens to a "
                "BlockMask, or to a BlockMask and a TileOrder"
            )

    def pattern(self, tokens: VideoTokens, joint: bool) -> Pattern:
        """Return what the rule gives, checked."""
        assert self.rule is not None
        made = self.rule(tokens)
        pattern = Pattern(made) if isinstance(made, BlockMask) else Pattern(*made)
        mask, order = pattern
        if order is not None:
            if len(order.back) != tokens.n or mask.nq != len(order.slots):
                raise OptionError(
                    f"block-sparse: the rule gave a mask of {mask.nq} queries and an order of "
                    f"{len(order.back)} tokens in {len(order.slots)} places for {tokens}, which "
                    f"are {tokens.n} tokens"
                )
        elif (mask.nq, mask.nk) != (tokens.n, tokens.n - tokens.padding):
            raise OptionError(
                f"block-sparse: the rule gave a mask of {mask.nq} queries and {mask.nk} keys; "
                f"expected {tokens.n} and {tokens.n - tokens.padding} for {tokens}"
            )
        return pattern
