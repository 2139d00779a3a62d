"""POPE: is an object there? Reader of the question files, and the score.

References:
    Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", 2023
    (arXiv 2305.10355); files and scorer of github.com/AoiDragon/POPE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .bad_data import BadData, Skips
from .estimate import Figure, Sums, Tally, ratio
from .items import Answer, Item
from .parsers import Parser
from .rows import Row, read_rows

__all__ = ["FIGURES", "read", "score", "yes_no_counts"]

LABELS = ("yes", "no")


def read(annotations: Path, skips: Skips) -> list[Item]:
    """Return the questions of a POPE file, JSON lines (COCO) or a JSON array (A-OKVQA, GQA).

    Raises:
        BadData: if the file or one of its rows is not what it should be.
    """
    items = []
    for row in read_rows(annotations, skips):
        try:
            items.append(_item(row))
        except BadData as error:
            skips.bad(error)
    return items


def _item(row: Row) -> Item:
    label = row.text("label")
    if label.lower() not in LABELS:
        raise row.bad(f"'label' is {label!r}, expected 'yes' or 'no'")
    number = row.value("question_id")
    if isinstance(number, bool) or not isinstance(number, (int, str)):
        raise row.bad(f"'question_id' is {number!r}, expected a number")
    return Item(
        str(number),
        row.text("image"),
        row.text("text", "question"),
        {"label": label.lower()},
        row.path,
        row.line,
    )


def yes_no_counts(text: str, label: str, parser: Parser) -> dict[str, float]:
    """Return the counts of one answer; yes is positive."""
    read = parser.read(text, label)  # type: ignore[arg-type]
    positive, said = label == "yes", read == "yes"
    missed = read == "no" or (read == "unparsed" and parser.unparsed_is_no)
    return {
        "n": 1,
        "right": read == label,
        "tp": positive and said,
        "fp": said and not positive,
        "fn": positive and missed,
        "yes": said,
        "unparsed": read == "unparsed" or not _SAYS.search(text),
        "words": len(text.split()),
    }


_SAYS = re.compile(r"\b(yes|no|not)\b|n't\b", re.IGNORECASE)
"""Parsers that call every answer yes or no still leave those unparsed that say neither."""


def f1(sums: Sums) -> np.ndarray:
    """Harmonic mean of precision and recall."""
    precision = ratio(sums["tp"], sums["tp"] + sums["fp"])
    recall = ratio(sums["tp"], sums["tp"] + sums["fn"])
    return ratio(2 * precision * recall, precision + recall)


FIGURES = (
    Figure("accuracy", "accuracy", lambda s: ratio(s["right"], s["n"])),
    Figure("precision", "precision", lambda s: ratio(s["tp"], s["tp"] + s["fp"])),
    Figure("recall", "recall", lambda s: ratio(s["tp"], s["tp"] + s["fn"])),
    Figure("f1", "F1", f1),
    Figure("yes", "says yes", lambda s: ratio(s["yes"], s["n"])),
    Figure("unparsed", "unparsed", lambda s: ratio(s["unparsed"], s["n"])),
    Figure("words", "words", lambda s: ratio(s["words"], s["n"]), "", 1),
)


def score(answers: Sequence[Answer], parser: Parser) -> Tally:
    """Return the counts of answers to POPE's questions."""
    rows = [yes_no_counts(one.text, one.item.truth["label"], parser) for one in answers]
    return Tally.of([one.item.image for one in answers], rows, FIGURES)
