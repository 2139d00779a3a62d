"""Neighbourhood and sliding-tile windows on grids of tokens, as block masks.

A window is a product of axes, so a block of the mask is too: whether a tile of queries keeps
any or all of a tile of keys is decided axis by axis, on maps no larger than an axis is long.

References:
    Hassani et al., "Generalized Neighborhood Attention", 2025 (arXiv 2504.16922), and NATTEN
    for the windows, their stride and the borders. Hassani and Shi, "Dilated Neighborhood
    Attention Transformer", 2022 (arXiv 2209.15001), for the dilation. Zhang et al., "Fast Video
    Generation with Sliding Tile Attention", ICML 2025 (arXiv 2502.04507): a window whose stride
    is the tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from .bitmaps import EMPTY, FULL, mask_of_kinds
from .mask import BlockMask

__all__ = ["TileOrder", "Window", "axis_map", "window_mask"]


@dataclass(frozen=True)
class Window:
    """Which keys a query keeps along one axis.

    Args:
        size: keys in a window, K. Windows are shifted inwards at the ends, so that each query
            keeps K keys; an even window has one more key to the left.
        stride: queries in this many neighbouring places share the window of the middle one.
        dilation: only every so manyth place counts, for queries and keys alike.
        causal: whether only keys up to the query's place are kept; near the start then fewer
            than K.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.size or self.dilation < 1:
            raise ValueError(
                f"a window of size {self.size}, stride {self.stride}, dilation {self.dilation}: "
                "expected 1 <= stride <= size and dilation of at least 1"
            )

    def check(self, length: int) -> None:
        """Refuse an axis that is too short.

        Args:
            length: places along the axis.
        """
        if self.size * self.dilation > length:
            raise ValueError(
                f"a window of {self.size} with dilation {self.dilation} needs "
                f"{self.size * self.dilation} places, the axis has {length}"
            )


def axis_map(length: int, window: Window) -> Tensor:
    """Return which keys each query keeps along one axis, bool [length, length]."""
    window.check(length)
    place = torch.arange(length)
    group, index = place % window.dilation, place // window.dilation
    last = (length - 1 - group) // window.dilation  # of the places that count for a query
    stride, size = window.stride, window.size
    begin = index // stride * stride
    if window.causal:
        leader = (begin + stride - 1).minimum(last)
        kept = (index[None] <= index[:, None]) & (leader[:, None] - index[None] < size)
    else:
        left, right = size // 2, size // 2 - 1 + size % 2
        middle = (begin + stride // 2).minimum(last)
        middle = middle.clamp_min(left).minimum(last - right)
        away = index[None] - middle[:, None]
        kept = (away >= -left) & (away <= right)
    return kept & (group[:, None] == group[None])


@dataclass(frozen=True)
class TileOrder:
    """An order of the tokens of a grid in which each tile is one block of the mask.

    Along an axis with dilation the places that see each other come together first. Axes are
    padded to whole tiles; text tokens follow behind.

    Args:
        grid: tokens along each axis, such as (frames, rows, columns).
        tile: tokens of a tile along each axis; their product is the block.
        dilation: of the windows, for each axis.
        text: tokens behind the grid's.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]
    text: int = 0

    def __post_init__(self) -> None:
        if not len(self.grid) == len(self.tile) == len(self.dilation) or not self.grid:
            raise ValueError(
                f"a grid {self.grid}, tile {self.tile} and dilation {self.dilation}: expected "
                "as many axes each"
            )

    @property
    def block(self) -> int:
        """Tokens of a tile."""
        return math.prod(self.tile)

    @functools.cached_property
    def places(self) -> tuple[Tensor, ...]:
        """For each axis the place that stands in each slot, -1 in padding, int64 [slots]."""
        return tuple(map(_axis_places, self.grid, self.tile, self.dilation))

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(len(p) // t for p, t in zip(self.places, self.tile, strict=True))

    @functools.cached_property
    def slots(self) -> Tensor:
        """Token in each place of the new order, -1 in padding, int64 [tiles x block + text]."""
        token = torch.zeros((), dtype=torch.int64)
        real = torch.ones((), dtype=torch.bool)
        for places, length in zip(self.places, self.grid, strict=True):
            token = token[..., None] * length + places.clamp_min(0)
            real = real[..., None] & (places >= 0)
        token = self._tiled(torch.where(real, token, -1))
        return torch.cat([token, math.prod(self.grid) + torch.arange(self.text)])

    @functools.cached_property
    def back(self) -> Tensor:
        """Slot of each token, int64 [tokens]."""
        out = torch.empty(math.prod(self.grid) + self.text, dtype=torch.int64)
        real = self.slots >= 0
        out[self.slots[real]] = torch.arange(len(self.slots))[real]
        return out

    def _tiled(self, x: Tensor) -> Tensor:
        """Return slots of the padded grid, tile by tile."""
        axes = len(self.grid)
        cut = [n for pair in zip(self.tiles, self.tile, strict=True) for n in pair]
        outer, inner = range(0, 2 * axes, 2), range(1, 2 * axes, 2)
        return x.reshape(cut).permute(*outer, *inner).flatten()

    def sort(self, x: Tensor, dim: int = -2) -> Tensor:
        """Return tokens in this order, padding filled with the first token."""
        return x.index_select(dim, self.slots.clamp_min(0).to(x.device))

    def unsort(self, x: Tensor, dim: int = -2) -> Tensor:
        """Return tokens in their own order again, padding left out."""
        return x.index_select(dim, self.back.to(x.device))


def _axis_places(length: int, tile: int, dilation: int) -> Tensor:
    classes = [torch.arange(g, length, dilation) for g in range(min(dilation, length))]
    return torch.cat([functional.pad(c, (0, -len(c) % tile), value=-1) for c in classes])


def window_mask(
    grid: Sequence[int],
    windows: Sequence[Window],
    tile: Sequence[int],
    *,
    text: int = 0,
) -> tuple[BlockMask, TileOrder]:
    """Return the mask of a window on a grid, and the order of tokens it is for.

    Args:
        grid: tokens along each axis, such as (frames, rows, columns), raster order.
        windows: the window along each axis. `Window(n)` of the whole axis keeps all of it; a
            stride equal to the tile makes windows of whole tiles, as Sliding Tile Attention's.
        tile: tokens of a tile along each axis; the product is the block: 32, 64, 128 or 256.
        text: tokens behind those of the grid, which keep all keys and are kept by all queries.

    Returns:
        The mask, and the order: `order.sort` the queries, keys and values (or the hidden
        states, once per forward), and `order.unsort` the output.

    Raises:
        ValueError: if the numbers of axes differ, or a window does not fit its axis.
    """
    dilation = tuple(w.dilation for w in windows)
    order = TileOrder(tuple(grid), tuple(tile), dilation, text)
    maps = [
        _Axis(axis_map(n, w), places, t)
        for n, w, places, t in zip(order.grid, windows, order.places, order.tile, strict=True)
    ]
    some = _outer([a.some for a in maps])
    whole = _outer([a.whole for a in maps])
    kinds = _numbers([a.kinds for a in maps], [len(a.tiles) for a in maps])
    kinds = torch.where(whole, FULL, torch.where(some, kinds, EMPTY))
    if text:
        kinds = _with_text(kinds, maps, order)
    bitmaps = functools.partial(_bitmaps, maps, order)
    return mask_of_kinds(kinds, bitmaps, len(order.slots), order.block), order


class _Axis:
    """What an axis says of each pair of its tiles.

    Args:
        kept: bool [length, length].
        places: place in each slot, -1 in padding.
        tile: slots of a tile.
    """

    def __init__(self, kept: Tensor, places: Tensor, tile: int) -> None:
        real = places >= 0
        at = places.clamp_min(0)
        self.real = real.view(-1, tile)
        pairs = kept[at][:, at] & real[:, None] & real
        cut = pairs.view(-1, tile, len(places) // tile, tile).transpose(1, 2)  # [T, T, t, t]
        self.some = cut.flatten(2).any(-1)
        # queries that are padding are asked for nothing
        self.whole = (cut | ~self.real[:, None, :, None]).flatten(2).all(-1)
        flat, kinds = cut.flatten(0, 1).flatten(1).unique(dim=0, return_inverse=True)
        self.tiles = flat.view(-1, tile, tile)
        self.kinds = kinds.view(self.some.shape)


def _outer(maps: Sequence[Tensor]) -> Tensor:
    """Return the product of bool maps [Ta, Ta] as one [prod T, prod T]."""
    out = torch.ones(1, 1, dtype=torch.bool)
    for one in maps:
        joined = out[:, None, :, None] & one[None, :, None, :]
        out = joined.reshape(len(out) * len(one), -1)
    return out


def _numbers(kinds: Sequence[Tensor], bases: Sequence[int]) -> Tensor:
    """Return one number for each combination of the axes' kinds, int64 [prod T, prod T]."""
    out = torch.zeros(1, 1, dtype=torch.int64)
    for one, base in zip(kinds, bases, strict=True):
        joined = out[:, None, :, None] * base + one[None, :, None, :]
        out = joined.reshape(len(out) * len(one), -1)
    return out


def _with_text(kinds: Tensor, maps: Sequence[_Axis], order: TileOrder) -> Tensor:
    """Return kinds with blocks of text behind, below the bitmaps of padded tiles."""
    blocks = -(-order.text // order.block)
    kinds = functional.pad(kinds, (0, blocks, 0, blocks), value=FULL)
    padded = ~_tile_real(maps).all(-1)
    columns = padded.nonzero()[:, 0]
    kinds[len(padded) :, columns] = -3 - columns
    return kinds


def _tile_real(maps: Sequence[_Axis]) -> Tensor:
    """Return which slots of each tile hold a token, bool [tiles, block]."""
    out = torch.ones(1, 1, dtype=torch.bool)
    for axis in maps:
        joined = out[:, None, :, None] & axis.real[None, :, None, :]
        out = joined.reshape(len(out) * len(axis.real), -1)
    return out


def _bitmaps(maps: Sequence[_Axis], order: TileOrder, kinds: Tensor) -> Tensor:
    """Return bool [n, block, block] of kinds that are not full: windows, or padded tiles."""
    out = torch.ones(len(kinds), 1, 1, dtype=torch.bool)
    left = kinds.clamp_min(0)
    for axis in reversed(maps):
        tiles = axis.tiles[left % len(axis.tiles)]
        left = left // len(axis.tiles)
        joined = tiles[:, :, None, :, None] & out[:, None, :, None, :]
        size = tiles.shape[1] * out.shape[1]
        out = joined.reshape(len(kinds), size, size)
    padded = kinds <= -3
    if bool(padded.any()):
        out[padded] = _tile_real(maps)[-3 - kinds[padded]][:, None].expand(-1, order.block, -1)
    return out
