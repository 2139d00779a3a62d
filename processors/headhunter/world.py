"""The shape-world objective: does the picture show what its prompt says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .objective import Objective

__all__ = ["World"]


class World(Objective):
    """Log-probability of the caption by the shipped detector."""

    name: ClassVar[str] = "world"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return [n], at most 0.

        Raises:
            ValueError: a prompt names none of the world's objects.
        """
        from attnctl.assets.world import log_prob

        return log_prob(images.float(), list(prompts))
