"""Shapes and masks on which block-sparse attention is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnctl.kernels import BlockMask, Window, window_mask
from attnctl.processors.sparse.radial import radial_block_mask

__all__ = ["CASES", "GROUPS", "Case"]


@dataclass(frozen=True)
class Case:
    """One shape with one mask.

    Args:
        name: as on the command line.
        heads: heads, of queries and keys alike; batch 1.
        width: head dim.
        mask: makes the mask, one list for all heads.
    """

    name: str
    heads: int
    width: int
    mask: Callable[[], BlockMask]


def _radial(
    name: str, heads: int, frames: int, per_frame: int, decay: float, family: str = "wan",
    width: int = 128,
) -> Case:  # fmt: skip
    def mask() -> BlockMask:
        return radial_block_mask(frames, per_frame, decay, family, adjacent="full")  # type: ignore[arg-type]

    return Case(name, heads, width, mask)


def _bands(name: str, heads: int, frames: int, tokens: int) -> Case:
    """Return bands along the diagonal that narrow by half with every further frame."""

    def mask() -> BlockMask:
        per_frame = tokens / frames
        at = (torch.arange(tokens // 128) + 0.5) * 128
        frame = (at / per_frame).floor()
        place = at - frame * per_frame
        apart = (frame[:, None] - frame).abs()
        width = (per_frame / 2 ** (apart - 1).clamp(min=0)).clamp(min=64)
        return BlockMask.of_blocks((place[:, None] - place).abs() <= width, tokens, tokens)

    return Case(name, heads, 128, mask)


def _window(name: str, stride: tuple[int, int, int]) -> Case:
    """Return a neighbourhood window of 18 x 24 x 24 in 30 frames of 48 x 80, tile by tile."""

    def mask() -> BlockMask:
        windows = [Window(n, step) for n, step in zip((18, 24, 24), stride, strict=True)]
        return window_mask((30, 48, 80), windows, (2, 8, 8))[0]

    return Case(name, 24, 128, mask)


def _random(density: float) -> Case:
    """Return 32,768 tokens with this part of the blocks, at random places."""

    def mask() -> BlockMask:
        draws = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
        return BlockMask.of_blocks(draws < density, 32768, 32768)

    return Case(f"random-{density:g}", 16, 128, mask)


_MODELS = (
    _radial("wan-480p", 40, 21, 1560, 0.2),
    _radial("wan-720p", 40, 21, 3600, 0.2),
    _radial("hunyuan-720p", 24, 30, 3840, 0.95, "hunyuan"),
    _radial("hunyuan-4x", 6, 128, 3600, 1.0, "hunyuan"),
    _radial("wan-720p-d64", 40, 21, 3600, 0.2, width=64),
)
_BANDS = (
    _bands("bands-480p", 40, 21, 32640),
    _bands("bands-720p", 40, 21, 75520),
    _bands("bands-117f", 24, 30, 115200),
    _bands("bands-4x", 6, 128, 460800),
)
_WINDOWS = (_window("window-step-1", (1, 1, 1)), _window("window-by-tile", (2, 8, 8)))
_FRAMES = tuple(_radial(f"frames-{n}", 6, n, 3600, 0.2) for n in (21, 41, 61, 81, 101, 128))
_DENSITIES = tuple(_random(d) for d in (0.05, 0.1, 0.2, 0.4, 0.7, 1.0))
_SMALL = (
    _radial("toy", 2, 6, 256, 1.0, width=64),
    _radial("toy-odd", 2, 8, 300, 0.5, width=64),
)

CASES: dict[str, Case] = {
    c.name: c for c in (*_MODELS, *_BANDS, *_WINDOWS, *_FRAMES, *_DENSITIES, *_SMALL)
}
"""All cases by name: radial masks of video models (heads of one layer of the 14B and Hunyuan
models; 6 where it is long), bands of the same sizes without a ragged end, a growing number of
frames, growing density, and two for a CPU. Of the two windows one has mostly partial blocks, the
other none."""

GROUPS: dict[str, tuple[str, ...]] = {
    "models": tuple(c.name for c in _MODELS),
    "bands": tuple(c.name for c in _BANDS),
    "windows": tuple(c.name for c in _WINDOWS),
    "frames": tuple(c.name for c in _FRAMES),
    "densities": tuple(c.name for c in _DENSITIES),
    "toys": tuple(c.name for c in _SMALL),
}
"""Names that stand for several cases."""
