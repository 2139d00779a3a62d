"""Grids of settings: every combination of some options' values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnctl.errors import OptionError

from ..control_syntax import control_text, split_control
from .fields import is_axis, value_of

__all__ = ["Grid", "grid_of", "grid_words"]

Grid = dict[str, tuple[Any, ...]]


def grid_of(raw: Mapping[str, Any]) -> Grid:
    """Return a grid, checked: options of a job, or of a control as "softpag.u", with values.

    Raises:
        OptionError: if an option is unknown, has no list of values, or one that does not fit.
    """
    grid: Grid = {}
    for key, values in raw.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise OptionError(f"the grid's {key[:40]!r} must be a list of values")
        if key == "seed":
            raise OptionError("seeds are no part of a grid; give the job seed = '0-9'")
        if is_axis(key):
            grid[key] = tuple(map(_word, values))
        else:
            grid[key] = tuple(value_of(key, value) for value in values)
    return grid


def grid_words(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the grid of `--grid KEY=VALUE,VALUE`; "|" parts values that hold commas.

    Raises:
        OptionError: if a word is malformed or an option comes twice.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        key, equals, rest = word.partition("=")
        key = key.strip()
        if not equals or not rest.strip():
            raise OptionError(f"--grid {word!r}: write KEY=VALUE,VALUE or KEY=VALUE|VALUE")
        if key in grid:
            raise OptionError(f"--grid gives {key} twice")
        grid[key] = [value.strip() for value in rest.split("|" if "|" in rest else ",")]
    return grid


def size(grid: Grid) -> int:
    """Return the number of combinations."""
    return math.prod(map(len, grid.values()))


def combinations(options: Mapping[str, Any], grid: Grid) -> Iterator[dict[str, Any]]:
    """Yield a job's options for every combination.

    Raises:
        OptionError: if the grid varies a control that the job does not have.
    """
    for values in itertools.product(*grid.values()):
        made = dict(options)
        for key, value in zip(grid, values, strict=True):
            if not is_axis(key):
                made[key] = value
        for key, value in zip(grid, values, strict=True):
            if is_axis(key):
                made["control"] = _varied(made.get("control", ()), key, value)
        yield made


def _varied(controls: Sequence[str], key: str, value: str) -> tuple[str, ...]:
    name, option = key.split(".")
    split = [split_control(text) for text in controls]
    if name not in [known for known, _ in split]:
        raise OptionError(f"the grid varies {key}, but the job has no control {name}")
    return tuple(
        control_text(known, {**options, option: value} if known == name else options)
        for known, options in split
    )


def _word(value: Any) -> str:
    """Return a control option's value as a control's text form holds it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    raise OptionError(f"the grid value {value!r} is neither text nor a number")
