"""Attend-and-Excite: the weakest object of the prompt gets a place in the picture.

    L = max_k max(0, 1 - p_k)

p_k is the largest value of object k's map: all maps but those of the first and the last token,
times 100, softmax over the tokens, blurred by 3x3. At three steps the latents are refined until
the weakest peak reaches a threshold.

References:
    Chefer et al., "Attend-and-Excite", 2023 (arXiv 2301.13826); official code
    yuval-alaluf/Attend-and-Excite, also a deprecated pipeline of diffusers.

Deviations: latents are scaled as the scheduler asks before the gradient pass, which diffusers
leaves out (the same for DDIM, PNDM and DDPM); no gradient pass where nothing is moved; a word of
several tokens has one map, their mean; samples of a batch share gradient passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attnctl.control import register

from .engine import LatentControl, Maps

__all__ = ["AttendAndExcite", "excite"]


def excite(maps: Tensor) -> Tensor:
    """Return max_k max(0, 1 - max over places of map k), a scalar.

    Args:
        maps: one map an object [K, ...].
    """
    peaks = maps.flatten(1).amax(1)
    return (1 - peaks).clamp_min(0).max()


@register
@dataclass(frozen=True)
class AttendAndExcite(LatentControl):
    """Raise the peak of the weakest object; options as in `LatentControl`.

    By default as in the paper's code: the first half of the run, refined at 0, a fifth and two
    fifths of it.
    """

    stop: float = 0.5
    updates: int = 20

    name: ClassVar[str] = "attend-and-excite"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return how far the weakest peak is from 1."""
        return excite(maps.smooth)
