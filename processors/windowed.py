"""What controls with the options `heads`, `start` and `stop` have in common."""

from __future__ import annotations

from typing import Any

from attnctl.control import Control
from attnctl.schedule import Schedule, Window

__all__ = ["Windowed"]


class Windowed(Control):
    """Base of controls that act on selected heads in one part of the run."""

    heads: Any
    start: float
    stop: float

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps at which it acts."""
        return Schedule((Window(self.start, self.stop),))
