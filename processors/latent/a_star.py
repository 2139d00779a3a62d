"""A-STAR: maps of different objects kept apart, and kept over the steps.

With A_m the map of object m and B_m a mask of where it was at the step before,

    L_seg = sum over pairs m, n of  sum min(A_m, A_n) / sum (A_m + A_n)
    L_ret = sum over m of  1 - sum min(A_m, B_m) / sum (A_m + B_m)

and L is their weighted sum. A layout of the user's own masks in the place of B makes it a
control of where things are.

References:
    Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention", ICCV 2023
    (arXiv 2306.14544). No official code is public.

Ours, where the paper is silent: maps are made as Attend-and-Excite makes them and divided by
their maximum for L_ret; B is where the map is above half of its maximum; step sizes are those of
Attend-and-Excite; one update a step. The overlap of one pair lies in [0, 1/2] and one retention
term in [1/2, 1], since the denominators are sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attnctl.control import register
from attnctl.errors import OptionError

from .engine import LatentControl, Maps

__all__ = ["AStar", "overlap", "peak_mask", "retention", "segregation"]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return sum min(a, b) / sum (a + b), in [0, 1/2] for values of 0 and above.

    Args:
        a: maps [K, ...].
        b: the same shape.

    Returns:
        [K]; the sums leave out the first dimension.
    """
    total = (a + b).flatten(1).sum(1)
    shared = torch.minimum(a, b).flatten(1).sum(1)
    return shared / total.clamp_min(torch.finfo(total.dtype).tiny)


def segregation(maps: Tensor) -> Tensor:
    """Return L_seg of maps [K, ...]: the overlaps of all pairs, summed."""
    # all pairs m, m + d at once: a step waits for every operation that is launched
    apart = [overlap(maps[:-d], maps[d:]) for d in range(1, len(maps))]
    return (torch.cat(apart) if len(apart) > 1 else apart[0]).sum()


def retention(maps: Tensor, masks: Tensor) -> Tensor:
    """Return L_ret of maps [K, ...] with values up to 1, against constant masks [K, ...]."""
    return (1 - overlap(maps, masks.detach())).sum()


def peak_mask(maps: Tensor, level: float = 0.5) -> Tensor:
    """Return where each map [K, ...] is above `level` of its maximum, as 0 and 1."""
    return (maps > level * _peaks(maps)).to(maps.dtype).detach()


def _peaks(maps: Tensor) -> Tensor:
    tiny = torch.finfo(maps.dtype).tiny
    return maps.flatten(1).amax(1).clamp_min(tiny).view(-1, *[1] * (maps.ndim - 1))


@register
@dataclass(frozen=True)
class AStar(LatentControl):
    """Segregation and retention of the objects' maps; further options as in `LatentControl`.

    Args:
        segregate: weight of L_seg.
        retain: weight of L_ret.
        level: of its maximum, above which a map makes the next step's mask.
        layout: where the objects are to be, instead of where they were: one entry an object, in
            order, or by number; each a box (left, top, right, bottom) in parts of the picture,
            or a mask [h, w] of 0 to 1.
    """

    segregate: float = 1.0
    retain: float = 1.0
    level: float = 0.5
    layout: Any | None = None

    name: ClassVar[str] = "a-star"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.segregate, self.retain) < 0:
            raise OptionError(
                f"{self.name}: segregate={self.segregate} and retain={self.retain} must be 0 or "
                "above"
            )
        if not 0 <= self.level < 1:
            raise OptionError(f"{self.name}: level={self.level} is outside [0, 1)")

    @property
    def least(self) -> int:  # type: ignore[override]
        """Two objects, unless they are not kept apart."""
        return 2 if self.segregate else 1

    @property
    def neutral(self) -> bool:
        """Nothing weighs anything."""
        return super().neutral or self.segregate == self.retain == 0

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the weighted sum of L_seg and L_ret."""
        a = maps.smooth
        terms = [self.segregate * segregation(a)] if self.segregate else []
        masks = memory.get("masks") if self.layout is None else _masks(self.layout, a)
        if self.retain and masks is not None:
            terms.append(self.retain * retention(a / _peaks(a), masks))
        return sum(terms[1:], terms[0]) if terms else a.new_zeros(())

    def remember(self, maps: Maps, memory: dict[str, Any]) -> None:
        """Keep where the objects are."""
        memory["masks"] = peak_mask(maps.smooth.detach(), self.level)


def _masks(layout: Any, maps: Tensor) -> Tensor:
    """Return a layout as masks of the size of the maps [K, frames, height, width]."""
    entries = list(layout.values()) if isinstance(layout, Mapping) else list(layout)
    if len(entries) != len(maps):
        raise OptionError(
            f"the layout has {len(entries)} places for {len(maps)} objects; give one for each"
        )
    return torch.stack([_mask(entry, maps) for entry in entries])


def _mask(entry: Tensor | Sequence[float], maps: Tensor) -> Tensor:
    height, width = maps.shape[-2:]
    if isinstance(entry, Tensor):
        if entry.ndim != 2:
            raise OptionError(f"a mask of the layout has shape {tuple(entry.shape)}, not [h, w]")
        flat = entry.to(maps)[None, None]
        return interpolate(flat, (height, width), mode="area")[0].expand(maps.shape[1:])
    if len(entry) != 4 or not (0 <= entry[0] < entry[2] <= 1 and 0 <= entry[1] < entry[3] <= 1):
        raise OptionError(
            f"the place {entry!r} is no box (left, top, right, bottom) in parts of the picture"
        )
    left, top, right, bottom = entry
    x = (torch.arange(width, device=maps.device) + 0.5) / width
    y = (torch.arange(height, device=maps.device) + 0.5) / height
    inside = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    return inside.to(maps.dtype).expand(maps.shape[1:])
