"""DisenDiff's losses at inference: an attribute on its object, objects apart, shapes kept.

With n(A) a map scaled to [0, 1] and blurred, f(A) its square (objects only) and

    IoU(a, b) = (sum a b + 1) / (sum (a + b) - sum a b + 1)

    L = bind   * sum over attributes of 1 - IoU(stop gradient of f n(noun), n(attribute))
      + separate * mean over pairs of IoU(f n(noun i), f n(noun j))

The union in the ratio keeps objects from shrinking, which plain overlap does to them.

References:
    Zhang et al., "Attention Calibration for Disentangled Text-to-Image Personalization", CVPR
    2024 (arXiv 2403.18551). The paper trains with these losses; to move latents by them is ours,
    with the step sizes of Attend-and-Excite.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import OptionError

from .engine import LatentControl, Maps
from .maps import smoothed

__all__ = ["DisenDiff", "min_max", "soft_iou"]


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return (sum a b + 1) / (sum (a + b) - sum a b + 1), in (0, 1] for maps in [0, 1]."""
    shared = (a * b).sum()
    return (shared + 1) / ((a + b).sum() - shared + 1)


def min_max(maps: Tensor) -> Tensor:
    """Return maps [K, ...] each scaled to [0, 1]; a constant one becomes 0."""
    low, high = (
        reduce(maps.flatten(1), 1).view(-1, *[1] * (maps.ndim - 1))
        for reduce in (torch.amin, torch.amax)
    )
    return (maps - low) / (high - low + 1e-8)


@register
@dataclass(frozen=True)
class DisenDiff(LatentControl):
    """Bind attributes, separate objects; further options as in `LatentControl`.

    Args:
        bind: weight of the attributes' part.
        separate: weight of the objects' part.
    """

    bind: float = 1.0
    separate: float = 1.0

    name: ClassVar[str] = "disendiff"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.bind, self.separate) < 0:
            raise OptionError(
                f"{self.name}: bind={self.bind} and separate={self.separate} must be 0 or above"
            )

    @property
    def neutral(self) -> bool:
        """Nothing weighs anything."""
        return super().neutral or self.bind == self.separate == 0

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the weighted sum of both parts."""
        objects = smoothed(min_max(maps.objects(maps.text))).square()
        total = objects.sum() * 0
        for target, noun in zip(maps.targets, objects.detach(), strict=True):
            for word in target.attributes:
                attribute = smoothed(min_max(maps.word(maps.text, word)[None]))[0]
                total = total + self.bind * (1 - soft_iou(noun, attribute))
        pairs = itertools.combinations(objects, 2)
        apart = [soft_iou(a, b) for a, b in pairs]
        return total + self.separate * torch.stack(apart).mean() if apart else total
