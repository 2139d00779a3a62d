"""The four benchmarks: how each is read, asked and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import amber, amber_nouns, chair, mme, pope
from .bad_data import EvalError, Skips
from .estimate import Tally
from .items import Answer, Item, unique
from .objects import Objects, read_synonyms
from .parsers import PARSERS, find_parser

__all__ = ["BENCHMARKS", "LENGTHS", "Scoring", "Sources", "read_items", "tally"]

BENCHMARKS = ("pope", "chair", "mme", "amber")
LENGTHS = {"pope": 64, "chair": 512, "mme": 64, "amber": 512}
"""Most new tokens of an answer."""


@dataclass(frozen=True)
class Sources:
    """The files of a benchmark.

    Attributes:
        benchmark: one of `BENCHMARKS`.
        annotations: the file or folder of annotations.
        synonyms: CHAIR's table; None for the one beside the annotations.
        ids: CHAIR's list of image ids; None for all.
        split: AMBER's part.
    """

    benchmark: str
    annotations: Path
    synonyms: Path | None = None
    ids: Path | None = None
    split: str | None = None

    def check(self) -> None:
        """Refuse what has no meaning for the benchmark.

        Raises:
            EvalError: for an unknown benchmark or an option of another one.
        """
        if self.benchmark not in BENCHMARKS:
            raise EvalError(f"there is no benchmark {self.benchmark!r}: {', '.join(BENCHMARKS)}")
        options = {"synonyms": "chair", "ids": "chair", "split": "amber"}
        for name, owner in options.items():
            if getattr(self, name) is not None and self.benchmark != owner:
                raise EvalError(f"--{name} is an option of {owner}, not of {self.benchmark}")

    def tables(self) -> dict[str, Any]:
        """Return what the score needs beside the answers; it is kept with them.

        Raises:
            BadData: if a file cannot be read.
        """
        if self.benchmark == "chair":
            path = chair.find_synonyms(self.synonyms, self.annotations)
            return {"synonyms": read_synonyms(path)}
        if self.benchmark == "amber" and self.split in (None, "all", "g"):
            nouns = amber_nouns.read_nouns(self.annotations)
            return {"related": dict(nouns.related), "safe": sorted(nouns.safe)}
        return {}


def read_items(sources: Sources, skips: Skips) -> list[Item]:
    """Return the items of a benchmark, each id once.

    Raises:
        BadData: if a file or one of its rows is not what it should be.
        EvalError: if there is nothing left to ask.
    """
    sources.check()
    where = sources.annotations
    if sources.benchmark == "pope":
        items = pope.read(where, skips)
    elif sources.benchmark == "mme":
        items = mme.read(where, skips)
    elif sources.benchmark == "amber":
        items = amber.read(where, skips, sources.split or "all")
    else:
        items = chair.read(
            where, skips, None if sources.ids is None else chair.read_ids(sources.ids)
        )
    items = unique(items, skips)
    if not items:
        raise EvalError(f"{where} leaves nothing to ask ({len(skips.reasons)} bad lines)")
    return items


@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Attributes:
        parser: of yes and no; None for the benchmark's own.
        words: CHAIR's and AMBER's way to words.
        alike: AMBER's test for words that mean the same.
    """

    parser: str | None = None
    words: str = "rule"
    alike: str = "exact"

    def describe(self, benchmark: str) -> str:
        """Return in words what the numbers of a benchmark depend on."""
        if benchmark == "chair":
            return f"words: {self.words}"
        read = f"parser: {self.parser or next(iter(PARSERS[benchmark]))}"
        more = f"; words: {self.words}; words alike: {self.alike}"
        return read + more if benchmark == "amber" else read


def tally(
    benchmark: str, answers: Sequence[Answer], tables: Mapping[str, Any], how: Scoring
) -> Tally:
    """Return the counts of a benchmark's answers.

    Args:
        benchmark: one of `BENCHMARKS`.
        answers: the answers.
        tables: what `Sources.tables` gave.
        how: the way of scoring.

    Raises:
        EvalError: if there is no answer or no such way.
    """
    if not answers:
        raise EvalError("there is no answer to score")
    if benchmark == "chair":
        if how.parser is not None:
            raise EvalError("CHAIR is about descriptions; it has no --parser")
        return chair.score(answers, Objects(tables["synonyms"], how.words))
    parser = find_parser(benchmark, how.parser or next(iter(PARSERS[benchmark])))
    if benchmark == "pope":
        return pope.score(answers, parser)
    if benchmark == "mme":
        return mme.score(answers, parser)
    nouns = amber_nouns.Nouns(tables["related"], frozenset(tables["safe"])) if tables else None
    return amber.score(answers, parser, nouns, how.alike, how.words)
