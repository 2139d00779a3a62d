"""Head-level skip-layer guidance: chosen heads contribute nothing in the perturbed pass.

    O' = 0

Skip-layer guidance drops whole blocks of SD3.5 (blocks 7, 8, 9, scale 2.8, from 1 % to 20 % of
the steps, so never the first one). This is its analogue for single heads: the block's MLP and
the other heads stay.

References:
    Stability AI, SD3.5 skip-layer guidance, 2024 (no paper); Hyung et al., "Spatiotemporal Skip
    Guidance", 2024 (arXiv 2411.18664).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["SLG"]


@register
@dataclass(frozen=True)
class SLG(PerturbedGuidance):
    """Skip guidance on heads; options as in `PerturbedGuidance`."""

    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    name: ClassVar[str] = "slg"

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(out)
