"""VAR's rule on the masses of three groups of keys: where attention is moved, and by how much.

The groups, in this order: text sinks, image sinks, the other image tokens (codes 1, 2 and 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reads_image", "redistribution"]

TEXT_SINKS, IMAGE_SINKS, IMAGE = 0, 1, 2
"""The groups of keys."""


def reads_image(masses: Tensor, rho: float, image_mass: float) -> Tensor:
    """Return in which rows and heads the attention is redistributed.

    Args:
        masses: [..., 3], attention to text sinks, image sinks and the other image tokens.
        rho: least share of the others in the attention to the image.
        image_mass: least attention to the image.

    Returns:
        bool [...]. Rows that see no image sink, or no other image token, are left out.
    """
    sinks, others = masses[..., IMAGE_SINKS], masses[..., IMAGE]
    image = sinks + others
    return (image >= image_mass) & (others >= rho * image) & (sinks > 0) & (others > 0)


def redistribution(masses: Tensor, chosen: Tensor, p: float) -> Tensor:
    """Return the factors on the weights of the three groups.

    Args:
        masses: [..., 3], attention to text sinks, image sinks and the other image tokens.
        chosen: bool [...], where to redistribute.
        p: share of the sinks' attention that is moved.

    Returns:
        [..., 3]: 1 - p, 1 - p and 1 + p m_S / m_V where chosen, else 1.
    """
    sinks = masses[..., TEXT_SINKS] + masses[..., IMAGE_SINKS]
    others = masses[..., IMAGE]
    raised = 1 + p * sinks / torch.where(chosen, others, 1.0)
    lowered = torch.full_like(raised, 1 - p)
    factors = torch.stack([lowered, lowered, raised], dim=-1)
    return torch.where(chosen[..., None], factors, 1.0)
