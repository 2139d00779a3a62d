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
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import OptionError
from attnctl.processors.steering.regions import checked_region, coverage

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
        layout: where the objects are to be, instead of where they were: {phrase: region}, the
            phrases being the objects (instead of `words`), or a list of such, one per prompt;
            a list of regions, in the order of the objects; or "row", the objects next to each
            other, from left to right. Regions as (x, y), (x, y, radius), (left, top, right,
            bottom), all from 0 to 1, or a mask [h, w].
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
        if self.layout is not None and not self.retain:
            raise OptionError(f"{self.name}: a layout acts by L_ret, which retain=0 leaves out")
        named = any(isinstance(one, Mapping) for one in self._layouts)
        if named and self.words is not None:
            raise OptionError(
                f"{self.name}: the layout's phrases are the objects, so words={self.words!r} are "
                "too many; leave them out, or give a list of regions in their order"
            )

    @property
    def least(self) -> int:  # type: ignore[override]
        """Two objects, unless they are not kept apart."""
        return 2 if self.segregate else 1

    @property
    def neutral(self) -> bool:
        """Nothing weighs anything."""
        return super().neutral or self.segregate == self.retain == 0

    @cached_property
    def _layouts(self) -> list[Any]:
        """Return the layout of every prompt, or one for all; none for a word or without one.

        Each is a mapping or a list of regions, whose form is checked.
        """
        given = self.layout
        if given is None or given == "row":
            return []
        if isinstance(given, (str, bytes)) or not isinstance(given, (Mapping, Sequence)):
            raise OptionError(
                f"{self.name}: layout={given!r} must be {{phrase: region}}, a list of regions, or "
                "'row'"
            )
        each = isinstance(given, Sequence) and all(isinstance(one, Mapping) for one in given)
        return [_checked(one) for one in (given if each else [given])]

    def objects(self, prompt: int, prompts: int) -> Any:
        """Return the phrases of the prompt's layout, else `words`."""
        layouts = self._layouts
        if len(layouts) > 1 and len(layouts) != prompts:
            raise OptionError(
                f"{self.name}: {len(layouts)} layouts for {prompts} prompts; give one for all or "
                "one each"
            )
        mine = layouts[prompt if len(layouts) > 1 else 0] if layouts else None
        return list(mine) if isinstance(mine, Mapping) else self.words

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the weighted sum of L_seg and L_ret."""
        a = maps.smooth
        terms = [self.segregate * segregation(a)] if self.segregate else []
        masks = memory.get("masks") if self.layout is None else self._masks(maps.prompt, a)
        if self.retain and masks is not None:
            terms.append(self.retain * retention(a / _peaks(a), masks))
        return sum(terms[1:], terms[0]) if terms else a.new_zeros(())

    def remember(self, maps: Maps, memory: dict[str, Any]) -> None:
        """Keep where the objects are."""
        memory["masks"] = peak_mask(maps.smooth.detach(), self.level)

    def _masks(self, prompt: int, maps: Tensor) -> Tensor:
        """Return a prompt's layout as masks of the size of the maps [K, frames, h, w]."""
        layouts, count = self._layouts, len(maps)
        mine = layouts[prompt if len(layouts) > 1 else 0] if layouts else _row(count)
        regions = list(mine.values()) if isinstance(mine, Mapping) else mine
        if len(regions) != count:
            raise OptionError(
                f"the layout has {len(regions)} places for {count} objects; give one for each"
            )
        frames, height, width = maps.shape[1:]
        each = [coverage(region, (frames, height, width), maps.device) for region in regions]
        return torch.stack(each).to(maps.dtype).view_as(maps)


def _row(count: int) -> list[tuple[float, float, float, float]]:
    return [(i / count, 0.0, (i + 1) / count, 1.0) for i in range(count)]


def _checked(layout: Any) -> Any:
    if isinstance(layout, Mapping):
        number = next((key for key in layout if isinstance(key, int)), None)
        if number is not None:
            raise OptionError(
                f"the layout has the key {number}; expected phrases of the prompt. For token "
                "positions give words=[[3], [7]] and a list of regions in their order"
            )
        return {key: checked_region(region, str(key)) for key, region in layout.items()}
    return [checked_region(region, f"object {i}") for i, region in enumerate(layout, 1)]
