"""The result of an evaluation: figures of every arm, paired gains, as a table and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnctl.apps.bench.statistics import Interval
from attnctl.apps.tables import paragraph, table

from .bad_data import EvalError
from .benchmarks import Scoring, tally
from .estimate import Figure, difference, estimate
from .items import Answer

__all__ = ["Scored", "score_arms"]


@dataclass(frozen=True)
class Scored:
    """The arms of a benchmark, scored in one way.

    Attributes:
        benchmark: its name.
        how: the way of scoring.
        figures: what was computed.
        values: by arm and figure.
        gains: over the first arm, by arm and figure.
        n: items that every arm has an answer to.
        left_out: items that at least one arm has no answer to.
        decoding: how tokens were chosen; None where that is not known.
    """

    benchmark: str
    how: Scoring
    figures: Sequence[Figure]
    values: Mapping[str, Mapping[str, Interval]]
    gains: Mapping[str, Mapping[str, Interval]]
    n: int
    left_out: int
    decoding: str | None = None

    def text(self, width: int) -> str:
        """Return the table."""
        rows: list[list[str]] = []
        for figure in self.figures:
            rows.append([figure.head, "", ""])
            for arm, values in self.values.items():
                gain = self.gains.get(arm)
                shown = _shown(gain[figure.key], figure, "+") if gain else ""
                rows.append([f"  {arm}", _shown(values[figure.key], figure), shown])
        base = next(iter(self.values))
        heads = ["", "value", f"gain over {base}"]
        wide = 3 if self.gains else 2
        told = f"{self.benchmark}, {self.how.describe(self.benchmark)}, {self.n} items"
        if self.decoding not in (None, "greedy"):
            told += f", {self.decoding}"
        if self.left_out:
            told += f"; {self.left_out} without an answer in every arm left out"
        note = "[ ] is a 95 % bootstrap interval over the images"
        note += "; gains are paired, image by image." if self.gains else "."
        body = table(heads[:wide], [row[:wide] for row in rows], None, "l" + "r" * (wide - 1))
        return "\n\n".join([paragraph(told, width), body, paragraph(note, width)])

    def data(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "benchmark": self.benchmark,
            "scoring": asdict(self.how),
            "items": self.n,
            "left_out": self.left_out,
            "decoding": self.decoding,
            "figures": {arm: _plain(found) for arm, found in self.values.items()},
            "gains": {arm: _plain(found) for arm, found in self.gains.items()},
        }


def _plain(found: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {key: [one.value, one.low, one.high] for key, one in found.items()}


def _shown(x: Interval, figure: Figure, sign: str = "") -> str:
    form = f"{{:{sign}.{figure.digits}f}}"
    # rounded first, and 0 added, so that no -0.0 is printed
    numbers = (round(figure.factor * v, figure.digits) + 0.0 for v in (x.value, x.low, x.high))
    return f"{form} [{form}, {form}]".format(*numbers)


def score_arms(
    benchmark: str,
    arms: Mapping[str, Mapping[str, Answer]],
    tables: Mapping[str, Any],
    how: Scoring,
    decoding: str | None = None,
) -> Scored:
    """Score arms on the items that all of them have answers to; gains are over the first.

    Args:
        benchmark: its name.
        arms: answers by item, by arm.
        tables: what the score needs beside the answers.
        how: the way of scoring.
        decoding: how tokens were chosen; None where that is not known.

    Raises:
        EvalError: if no item has an answer in every arm.
    """
    every = [set(answers) for answers in arms.values()]
    common = set.intersection(*every)
    if not common:
        raise EvalError("no item has an answer in every arm")
    first = next(iter(arms.values()))
    order = [key for key in first if key in common]
    tallies = {
        name: tally(benchmark, [answers[key] for key in order], tables, how)
        for name, answers in arms.items()
    }
    base, *others = tallies
    return Scored(
        benchmark,
        how,
        tallies[base].figures,
        {name: estimate(one) for name, one in tallies.items()},
        {name: difference(tallies[name], tallies[base]) for name in others},
        len(order),
        len(set.union(*every) - common),
        decoding,
    )
