"""What a run touched, how long it took and what it cost, in a few lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from attnctl.apps.chosen import Chosen
from attnctl.apps.controls_table import cost
from attnctl.patch import Report

__all__ = ["summary"]


def summary(chosen: Sequence[Chosen], report: Report | None, stock: float, own: float) -> str:
    """Return the report of a run.

    Args:
        chosen: the controls.
        report: what they touched; None without controls.
        stock: seconds without controls.
        own: seconds with them.
    """
    if report is None:
        return f"No controls. {stock:.2f} s."
    lines = [f"- {_plain(str(Report((line,))))}" for line in report.lines]
    for line in report.lines:
        if not line.calls and not line.forwards:
            lines.append(
                f"- **{line.control.name} did nothing**: its options are neutral, or its steps "
                "are none"
            )
    costs = [f"- {one.control.name}: {cost(type(one.control))}{_preset(one)}" for one in chosen]
    factor = own / stock if stock else float("nan")
    time = f"**Time** stock {stock:.2f} s, controlled {own:.2f} s ({factor:.2f} times); "
    time += "a model's first run is slower"
    return "\n".join(["**Touched**", *lines, "", "**Cost**", *costs, "", time])


def _preset(chosen: Chosen) -> str:
    preset = chosen.preset
    return f"; preset {preset.name} ({preset.origin})" if preset else ""


def _plain(text: str) -> str:
    """Keep Markdown and HTML out of a text: options hold what visitors wrote."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|~" else c for c in text).replace("<", "&lt;")
