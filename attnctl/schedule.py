"""When a control acts: windows over the denoising steps, by fraction, index or noise level."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from .errors import OptionError
from .records import Step

__all__ = ["Schedule", "Window"]

_WINDOW = re.compile(
    r"(?:(?P<unit>fraction|step|sigma)s?:)?(?P<a>[\d.]+(?:e-?\d+)?)-(?P<b>[\d.]+(?:e-?\d+)?)"
)


@dataclass(frozen=True)
class Window:
    """Half-open interval of steps.

    Args:
        start: first value inside. For `unit="sigma"` the larger noise level.
        stop: first value outside; a fraction of 1 means "to the end".
        unit: "fraction" of the run in [0, 1], "step" index from 0, or "sigma" (the
            scheduler's noise level, which falls during a run).
    """

    start: float
    stop: float
    unit: Literal["fraction", "step", "sigma"] = "fraction"

    def __post_init__(self) -> None:
        low, high = (self.stop, self.start) if self.unit == "sigma" else (self.start, self.stop)
        if not 0 <= low <= high or (self.unit == "fraction" and high > 1):
            want = {
                "fraction": "0 <= start <= stop <= 1",
                "step": "0 <= start <= stop",
                "sigma": "start >= stop >= 0",
            }[self.unit]
            raise OptionError(
                f"window {self.start:g}-{self.stop:g} in units of {self.unit}: expected {want}"
            )

    def __contains__(self, step: Step) -> bool:
        if self.unit == "sigma":
            return self.stop < step.sigma <= self.start or step.sigma == self.stop == 0
        if self.unit == "step":
            return self.start <= step.index < self.stop
        if self.start == 0 and self.stop == 1:
            return True
        return self.start <= step.fraction < self.stop

    def __str__(self) -> str:
        prefix = "" if self.unit == "fraction" else f"{self.unit}s:"
        return f"{prefix}{self.start:g}-{self.stop:g}"


@dataclass(frozen=True)
class Schedule:
    """Union of windows. `Schedule.of` reads every form a user may write."""

    windows: tuple[Window, ...] = (Window(0, 1),)

    def __contains__(self, step: Step) -> bool:
        return any(step in window for window in self.windows)

    def __str__(self) -> str:
        return " ".join(map(str, self.windows)) or "never"

    @property
    def empty(self) -> bool:
        """True if no step can be inside."""
        return all(w.start == w.stop and w.unit != "sigma" for w in self.windows)

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """Read a schedule.

        Args:
            value: a Schedule, a Window, a pair `(start, stop)` of fractions, a string such as
                "0-0.6", "steps:2-12", "sigmas:14-0.7" (several separated by blanks), or a
                list of any of these.

        Raises:
            OptionError: on anything else.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Window):
            return cls((value,))
        if isinstance(value, str):
            return cls(tuple(_parse(word) for word in value.split()))
        if isinstance(value, tuple) and len(value) == 2 and all(_is_number(v) for v in value):
            return cls((Window(*value),))
        if isinstance(value, (list, tuple)):
            return cls(tuple(w for item in value for w in cls.of(item).windows))
        raise OptionError(f"cannot read a schedule from {value!r}; try '0-0.6' or (0, 0.6)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(word: str) -> Window:
    match = _WINDOW.fullmatch(word)
    if match is None:
        raise OptionError(
            f"cannot read the step window {word!r}; write '0-0.6' (fractions of the run), "
            "'steps:2-12' or 'sigmas:14-0.7'"
        )
    unit = match["unit"] or "fraction"
    return Window(float(match["a"]), float(match["b"]), unit)  # type: ignore[arg-type]
