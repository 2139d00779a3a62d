"""PAI's second part: classifier-free guidance of the answer by the image.

With l_c and l_u the log-probabilities with and without the image,

    out = gamma (l_c - l_u) + l_u

References:
    Liu, Zheng and Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", ECCV 2024 (arXiv 2407.21771), equation 6; the first part is
    `attnctl.PAI`.

Defaults: gamma 1.1 and beta 0.1, as the README of the official code (whose command line has 2).
Gamma 1 is stock, without a cut-off, as there. Deviations: the second pass has its own cache in
beams too; with `attnctl.PAI` beside it the first token of the answer is raised as well (in the
official code it is not when both parts are on).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attnctl.control import register
from attnctl.records import LogitsCall

from .contrast import Contrast, without_images

__all__ = ["PAICFG"]


@register
@dataclass(frozen=True)
class PAICFG(Contrast):
    """Guidance by a pass without the image (the second part of PAI).

    Args:
        beta: cut-off, in [0, 1]; 0 is none.
        both: whether attention controls of the stack act in the second pass too.
        gamma: strength, gamma >= 0; 1 is stock.
    """

    gamma: float = 1.1

    name: ClassVar[str] = "paicfg"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("gamma", 0)

    @property
    def neutral(self) -> bool:
        """gamma = 1."""
        return self.gamma == 1

    def rewrite(self, call: LogitsCall) -> dict[str, Any]:
        """Return the text of the prompt alone."""
        return without_images(call)

    def fuse(self, z: Tensor, weak: Tensor, t: int) -> Tensor:
        """Return gamma (l_c - l_u) + l_u."""
        seen, unseen = z.log_softmax(-1), weak.log_softmax(-1)
        return self.gamma * (seen - unseen) + unseen
