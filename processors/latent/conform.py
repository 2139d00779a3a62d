"""CONFORM: maps of one object's words drawn together, those of different objects pushed apart.

With e_a the map of word a as a unit vector, from this step or from the one before, and words of
one object (noun and attributes) in one class,

    L = mean over pairs (a, p) of one class of  -log x_ap / (x_ap + sum over other classes x_an),
    x_ab = exp(e_a e_b / tau)

References:
    Meral et al., "CONFORM: Contrast is All You Need", CVPR 2024 (arXiv 2312.06059); official
    code gemlab-vt/CONFORM.

Deviations: the official loss multiplies the kept maps of the step before by 100 once more each
time it is asked for, in place, so that after some refinement they are next to 0 and 1; here they
stay what they were. A word of several tokens has one map, their mean, not one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attnctl.control import register
from attnctl.errors import OptionError

from .engine import LatentControl, Maps
from .maps import smoothed

__all__ = ["Conform", "contrast"]


def contrast(maps: Tensor, classes: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the NT-Xent loss of maps.

    Args:
        maps: [M, ...].
        classes: the class of each, [M] whole numbers.
        temperature: tau.

    Returns:
        A scalar: 0 where no class has two maps.
    """
    unit = normalize(maps.flatten(1), dim=1)
    logits = unit @ unit.T / temperature
    same = classes[:, None] == classes
    others = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
    losses = torch.logaddexp(logits, others) - logits
    pairs = same & ~torch.eye(len(maps), dtype=torch.bool, device=maps.device)
    return losses[pairs].mean() if bool(pairs.any()) else logits.sum() * 0


@register
@dataclass(frozen=True)
class Conform(LatentControl):
    """Contrast of the words' maps; further options as in `LatentControl`.

    By default as in the paper's code: the first half of the run, with as many updates as
    `updates` at 0, a fifth and two fifths of it, whatever the loss.

    Args:
        temperature: tau, above 0.
    """

    stop: float = 0.5
    reach: tuple[float, float, float] = (1.0, 1.0, 1.0)
    updates: int = 20
    temperature: float = 0.5

    name: ClassVar[str] = "conform"
    least: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise OptionError(f"{self.name}: temperature={self.temperature} must be above 0")

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the contrast of the words' maps, now and one step before."""
        now = _words(maps)
        kept = memory.get("maps")
        every = now if kept is None else torch.cat([now, kept])
        classes = [i for i, target in enumerate(maps.targets) for _ in target.words]
        repeated = torch.tensor(classes, device=now.device).repeat(len(every) // len(now))
        return contrast(every, repeated, self.temperature)

    def remember(self, maps: Maps, memory: dict[str, Any]) -> None:
        """Keep the words' maps."""
        memory["maps"] = _words(maps).detach()


def _words(maps: Maps) -> Tensor:
    sharp = maps.sharp()
    return smoothed(
        torch.stack([maps.word(sharp, word) for t in maps.targets for word in t.words])
    )
