"""Temperature guidance (MG): the attention of chosen heads made sharper or flatter.

    A' = softmax(q k^T scale / tau)

tau < 1 sharpens (towards one-hot as tau -> 0), tau > 1 flattens. The official code multiplies
the logits by its "temperature", which is 1 / tau here and in the paper.

References:
    Ahn et al., "Where and How to Perturb", 2025 (arXiv 2506.10978), "MG".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnctl.control import register
from attnctl.errors import OptionError
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["TemperatureGuidance"]


@register
@dataclass(frozen=True)
class TemperatureGuidance(PerturbedGuidance):
    """Guidance away from attention at another temperature.

    Args:
        tau: temperature, > 0; 1 changes nothing.
        heads, scale, u, start, stop, sigmas, adaptive, convention, passes: see
            `PerturbedGuidance`.
    """

    tau: float = 1e-5

    name: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise OptionError(f"{self.name}: tau={self.tau} must be above 0")

    @property
    def neutral(self) -> bool:
        """Also neutral at tau = 1."""
        return self.tau == 1 or super().neutral

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return attention with logits divided by tau."""
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        return call.proceed(scale=scale / self.tau)
