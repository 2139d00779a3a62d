"""SEG: smoothed-energy guidance, queries of the perturbed pass blurred over the image.

    Q' = G_sigma * Q   (2-D Gaussian over the token grid),   O' = softmax(Q' K^T / sqrt(d)) V

With sigma -> inf every query becomes the mean query, so that one row of attention is enough.
Kernel size ceil(6 sigma) made odd, at most the grid's size, reflected at the border; a sigma
above 9999 is the infinite limit.

References:
    Hong, "Smoothed Energy Guidance", NeurIPS 2024 (arXiv 2408.00760), eq. 9 and appendix.

Defaults: scale 3; the official SDXL example uses the mid block with sigma 100. Deviation: the
official code takes the grid to be square; here it is the true (h, w). Video is blurred frame
by frame, its infinite limit is the mean over all frames.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["SEG", "blur_matrix", "blur_queries"]

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
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, columns = (_matrix_on(sigma, n, wide, q.device) for n in grid[1:])
    image = q.to(wide).unflatten(2, grid)  # [B, H, frames, height, width, D]
    image = columns @ image
    image = (rows @ image.flatten(4)).view(image.shape)
    return image.flatten(2, 4).to(q.dtype)


@functools.lru_cache(maxsize=64)
def _matrix_on(sigma: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return blur_matrix(sigma, size).to(device, dtype)


def blur_matrix(sigma: float, size: int) -> Tensor:
    """Return the 1-D Gaussian blur of an axis as a matrix.

    Args:
        sigma: standard deviation in tokens.
        size: tokens along the axis.

    Returns:
        [size, size] in float64, rows sum to one: the kernel of odd length, at most the axis
        (made odd upwards), centred on each token, with what lies outside reflected.
    """
    length = math.ceil(6 * sigma)
    length = min(length + 1 - length % 2, size + 1 - size % 2)
    offsets = torch.arange(length, dtype=torch.float64) - length // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    at = (torch.arange(size)[:, None] + offsets.long()).abs()
    at = torch.where(at >= size, 2 * (size - 1) - at, at)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, at, (weights / weights.sum()).expand(size, -1))


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
        """Return attention with blurred queries; other rows stay as they are."""
        if self.tokens == "all":
            return self._attend(call, slice(0, call.q.shape[2]), (1, 1, call.q.shape[2]))
        spans = call.spans
        image = spans.queries("image")
        if image is None or (spans.grid is None and self.sigma <= INFINITE):
            raise HostError(
                f"{call.site}: the token grid is not known for this model, so queries cannot be "
                'blurred; tokens="all" with sigma above 9999 works without it'
            )
        grid = spans.grid or (1, 1, image.stop - image.start)
        result = out.clone()
        result[:, :, image] = self._attend(call, image, grid)
        return result

    def _attend(self, call: AttentionCall, at: slice, grid: tuple[int, int, int]) -> Tensor:
        """Return the output [b, h, n, D] of the n queries `at`, blurred."""
        q, mask = call.q[:, :, at], call.mask
        new = blur_queries(q, grid, self.sigma)
        if call.is_causal:
            whole = call.q.clone()
            whole[:, :, at] = new
            return call.proceed(q=whole)[:, :, at]
        if mask is not None and mask.ndim >= 2 and mask.shape[-2] > 1:
            return call.proceed(q=new.contiguous(), mask=mask[..., at, :])
        if self.sigma > INFINITE:  # all rows are the same
            return call.proceed(q=new[:, :, :1]).expand(*q.shape[:3], -1)
        return call.proceed(q=new)
