"""Controls that steer what the main pass draws where, by its attention to the prompt."""

from .regulation import Regulation
from .spacetime import SpaceTime

__all__ = ["Regulation", "SpaceTime"]
