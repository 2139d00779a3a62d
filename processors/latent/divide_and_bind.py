"""Divide & Bind: every object's map varies, and its attributes look where it looks.

    L = max_k ( c JSD(object map k, attribute map k) - TV_k )

TV is the mean absolute difference of neighbours along rows plus that along columns; a map that
varies has places that belong to its object and places that do not. c grows during the run.

References:
    Li et al., "Divide & Bind Your Attention for Improved Generative Semantic Nursing", BMVC 2023
    (arXiv 2307.10864); official code boschresearch/Divide-and-Bind.

Deviations: the official code compares every row with the last one where it means the next
(`released=True` does so too). The divergence is that of the maps divided by their sums, on the
grid of the objects' maps; the official one cuts off and softmaxes them by constants of its own
and takes attributes from finer grids. Several attributes of an object: the mean divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.records import Step

from .attend_and_excite import excite
from .engine import LatentControl, Maps
from .maps import smoothed

__all__ = ["DivideAndBind", "divergence", "total_variation"]


def total_variation(maps: Tensor, released: bool = False) -> Tensor:
    """Return the total variation of maps [..., height, width].

    Args:
        maps: the maps.
        released: compare each row with the last one, as the official code does.

    Returns:
        [...]: mean |x - right neighbour| + mean |x - neighbour below|.
    """
    across = (maps[..., :, 1:] - maps[..., :, :-1]).abs().mean((-1, -2))
    above = maps[..., -1:, :] if released else maps[..., :-1, :]
    return across + (maps[..., 1:, :] - above).abs().mean((-1, -2))


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two maps divided by their sums, in nats."""
    p, q = _distribution(a), _distribution(b)
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum() + (q * (q.log() - middle)).sum()) / 2


def _distribution(x: Tensor) -> Tensor:
    tiny = torch.finfo(x.dtype).tiny
    flat = x.flatten().clamp_min(tiny)
    return (flat / flat.sum()).clamp_min(tiny)


@register
@dataclass(frozen=True)
class DivideAndBind(LatentControl):
    """Variation of the objects' maps, and agreement with their attributes.

    Further options as in `LatentControl`; by default as in the paper's code: the first half of
    the run, refined as Attend-and-Excite is.

    Args:
        bind: factor on the divergences; 0 leaves the attributes alone.
        released: vertical differences as the official code takes them.
    """

    stop: float = 0.5
    updates: int = 20
    bind: float = 1.0
    released: bool = False

    name: ClassVar[str] = "divide-and-bind"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the loss of the object that does worst."""
        sharp = maps.sharp()
        objects = smoothed(maps.objects(sharp))
        terms = -total_variation(objects, self.released).mean(1)
        if self.bind:
            apart = [self._apart(maps, sharp, k, one) for k, one in enumerate(objects)]
            terms = terms + self.bind * _growth(maps.step) * torch.stack(apart)
        return terms.max()

    def _apart(self, maps: Maps, sharp: Tensor, k: int, noun: Tensor) -> Tensor:
        """Return the mean divergence of object k from its attributes, 0 without any."""
        attributes = maps.targets[k].attributes
        if not attributes:
            return noun.sum() * 0
        each = [divergence(noun, smoothed(maps.word(sharp, word))) for word in attributes]
        return torch.stack(each).mean()

    def shortfall(self, maps: Maps, loss: Tensor) -> Tensor:
        """Return how far the weakest peak is from 1, which refinement asks for."""
        return excite(maps.smooth)


def _growth(step: Step) -> float:
    """Return c: 1, then 5 from a fifth and 10 from two fifths of the run on."""
    return 1.0 if step.fraction < 0.2 else 5.0 if step.fraction < 0.4 else 10.0
