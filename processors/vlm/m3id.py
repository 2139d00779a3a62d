"""M3ID: the log-probabilities against those without the image, more and more as text grows.

With l_c and l_u the log-probabilities with and without the image and gamma_t = exp(-lambda t),

    out = l_c + ((1 - gamma_t) / gamma_t) (l_c - l_u)

for the answer's t-th token: the longer the answer, the more a model forgets the image.

References:
    Favero et al., "Multi-Modal Hallucination Control by Visual Information Grounding", CVPR 2024
    (arXiv 2403.14003), equations 5 to 7. There is no official code.

Defaults: lambda 0.02 and beta 0.1, those of a re-implementation (sangminwoo/AvisC); the paper's
own values were not checked. The paper applies the contrast only where the model is unsure:
`confidence`, off by default since its value is not known to us. `cap` is ours: the weight grows
without bound otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.records import LogitsCall

from .contrast import Contrast, without_images

__all__ = ["M3ID", "forgetting"]


def forgetting(lam: float, t: int) -> float:
    """Return (1 - gamma_t) / gamma_t = exp(lambda t) - 1."""
    return math.expm1(lam * t)


@register
@dataclass(frozen=True)
class M3ID(Contrast):
    """Contrast with a pass without the image, growing with the answer (M3ID).

    Args:
        beta: cut-off, in [0, 1]; 0 is none.
        both: whether attention controls of the stack act in the second pass too.
        lam: lambda >= 0, rate of forgetting per token. With 0 the cut-off alone is left.
        confidence: in (0, 1]; the contrast is left out where the most likely token has at
            least this probability. None: never.
        cap: largest weight of the contrast, None for none.
    """

    lam: float = 0.02
    confidence: float | None = None
    cap: float | None = None

    name: ClassVar[str] = "m3id"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("lam", 0)
        if self.confidence is not None:
            self._at_least("confidence", 0, 1)
        if self.cap is not None:
            self._at_least("cap", 0)

    @property
    def cuts_only(self) -> bool:
        """lambda = 0."""
        return self.lam == 0

    def rewrite(self, call: LogitsCall) -> dict[str, Any]:
        """Return the text of the prompt alone."""
        return without_images(call)

    def fuse(self, z: Tensor, weak: Tensor, t: int) -> Tensor:
        """Return l_c + ((1 - gamma_t) / gamma_t) (l_c - l_u)."""
        weight = forgetting(self.lam, t)
        if self.cap is not None:
            weight = min(weight, self.cap)
        seen, unseen = z.log_softmax(-1), weak.log_softmax(-1)
        out = seen + weight * (seen - unseen)
        if self.confidence is None:
            return out
        sure = seen.amax(-1, keepdim=True) >= math.log(max(self.confidence, 1e-300))
        return torch.where(sure, seen, out)
