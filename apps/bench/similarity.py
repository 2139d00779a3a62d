"""How near pictures are to reference pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

__all__ = ["psnr", "ssim"]

WIDTH, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB; 100 where they are the same.

    Args:
        images: [N, ...] in 0 to 1.
        truth: the same shape.
    """
    return -10 * (images - truth).square().flatten(1).mean(1).clamp(min=1e-10).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity [N], mean over windows and channels.

    Gaussian windows of 11 x 11 with sigma 1.5, inside the picture only.

    Args:
        images: [N, C, H, W] in 0 to 1, sides of at least 11.
        truth: the same shape.

    Reference:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE TIP 2004, equation 13.
    """
    x, y = images.double(), truth.double()
    mx, my = _blurred(x), _blurred(y)
    vx, vy = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my
    both = _blurred(x * y) - mx * my
    c1, c2 = K1**2, K2**2
    top = (2 * mx * my + c1) * (2 * both + c2)
    return (top / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    place = torch.arange(WIDTH, dtype=x.dtype, device=x.device) - WIDTH // 2
    line = torch.exp(-(place**2) / (2 * SIGMA**2))
    kernel = line / line.sum()
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = functional.conv2d(
        functional.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None]
    )
    return flat.view(*x.shape[:-2], *flat.shape[-2:])
