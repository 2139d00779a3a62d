"""AMBER: descriptions and yes-or-no questions with annotations by hand. Reader and score.

Yes-or-no questions: an answer counts only if it is exactly Yes or exactly No; no is positive.
Descriptions: of the nouns that are in AMBER's vocabulary, which are neither there nor close to
something there (CHAIR), which of the things there are named (Cover), which descriptions have a
wrong noun (Hal), and which of the listed likely inventions are named (Cog).

References:
    Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination
    Evaluation", 2023 (arXiv 2311.07397); files and inference.py of
    github.com/junyangwang0410/AMBER.

Deviation: the official script's counts of cases begin at 0.001 (metrics.txt), ours at 0, so that
a share of one answer is exact. On AMBER's 1004 descriptions that is 0.0001 points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import amber_nouns
from .bad_data import BadData, EvalError, Skips
from .estimate import Figure, Sums, Tally, ratio
from .items import Answer, Item
from .parsers import Parser
from .rows import Row, read_rows

__all__ = ["SPLITS", "read", "score"]

GENERATIVE = "generative"
_DIMENSION = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}
"""Every other type counts as a relation, as in the official script."""
DIMENSIONS = ("existence", "state", "number", "action", "relation")
SPLITS = {
    "all": None,
    "g": (GENERATIVE,),
    "d": DIMENSIONS,
    "de": ("existence",),
    "da": ("state", "number", "action"),
    "dr": ("relation",),
}
"""The official script's evaluation types."""


def read(annotations: Path, skips: Skips, split: str = "all") -> list[Item]:
    """Return AMBER's queries.

    Args:
        annotations: the folder data/ of AMBER's repository.
        skips: bad rows go there.
        split: one of `SPLITS`.

    Raises:
        EvalError: if there is no such split.
        BadData: if a file or one of its rows is not what it should be.
    """
    if split not in SPLITS:
        raise EvalError(f"there is no split {split!r}; expected {', '.join(SPLITS)}")
    truths: dict[int, Row] = {}
    for row in read_rows(annotations / "annotations.json", skips):
        truths[row.whole("id")] = row
    items = []
    for row in read_rows(annotations / "query" / "query_all.json", skips):
        try:
            item = _item(row, truths)
        except BadData as error:
            skips.bad(error)
            continue
        wanted = SPLITS[split]
        if wanted is None or item.truth["dimension"] in wanted:
            items.append(item)
    return items


def _item(row: Row, truths: Mapping[int, Row]) -> Item:
    number = row.whole("id")
    if number not in truths:
        raise row.bad(f"annotations.json has no truth for the id {number}")
    known = truths[number]
    kind = known.text("type")
    truth: dict[str, Any] = {"dimension": _DIMENSION.get(kind, "relation")}
    if kind == GENERATIVE:
        truth = {"dimension": GENERATIVE, **{k: _words(known, k) for k in ("truth", "hallu")}}
    else:
        truth["label"] = known.text("truth").lower()
        if truth["label"] not in ("yes", "no"):
            raise known.bad(f"'truth' is {known.data['truth']!r}, expected 'yes' or 'no'")
    return Item(str(number), row.text("image"), row.text("query"), truth, row.path, row.line)


def _words(row: Row, name: str) -> list[str]:
    value = row.value(name)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise row.bad(f"{name!r} is {str(value)[:40]!r}, expected a list of words")
    return value


# -- yes or no ---------------------------------------------------------------------------------


def _decided(answer: Answer, parser: Parser) -> dict[str, float]:
    label, where = answer.item.truth["label"], answer.item.truth["dimension"]
    read = parser.read(answer.text, label)
    counts = {
        "n": 1,
        "right": read == label,
        "no": label == "no",
        "said no": read == "no",
        "rightly no": read == label == "no",
        "unparsed": read == "unparsed",
        "yes": read == "yes",
    }
    return {f"{key} {part}": value for key, value in counts.items() for part in (where, "all")}


def _share(part: str, whole: str, places: Sequence[str]) -> Callable[[Sums], np.ndarray]:
    def share(s: Sums) -> np.ndarray:
        parts, wholes = (
            np.sum([s[f"{name} {place}"] for place in places], axis=0) for name in (part, whole)
        )
        return ratio(parts, wholes)

    return share


def _f1(places: Sequence[str], extra: float) -> Callable[[Sums], np.ndarray]:
    """AMBER's: from rounded percentages, with a small number added below the line."""
    precision = _share("rightly no", "said no", places)
    recall = _share("rightly no", "no", places)

    def f1(s: Sums) -> np.ndarray:
        p, r = (np.round(100 * share(s), 1) / 100 for share in (precision, recall))
        return 2 * p * r / (p + r + extra)

    return f1


def _yes_no_figures(dimensions: Sequence[str]) -> list[Figure]:
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in dimensions}
    if {"state", "number", "action"} <= set(dimensions):
        groups["attribute"] = ("state", "number", "action")
    if len(dimensions) > 1:
        groups = {"all": ("all",), **groups}
    found = []
    for name, places in groups.items():
        found += [
            Figure(f"{name} accuracy", f"{name} accuracy", _share("right", "n", places)),
            Figure(
                f"{name} precision", f"{name} precision", _share("rightly no", "said no", places)
            ),
            Figure(f"{name} recall", f"{name} recall", _share("rightly no", "no", places)),
            Figure(
                f"{name} f1", f"{name} F1", _f1(places, 0.001 if name == "existence" else 0.0001)
            ),
        ]
    found.append(Figure("yes", "says yes", _share("yes", "n", ("all",))))
    return [*found, Figure("unparsed", "unparsed", _share("unparsed", "n", ("all",)))]


def score(
    answers: Sequence[Answer],
    parser: Parser,
    nouns: amber_nouns.Nouns | None = None,
    same: str = "exact",
    words: str = "rule",
) -> Tally:
    """Return the counts of answers.

    Args:
        answers: to any of AMBER's queries.
        parser: of yes and no.
        nouns: the vocabulary; needed for descriptions.
        same: name of the test for words that mean the same.
        words: "rule" or "lemma".

    Raises:
        EvalError: if there are descriptions and no vocabulary, or no such way to words.
    """
    kinds = {one.item.truth["dimension"] for one in answers}
    if GENERATIVE in kinds and nouns is None:
        raise EvalError("AMBER's descriptions need its vocabulary (relation.json, safe_words.txt)")
    find = amber_nouns.finder(words, nouns.known if nouns else frozenset())
    test = amber_nouns.alike(same)
    rows = []
    for one in answers:
        if one.item.truth["dimension"] == GENERATIVE:
            assert nouns is not None
            rows.append(amber_nouns.described(one, nouns, find, test))
        else:
            rows.append(_decided(one, parser))
    dimensions = [name for name in DIMENSIONS if name in kinds]
    figures = [*(amber_nouns.FIGURES if GENERATIVE in kinds else ())]
    figures += _yes_no_figures(dimensions) if dimensions else []
    return Tally.of([one.item.image for one in answers], rows, figures)
