"""The stack of controls as text, one control per line, and what the form does to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import attnctl
from attnctl.apps.chosen import Chosen, choose
from attnctl.apps.control_syntax import control_text, split_control
from attnctl.errors import OptionError

from .limits import Limits, refuse_files, stack_lines

__all__ = ["add", "read_stack", "remove", "set_heads", "set_option"]


def read_stack(text: str | None, target: Any, limits: Limits) -> tuple[Chosen, ...]:
    """Return the controls of a text.

    Args:
        text: one control per line, as `attnctl generate --control` takes it; a name alone
            stands for the preset of the model.
        target: pipeline or model.
        limits: of the page.

    Raises:
        OptionError: if a control is wrong, costs too much or could name a file.
    """
    lines = stack_lines(text, limits)
    for line in lines:  # before any control is made: some read a file that an option names
        for key, value in split_control(line)[1].items():
            refuse_files(f"option {key}", value)
    chosen = tuple(choose(target, line) for line in lines)
    for one in chosen:
        limits.control(one)
    return chosen


def add(text: str, name: str, target: Any) -> str:
    """Return a stack with one more control at its end, with the options of its preset."""
    return "\n".join([*_lines(text), str(choose(target, name))])


def remove(text: str, index: int) -> str:
    """Return a stack without one of its controls."""
    lines = _lines(text)
    return "\n".join(lines[:index] + lines[index + 1 :])


def set_option(text: str, index: int, key: str, value: str, target: Any) -> str:
    """Return a stack with an option of one of its controls changed.

    A name alone stands for a preset; it is written out, so that nothing but this changes. An
    empty value takes the option out.

    Raises:
        OptionError: if there is no such control.
    """
    lines = _lines(text)
    if not 0 <= index < len(lines):
        raise OptionError(f"there is no control number {index + 1} in the stack")
    line = lines[index] if ":" in lines[index] else str(choose(target, lines[index]))
    name, options = split_control(line)
    value = " ".join(value.split())
    options = {k: v for k, v in {**options, key: value}.items() if k != key or value}
    lines[index] = control_text(name, options)
    return "\n".join(lines)


def set_heads(text: str, number: int, heads: Sequence[tuple[int, int]], target: Any) -> str:
    """Return a stack in which one control, counted from 1, acts on these heads.

    Raises:
        OptionError: if there is no such control, it takes no heads, or there is no head.
    """
    if not heads:
        raise OptionError("no head is chosen: click on some in the grid")
    lines = _lines(text)
    name = split_control(lines[number - 1])[0] if 0 < number <= len(lines) else ""
    known = attnctl.controls().get(name)
    if known is not None and "heads" not in {f.name for f in dataclasses.fields(known)}:
        raise OptionError(f"{name} acts on no heads: give them to another control of the stack")
    selector = ",".join(f"L{layer}H{head}" for layer, head in heads)
    return set_option(text, number - 1, "heads", selector, target)


def _lines(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
