"""Uniform guidance: the attention map of chosen heads replaced by the uniform one.

    A'_ij = 1 / N over the keys that row i may see,   so   O'_i = mean of V

An additive mask stays as it is: finite biases in it (most models have none) still count.

References:
    Ahn et al., "Where and How to Perturb", 2025 (arXiv 2506.10978), "UG".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["UniformGuidance"]


@register
@dataclass(frozen=True)
class UniformGuidance(PerturbedGuidance):
    """Guidance away from uniform attention; options as in `PerturbedGuidance`."""

    name: ClassVar[str] = "uniform"

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return the mean of the values each query may see."""
        if call.mask is None and not call.is_causal:
            return call.repeat_kv(call.v.mean(dim=2, keepdim=True)).expand_as(out)
        # zero queries give equal logits, so the mask alone decides
        return call.proceed(q=torch.zeros_like(call.q))
