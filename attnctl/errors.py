"""Errors and warnings: what was got, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "AttnctlError",
    "AttnctlWarning",
    "ControlConflict",
    "HostError",
    "MissingExtra",
    "OptionError",
    "SelectorError",
    "nearest",
]


class AttnctlError(ValueError):
    """Base class of every error this package raises on purpose."""


class OptionError(AttnctlError):
    """A control was given an option that it lacks or a value outside its range."""


class SelectorError(AttnctlError):
    """A site or head selector is malformed or matches nothing."""


class ControlConflict(AttnctlError):
    """Two controls of a stack cannot work together, or not in this order."""


class HostError(AttnctlError):
    """The model or pipeline cannot be patched, or was changed under a patch."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed: "
            f"pip install 'attnctl[{extra}]'"
        )


class AttnctlWarning(UserWarning):
    """Something works, but perhaps not as meant."""


def nearest(word: str, known: Iterable[str], most: int = 3) -> str:
    """Return " Did you mean ...?" for the known names closest to `word`, or an empty string."""
    close = get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
