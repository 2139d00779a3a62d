"""Pixel objectives: no weights, differentiable, good to see that a search works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .objective import Objective

__all__ = ["Brightness", "Edges", "Redness", "luma"]

_REC709 = (0.2126, 0.7152, 0.0722)


def luma(images: Tensor) -> Tensor:
    """Return the brightness [n, H, W] of RGB pictures [n, 3, H, W] (Rec. 709 weights)."""
    weights = images.new_tensor(_REC709)[:, None, None]
    return (images * weights).sum(1)


class Redness(Objective):
    """Mean of red minus the mean of green and blue."""

    name: ClassVar[str] = "redness"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n], each -1 to 1."""
        red, green, blue = images.float().unbind(1)
        return (red - (green + blue) / 2).mean((1, 2))


class Brightness(Objective):
    """Mean luma."""

    name: ClassVar[str] = "brightness"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n], each 0 to 1."""
        return luma(images.float()).mean((1, 2))


class Edges(Objective):
    """Mean length of the luma's gradient, per pixel."""

    name: ClassVar[str] = "edges"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n]."""
        grey = luma(images.float())
        dx = grey[:, :-1, 1:] - grey[:, :-1, :-1]
        dy = grey[:, 1:, :-1] - grey[:, :-1, :-1]
        # the constant keeps the root differentiable on flat ground
        return (dx.square() + dy.square() + 1e-8).sqrt().mean((1, 2))
