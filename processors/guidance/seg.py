"""SEG: smoothed-energy guidance, queries of the perturbed pass blurred over the image.

    Q' = G_sigma * Q   (2-D Gaussian over the token grid),   O' = softmax(Q' K^T / sqrt(d)) V

With sigma -> inf every query becomes the mean query. Kernel size ceil(6 sigma) made odd, at
most the grid's size, reflected at the border; a sigma above 9999 is the infinite limit.

References:
    Hong, "Smoothed Energy Guidance", NeurIPS 2024 (arXiv 2408.00760), eq. 9 and appendix.

Defaults: scale 3; the official SDXL example uses the mid block with sigma 100. Deviation: the
official code takes the grid to be square; here it is the true (h, w), frame by frame for
video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["SEG", "blur_queries"]

INFINITE = 9999.0


def blur_queries(q: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Blur queries over their grid.

    Args:
        q: [B, H, N, D] with N = frames x height x width, row-major.
        grid: (frames, height, width).
        sigma: standard deviation in tokens; above 9999 all queries become their mean.

    Returns:
        [B, H, N, D].
    """
    if sigma > INFINITE:
        return q.mean(dim=2, keepdim=True).expand_as(q)
    b, h, n, d = q.shape
    frames, high, wide = grid
    image = q.reshape(b, h, frames, high, wide, d).permute(0, 1, 2, 5, 3, 4)
    image = image.reshape(-1, 1, high, wide)
    for axis, size in ((2, high), (3, wide)):
        image = _blur_axis(image, _kernel(sigma, size, q), axis)
    image = image.reshape(b, h, frames, d, high, wide).permute(0, 1, 2, 4, 5, 3)
    return image.reshape(b, h, n, d)


def _kernel(sigma: float, size: int, like: Tensor) -> Tensor:
    """Return the normalised 1-D Gaussian, odd length, at most the axis (made odd upwards)."""
    length = math.ceil(6 * sigma)
    length = min(length + 1 - length % 2, size + 1 - size % 2)
    x = torch.arange(length, device=like.device, dtype=torch.float32) - length // 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).to(like.dtype)


def _blur_axis(image: Tensor, kernel: Tensor, axis: int) -> Tensor:
    reach = len(kernel) // 2
    if reach == 0:
        return image
    padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
    shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
    return F.conv2d(F.pad(image, padding, mode="reflect"), kernel.view(shape))


@register
@dataclass(frozen=True)
class SEG(PerturbedGuidance):
    """Smoothed-energy guidance.

    Args:
        sigma: blur in tokens, > 0; above 9999 the infinite limit.
        tokens: whose queries are blurred in a joint sequence: "image", or "all" (text queries
            then become their mean along with the image's; needs the infinite limit).
        heads, scale, u, start, stop, sigmas, adaptive, convention, passes: see
            `PerturbedGuidance`.
    """

    sigma: float = 10_000.0
    tokens: Literal["image", "all"] = "image"

    name: ClassVar[str] = "seg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise OptionError(f"{self.name}: sigma={self.sigma} must be above 0")
        if self.tokens not in ("image", "all"):
            raise OptionError(f"{self.name}: tokens={self.tokens!r} is not one of image, all")
        if self.tokens == "all" and self.sigma <= INFINITE:
            raise OptionError(
                f'{self.name}: tokens="all" has no grid to blur over; it needs sigma above 9999'
            )

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return attention with blurred queries."""
        if self.tokens == "all":
            return call.proceed(q=blur_queries(call.q, (1, 1, call.q.shape[2]), self.sigma))
        spans = call.spans
        image = spans.queries("image")
        if image is None or (spans.grid is None and self.sigma <= INFINITE):
            raise HostError(
                f"{call.site}: the token grid is not known for this model, so queries cannot be "
                'blurred; tokens="all" with sigma above 9999 works without it'
            )
        grid = spans.grid or (1, 1, image.stop - image.start)
        q = call.q.clone()
        q[:, :, image] = blur_queries(call.q[:, :, image], grid, self.sigma)
        return call.proceed(q=q)
