"""What the effect bench prints: the arms, the metric, the quality figures, what may be said."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from attnctl.apps.control_syntax import options_text
from attnctl.apps.tables import breakable, paragraph, table

from .compare import Pair, mean, sentences
from .statistics import Interval
from .tasks import Figure, Task
from .trials import Outcome

__all__ = ["report_text"]

_LONGEST = 160
_BRACKETS = "[ ] is a 95 % bootstrap interval over the prompts"
_GAINS = (
    "; gains are paired, case by case, with stock; p is McNemar's exact test of won against lost."
)


def report_text(
    task: Task, head: str, outcomes: Sequence[Outcome], pairs: Sequence[Pair], width: int,
    repeats: int = 1,
) -> str:  # fmt: skip
    """Return the whole report.

    Args:
        task: the task.
        head: model and settings in words.
        outcomes: the arms, stock first.
        pairs: the comparisons.
        width: letters per line, at least 72.
        repeats: cases per prompt.
    """
    over_stock = {p.arm: p for p in pairs if p.base == "stock"}
    first, *others = task.figures
    parts = [
        paragraph(head, width),
        "\n".join(paragraph(line, width, "", "  ") for line in _arms(outcomes)),
        _metric(first, outcomes, over_stock, repeats),
        _quality(others, outcomes, over_stock, repeats),
        paragraph(f"{_BRACKETS}{_GAINS if pairs else '.'}", width),
    ]
    if pairs:
        said = sentences(task, outcomes, pairs)
        parts.append("\n".join(paragraph(line, width, "- ", "  ") for line in said))
    return "\n\n".join(parts)


def _arms(outcomes: Sequence[Outcome]) -> Iterator[str]:
    for o in outcomes:
        spent = "from the cache" if o.cached else f"{o.seconds:.0f} s"
        what = "no control" if o.trial.chosen is None else str(o.trial.chosen)
        what = breakable(what, 30)
        what = textwrap.shorten(what, _LONGEST, placeholder=" ...")
        preset = o.trial.chosen.preset if o.trial.chosen else None
        if preset is not None:
            options = options_text(preset.options, ", ")
            what = f"{what} (preset {preset.name}, {preset.origin}: {options})"
        yield f"{o.trial.name} = {what}, {spent}"


def _metric(
    figure: Figure, outcomes: Sequence[Outcome], pairs: dict[str, Pair], repeats: int
) -> str:
    rows = []
    for o in outcomes:
        row = [o.trial.name, _interval(mean(o.scores[figure.key], repeats), figure)]
        pair = pairs.get(o.trial.name)
        if pair is not None:
            row += [
                _interval(pair.gains[figure.key], figure, "+"),
                f"{len(pair.wins)}:{len(pair.losses)}",
                _chance(pair.p),
            ]
        rows.append(row + [""] * (5 - len(row)))
    return _table(["arm", figure.head, "gain", "won:lost", "p"], rows, pairs)


def _quality(
    figures: Sequence[Figure], outcomes: Sequence[Outcome], pairs: dict[str, Pair], repeats: int
) -> str:
    """Return one table with a block per figure."""
    rows = []
    for figure in figures:
        rows.append([figure.head, "", ""])
        for o in outcomes:
            pair = pairs.get(o.trial.name)
            rows.append([
                f"  {o.trial.name}",
                _interval(mean(o.scores[figure.key], repeats), figure),
                _interval(pair.gains[figure.key], figure, "+") if pair else "",
            ])  # fmt: skip
    return _table(["beside it", "mean", "gain"], rows, pairs)


def _table(heads: list[str], rows: list[list[str]], pairs: dict[str, Pair]) -> str:
    """Return a table; without comparisons it has the arms and their means alone."""
    wide = len(heads) if pairs else 2
    return table(heads[:wide], [row[:wide] for row in rows], None, "l" + "r" * (wide - 1))


def _interval(x: Interval, figure: Figure, sign: str = "") -> str:
    form = f"{{:{sign}.{figure.digits}f}}"
    # rounded first, and 0 added, so that no -0.0 is printed
    shown = (round(figure.factor * v, figure.digits) + 0.0 for v in (x.value, x.low, x.high))
    return f"{form} [{form}, {form}]".format(*shown)


def _chance(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else "<.001"
