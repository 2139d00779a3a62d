"""HeadHunter: search the heads whose perturbation serves an objective best."""

from .headset import HeadSet
from .hunter import HeadHunter
from .objective import Objective

__all__ = ["HeadHunter", "HeadSet", "Objective"]
