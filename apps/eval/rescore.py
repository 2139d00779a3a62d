"""`attnctl eval score`: score answers that are there already, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctl.apps.files import write_whole
from attnctl.apps.tables import terminal_width

from .answer_file import load
from .bad_data import EvalError, Skips
from .benchmarks import Scoring, Sources, read_items
from .command import told
from .foreign import read_answers
from .items import Answer
from .parsers import find_parser
from .result import Scored, score_arms

__all__ = ["Rescore", "rescore"]


@dataclass(frozen=True)
class Rescore:
    """What was asked for.

    Attributes:
        files: files of answers; gains are over the first.
        sources: the benchmark's files, for answers that another program wrote.
        parsers, words, alike: see `Scoring`.
        skip_bad: leave bad rows out, and count them.
        out: file for the result; None for none.
    """

    files: tuple[Path, ...]
    sources: Sources | None = None
    parsers: tuple[str, ...] = ()
    words: str = "rule"
    alike: str = "exact"
    skip_bad: bool = False
    out: Path | None = None


def rescore(order: Rescore, note: Callable[[str], None]) -> list[Scored]:
    """Score files of answers and print the result.

    Raises:
        EvalError: if they do not go together.
        BadData: if a file or a row is not what it should be.
    """
    skips = Skips(order.skip_bad)
    if order.sources is None:
        benchmark, arms, tables, decoding = _ours(order)
    else:
        items, decoding = read_items(order.sources, skips), None
        benchmark, tables = order.sources.benchmark, order.sources.tables()
        arms = {_name(p): read_answers(benchmark, p, items, skips) for p in order.files}
    if len(arms) < len(order.files):
        raise EvalError("two files of answers have the same name; rename one")
    for name in order.parsers:
        find_parser(benchmark, name)
    ways = [Scoring(name, order.words, order.alike) for name in order.parsers or (None,)]
    results = [score_arms(benchmark, arms, tables, how, decoding) for how in ways]
    print("\n\n\n".join(one.text(terminal_width()) for one in results))
    told(skips.reasons, note)
    if order.out is not None:
        data = {"files": list(map(str, order.files)), "results": [one.data() for one in results]}
        write_whole(order.out, (json.dumps(data, indent=1) + "\n").encode())
    return results


def _ours(
    order: Rescore,
) -> tuple[str, dict[str, Mapping[str, Answer]], dict[str, Any], str]:
    """Return benchmark, answers, tables and decoding of files that `attnctl eval` wrote."""
    stored = {_name(path): load(path) for path in order.files}
    kinds = {one.head["benchmark"] for one in stored.values()}
    items = {json.dumps(one.head["facts"].get("items")) for one in stored.values()}
    if len(kinds) > 1 or len(items) > 1:
        raise EvalError(
            f"the files are answers to different questions ({', '.join(sorted(kinds))}); only "
            "answers to the same ones can be compared"
        )
    first = next(iter(stored.values()))
    arms: dict[str, Mapping[str, Answer]] = {k: one.answers() for k, one in stored.items()}
    ways = dict.fromkeys(one.head["facts"].get("decoding", "greedy") for one in stored.values())
    return kinds.pop(), arms, first.head["tables"], "; ".join(ways)


def _name(path: Path) -> str:
    return path.stem
