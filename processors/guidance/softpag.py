"""SoftPAG: PAG on chosen heads with a strength knob.

    A' = (1 - u) A + u I,   so   O' = (1 - u) O + u V = lerp(O, V, u)

No map is formed. Head sets come from HeadHunter's search; u is tuned afterwards.

References:
    Ahn et al., "Where and How to Perturb: On the Design of Perturbation Guidance in Diffusion
    and Flow Models", NeurIPS 2025 (arXiv 2506.10978), section 4.

Defaults: scale 3, u 0.5 (the paper's sweet spot for about nine heads), every step. The paper
uses u = 0.25 with 24 heads for quality, u = 1 with 15 heads for styles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnctl.control import register

from .pag import PAG

__all__ = ["SoftPAG"]


@register
@dataclass(frozen=True)
class SoftPAG(PAG):
    """PAG with strength u on chosen heads; options as in `PAG`."""

    u: float = 0.5

    name: ClassVar[str] = "softpag"
