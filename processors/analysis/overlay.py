"""A heat map laid over a picture, with numpy and Pillow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["coloured", "overlay"]

_STOPS = np.array(
    [[24, 15, 62], [92, 20, 117], [181, 54, 122], [241, 96, 93], [254, 176, 120], [252, 253, 191]]
)
"""Colours from cold to hot; lightness rises evenly, so that they read in grey too."""


def coloured(values: np.ndarray) -> np.ndarray:
    """Return colours [..., 3] from 0 to 255 of values from 0 to 1."""
    at = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(values, at, _STOPS[:, i]) for i in range(3)], axis=-1)


def overlay(
    image: Image,
    heat: Tensor,
    strength: float = 0.75,
    bounds: tuple[float, float] | None = None,
) -> Image:
    """Return a picture in grey with a heat map over it.

    Args:
        image: the picture.
        heat: [h, w], any size.
        strength: opacity of the map in [0, 1].
        bounds: values shown coldest and hottest; None for the map's least and greatest.
    """
    from PIL import Image as Pictures

    values = heat.detach().float().cpu().numpy()
    low, high = bounds or (float(values.min()), float(values.max()))
    values = (values - low) / (high - low) if high > low else np.zeros_like(values)
    smooth = Pictures.fromarray(values.astype(np.float32)).resize(
        image.size, Pictures.Resampling.BICUBIC
    )
    hot = coloured(np.clip(np.asarray(smooth), 0, 1))
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    mixed = (1 - strength) * grey + strength * hot
    return Pictures.fromarray(np.clip(mixed.round(), 0, 255).astype(np.uint8))
