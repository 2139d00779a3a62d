"""The command `attnctl generate`: check everything, load, draw, save, report."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attnctl
from attnctl.errors import AttnctlError, OptionError

from .control_syntax import options_text, parse_control
from .generate import Chosen, Result, Settings, choose, generate
from .models import first_line, load, local_folder
from .pictures import check_output, free_name
from .quiet import hush, notes
from .tables import paragraph, terminal_width

__all__ = ["Order", "draw"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Args:
        prompt: what to draw.
        model: name, folder or hub id.
        controls: controls in their text form.
        settings: options of `generate.Settings`.
        device: where.
        dtype: number type.
        compare: draw without the controls too.
        out: where to; None for the next free name in this folder.
    """

    prompt: str
    model: str
    controls: tuple[str, ...]
    settings: dict[str, Any]
    device: str
    dtype: str
    compare: bool
    out: Path | None


def draw(order: Order, say: Say) -> None:
    """Draw, save and report; what can be refused is refused before anything slow begins.

    Args:
        order: what to draw.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something in the order cannot be done.
    """
    settings, out = _checked(order)
    with _status(f"loading {order.model} ..."):
        hush(say)
        pipe = load(order.model, order.device, order.dtype)
    pipe.set_progress_bar_config(disable=None)
    chosen = [choose(pipe, text) for text in order.controls]
    if chosen:  # refuses selectors that match nothing, before a word is said
        attnctl.patch(pipe, *(one.control for one in chosen)).undo()
    for one in chosen:
        _print_preset(one)
    with notes(say):
        result = _draw(pipe, order, chosen, settings)
    result.save(out)
    _print_report(result, say)
    print(f"wrote {out} ({' x '.join(map(str, result.picture().size))})")


def _checked(order: Order) -> tuple[Settings, Path]:
    """Return the settings and where the picture goes, everything checked that can be."""
    if not order.prompt.strip():
        raise OptionError("the prompt is empty")
    if order.compare and not order.controls:
        raise OptionError("--compare needs a --control to compare with")
    settings = Settings(**order.settings)
    out = check_output(order.out or free_name())
    for text in order.controls:
        parse_control(text)
    local_folder(order.model)
    return settings, out


def _draw(pipe: Any, order: Order, chosen: list[Chosen], settings: Settings) -> Result:
    try:
        return generate(
            order.prompt, *chosen, model=pipe, settings=settings, compare=order.compare
        )
    except AttnctlError:
        raise
    except ValueError as error:  # how diffusers refuses a size or a prompt
        raise OptionError(first_line(error)) from error


def _print_preset(chosen: Chosen) -> None:
    preset = chosen.preset
    if preset is not None:
        text = f"preset {preset.name} ({preset.origin}): {options_text(preset.options, ', ')}"
        print(paragraph(text, terminal_width(), f"{chosen.control.name}: ", "  "), flush=True)


def _print_report(result: Result, say: Say) -> None:
    for line in result.report.lines if result.report else ():
        print(paragraph(str(attnctl.Report((line,))), terminal_width(), "", "  "))
        if not line.forwards and not line.calls:
            say(f"{line.control.name} did nothing: its options are neutral or its steps none")


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Show a line on the terminal while something runs, and take it away afterwards."""
    shown = sys.stderr.isatty()
    if shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r" + " " * len(text) + "\r", end="", file=sys.stderr, flush=True)
