"""Controls that push as hard as a guidance control, but not where it points."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from attnctl.processors.guidance import PerturbedGuidance

__all__ = ["shuffled"]


def shuffled(control: PerturbedGuidance) -> PerturbedGuidance:
    """Return a placebo: each sample gets its neighbour's term, of the same strength.

    Args:
        control: a perturbation guidance; batches must hold at least two samples.
    """

    class Shuffled(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-shuffled"

        def direction(self, cond: Tensor, weak: Tensor) -> Tensor:
            return super().direction(cond, weak).roll(1, dims=0)

    options: dict[str, Any] = {
        f.name: getattr(control, f.name) for f in dataclasses.fields(control)
    }
    return Shuffled(**options)
