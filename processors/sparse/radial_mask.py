"""The block mask of Radial Attention, as the released code builds it.

Tokens lie in raster order, s to a frame. With d = |i - j| the distance of query frame i and key
frame j, g(d) its number of binary digits and S2 = 2^(digits of s),

    half width  w(0) = s,  w(1) = s // 2 or s,  w(d) = max(decay S2 / 2^g(d), block)
    kept pairs  L(d) = S2 / 2^g(d) >= 128, or d divisible by int(128 / L(d))
    kept tokens |k - l| <= w(d) for the places k and l of query and key in their frames

and a block is kept if in more than .6 of the key columns that have any kept token, more than a
third of the block's rows is kept; blocks are then computed whole. Blocks lie at multiples of
their size in the whole sequence, whatever the length of a frame.

References:
    Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", NeurIPS 2025 (arXiv 2506.19852). The rule is that of the released code, which
    differs from the paper's (section 4): no block is rounded up, decay is a free factor, and
    only Wan's rule keeps frame 0 for all queries.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from attnctl.errors import OptionError
from attnctl.kernels.block_sparse.lists import RowLists
from attnctl.kernels.block_sparse.mask import BlockMask

__all__ = [
    "Adjacent", "Family", "forget_masks", "half_width", "keeps_pair", "radial_block_mask",
]  # fmt: skip

Family = Literal["wan", "hunyuan"]
Adjacent = Literal["half", "full"]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_LITERAL = 128
"""The released code decimates frame pairs by this number, whatever the block size."""

_STRIP = 1024
"""Places that are taken together, frame by frame."""


def radial_block_mask(
    frames: int,
    tokens_per_frame: int,
    decay: float,
    family: Family = "wan",
    adjacent: Adjacent = "half",
    block: int = 128,
    *,
    before: int = 0,
    after: int = 0,
    padding: int = 0,
) -> BlockMask:
    """Return the mask of Radial Attention; the same object for the same arguments.

    Args:
        frames: latent frames.
        tokens_per_frame: tokens of a frame.
        decay: factor on the band's half width from the second frame distance on, 0 to 1.
        family: "wan" keeps all keys of frame 0; "hunyuan" does not.
        adjacent: half width of neighbouring frames in Wan's rule: "half" a frame, as for the
            published figures, or "full" since commit 72788d4. Hunyuan's is always full.
        block: size of a block: 32, 64, 128 or 256.
        before: further tokens in front of the video (text), attended to by all.
        after: further tokens behind it.
        padding: how many of these, the last ones, nobody attends to.

    Returns:
        The mask of `before + frames * tokens_per_frame + after` queries and as many keys less
        the padding. Rows and columns of blocks that hold a token which is not video, or that
        the video does not fill, are kept as a whole.

    Raises:
        OptionError: on a value out of its range.
    """
    for name, value, least in (
        ("frames", frames, 1),
        ("tokens_per_frame", tokens_per_frame, 1),
        ("before", before, 0),
        ("after", after, 0),
    ):
        if value < least:
            raise OptionError(f"radial mask: {name}={value}, expected {least} or more")
    if not 0 <= padding <= after:
        raise OptionError(f"radial mask: padding={padding}, expected 0 to after={after}")
    if not 0 <= decay <= 1:
        raise OptionError(f"radial mask: decay={decay}, expected 0 to 1")
    if block not in (32, 64, 128, 256):
        raise OptionError(f"radial mask: block={block}, expected 32, 64, 128 or 256")
    if family not in ("wan", "hunyuan") or adjacent not in ("half", "full"):
        raise OptionError(
            f"radial mask: family={family!r}, adjacent={adjacent!r}; expected 'wan' or "
            "'hunyuan', and 'half' or 'full'"
        )
    half = family == "wan" and adjacent == "half"
    rule = _Rule(tokens_per_frame, float(decay), half, block)
    return _build(rule, frames, family == "wan", before, after, padding)


@dataclass(frozen=True)
class _Rule:
    """What decides about one pair of frames.

    Args:
        s: tokens of a frame.
        decay: factor on the half width.
        half: whether neighbouring frames get half a frame of half width.
        block: size of a block.
    """

    s: int
    decay: float
    half: bool
    block: int


def half_width(d: int, s: int, decay: float, half: bool, block: int) -> int:
    """Return w(d): tokens at places up to w(d) apart are kept in frames d apart."""
    if d == 0:
        return s
    if d == 1:
        return s // 2 if half else s
    return math.floor(max(_length(d, s) * decay, block))


def keeps_pair(d: int, s: int) -> bool:
    """Return whether frames d apart attend to each other at all."""
    length = _length(d, s)
    return d == 0 or length >= _LITERAL or d % int(_LITERAL / length) == 0


def _length(d: int, s: int) -> float:
    return 2.0 ** (s.bit_length() - d.bit_length())


# -- token bands to blocks ---------------------------------------------------------------


def _kept_blocks(rule: _Rule, w: Ints, row_phase: Ints, col_phase: Ints) -> Bools:
    """Return the kept blocks of frame pairs, bool [n, blocks, blocks].

    Args:
        rule: the rule.
        w: half widths [n].
        row_phase: place of the query frame's first token in its block [n].
        col_phase: the same of the key frame.
    """
    top, bottom = _pieces(rule, row_phase)  # rows of the frame in each row of blocks
    left, right = _pieces(rule, col_phase)
    third = rule.block // 3 + 1
    dense = _overlap(*_columns(rule, top, bottom, w[:, None], third), left, right)
    some = _overlap(*_columns(rule, top, bottom, w[:, None], 1), left, right)
    return 5 * dense > 3 * some


def _pieces(rule: _Rule, phase: Ints) -> tuple[Ints, Ints]:
    """Return first and last token of a frame in each of its first ceil(s / block) blocks.

    A frame that begins late in its first block reaches into one more block; the released code
    leaves that one to the next frame.
    """
    blocks = -(-rule.s // rule.block)
    start = np.arange(blocks)[None] * rule.block - phase[:, None]
    return np.maximum(start, 0), np.minimum(start + rule.block, rule.s) - 1


def _columns(rule: _Rule, top: Ints, bottom: Ints, w: Ints, least: int) -> tuple[Ints, Ints]:
    """Return first and last key with at least `least` kept queries among rows top to bottom.

    Key l has min(bottom, l + w) - max(top, l - w) + 1 of them, so that these keys are an
    interval; it is empty (first beyond last) where there are none.
    """
    first = np.maximum(top + least - 1 - w, 0)
    last = np.minimum(bottom - least + 1 + w, rule.s - 1)
    none = (bottom - top + 1 < least) | (2 * w + 1 < least)
    return np.where(none, rule.s, first), np.where(none, -1, last)


def _overlap(first: Ints, last: Ints, left: Ints, right: Ints) -> NDArray[np.int32]:
    """Return the length of each row's interval inside each column's piece, [n, rows, cols]."""
    # narrow and in place: for long videos most of the time goes into memory
    low, high, start, stop = (x.astype(np.int32) for x in (first, last, left, right))
    length = np.minimum(high[:, :, None], stop[:, None])
    length -= np.maximum(low[:, :, None], start[:, None])
    length += 1
    return np.maximum(length, 0, out=length)


# -- frame pairs to the whole mask -------------------------------------------------------


@dataclass(frozen=True)
class _Strip:
    """The rows of blocks of one period of frames, with all key frames before and after.

    Frames begin at the same place in a block again after `block / gcd(s, block)` of them, and
    the rule depends on the distance of frames alone: one period says everything.

    Args:
        ptr: where each row begins in `cols`, [rows + 1].
        cols: kept columns of blocks, counted from the first block of the period's own rows.
    """

    ptr: Ints
    cols: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Rows of blocks of a period."""
        return len(self.ptr) - 1


@functools.lru_cache(maxsize=64)
def _strip(rule: _Rule, frames: int, phase: int) -> _Strip:
    s, block = rule.s, rule.block
    period = min(block // math.gcd(s, block), frames)
    whole = period * s % block == 0  # else there are fewer frames than a period
    rows = period * s // block if whole else (phase + frames * s) // block
    reach = np.arange(1 - frames, frames)
    kept = reach[[keeps_pair(abs(int(d)), s) for d in reach]]
    widths = np.array([half_width(abs(int(d)), s, rule.decay, rule.half, block) for d in kept])
    # the frame before shares the first row of blocks unless frames begin with it
    own = np.arange(-1 if phase else 0, period)
    query, d = (x.ravel() for x in np.meshgrid(own, np.arange(len(kept)), indexing="ij"))
    row_at, col_at = phase + query * s, phase + (query + kept[d]) * s
    key = (widths[d] * block + row_at % block) * block + col_at % block
    keys, which = np.unique(key, return_inverse=True)
    tiles = _kept_blocks(rule, keys // block**2, keys // block % block, keys % block)
    size = tiles.shape[1]
    zero = frames * s // block + size + 1  # column of the period's own first block
    table = np.zeros((rows + 2 * size, 2 * zero + rows + size), dtype=bool)
    places = zip((row_at // block + size).tolist(), (col_at // block + zero).tolist(), strict=True)
    for (r, c), tile in zip(places, which.tolist(), strict=True):
        place = table[r : r + size, c : c + size]
        np.logical_or(place, tiles[tile, : len(place)], out=place)
    table = table[size : size + rows]
    # a block wider than a frame may be kept by no pair: queries keep their own surroundings
    table[np.arange(rows), np.arange(rows) + zero] = True
    flat = np.flatnonzero(table)
    ptr = np.searchsorted(flat, np.arange(rows + 1) * table.shape[1])
    return _Strip(ptr, (flat % table.shape[1] - zero).astype(np.int32))


@functools.lru_cache(maxsize=64)
def _build(
    rule: _Rule, frames: int, sink: bool, before: int, after: int, padding: int
) -> BlockMask:
    block, video = rule.block, frames * rule.s
    total = before + video + after
    count, cols = -(-total // block), -(-(total - padding) // block)
    low, high = -(-before // block), (before + video) // block
    head = -(-(before + rule.s) // block) if sink else low  # first columns that all rows keep
    whole = np.arange(cols, dtype=np.int32)
    rows: list[list[NDArray[np.int32]]] = [[whole]] * min(low, count)
    if low < high:
        base = before // block
        strip = _strip(rule, frames, before % block)
        rows += _video_rows(strip, range(low, high), base, min(head, high), high, cols)
    rows += [[whole]] * (count - len(rows))
    entries = np.concatenate([part for row in rows for part in row])
    with torch.inference_mode(False):  # the mask outlives this call
        counts = torch.tensor([sum(map(len, r)) for r in rows]).view(1, 1, count)
        lists = RowLists.from_counts(counts, torch.from_numpy(entries))
        order = torch.from_numpy(_order(count, block, before, rule.s, frames))
        return BlockMask.of_lists(lists, total, total - padding, block, order=order, check=False)


def _order(count: int, block: int, before: int, s: int, frames: int) -> NDArray[np.int32]:
    """Return the rows of blocks strip by strip: places of `_STRIP` tokens through all frames.

    Rows at about the same place keep about the same columns whatever their frame, so that their
    keys are still in the GPU's cache. Text comes first: its rows are the longest.
    """
    middle = np.arange(count) * block + block // 2 - before
    frame, place = np.divmod(middle, s)
    text = (middle < 0) | (frame >= frames)
    strip = np.where(text, -1, place // _STRIP)
    return np.lexsort((middle, np.where(text, -1, frame), strip)).astype(np.int32)


def _video_rows(
    strip: _Strip, rows: range, base: int, head: int, high: int, stop: int
) -> list[list[NDArray[np.int32]]]:
    """Return the kept columns of each row: the first ones, the strip's between, the last ones.

    In parts, which are put together once for all rows.
    """
    first, last = (np.arange(*ends, dtype=np.int32) for ends in ((head,), (high, stop)))
    width = int(np.abs(strip.cols).max(initial=0)) + rows.stop + strip.rows + 1
    owner = np.repeat(np.arange(strip.rows), np.diff(strip.ptr))
    place = owner * 2 * width + strip.cols + width  # rises over all rows
    before, after = ([part] if len(part) else [] for part in (first, last))
    out: list[list[NDArray[np.int32]]] = []
    for start in range(base, rows.stop, strip.rows):
        # columns are counted from `start` in the strip
        inner = np.arange(max(rows.start, start), min(rows.stop, start + strip.rows)) - start
        at = inner * 2 * width + width - start
        begin, end = np.searchsorted(place, at + head), np.searchsorted(place, at + high)
        shifted = strip.cols + np.int32(start)
        out += [
            [*before, shifted[a:b], *after]
            for a, b in zip(begin.tolist(), end.tolist(), strict=True)
        ]
    return out


def forget_masks() -> None:
    """Empty the memory of masks, so that the next is built anew."""
    for remembered in (_strip, _build):
        remembered.cache_clear()
