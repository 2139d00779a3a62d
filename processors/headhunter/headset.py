"""Head sets as data: what a search found, and everything needed to judge or repeat it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnctl.errors import OptionError
from attnctl.records import Site

__all__ = ["Head", "HeadSet", "Round", "site_table_hash"]

Head = tuple[int, int]
"""(layer, head), both from 0."""

_FORMAT = "attnctl head set 1"


def site_table_hash(sites: Iterable[Site]) -> str:
    """Return 16 hex digits that tell models with other sites apart (weights do not matter)."""
    rows = [(s.name, s.kind, s.layer, s.heads) for s in sites]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Args:
        chosen: the heads it added, best first.
        scores: for each head tried last. Greedy: mean objective of "the heads so far and this
            one". Halving: its part in the gain. Gradient: its slope halfway between outside and
            inside of the set, in units of the length of all heads' slopes.
    """

    chosen: tuple[Head, ...]
    scores: Mapping[Head, float]


@dataclass(frozen=True)
class HeadSet:
    """Heads that a search chose.

    Args:
        heads: in the order in which they were chosen.
        model: what the user called the model.
        table: `site_table_hash` of its sites; empty if unknown.
        perturbation: registry name of the guidance.
        options: its options during the search, heads left out.
        objective: name of the objective.
        strategy: "greedy", "gradient" or "halving"; empty for an imported set.
        prompts: prompts of the search, style included.
        seeds: seed of each prompt.
        call: arguments of the pipeline call (steps, guidance scale, size).
        forwards: denoiser passes of single pictures that the search took.
        rounds: what each round found.
    """

    heads: tuple[Head, ...]
    model: str = ""
    table: str = ""
    perturbation: str = "softpag"
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: str = ""
    strategy: str = ""
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    forwards: int = 0
    rounds: tuple[Round, ...] = ()

    def __post_init__(self) -> None:
        if not self.heads:
            raise OptionError("a head set needs at least one (layer, head) pair")
        if len(set(self.heads)) < len(self.heads):
            raise OptionError("a head stands in the set twice")

    def first(self, k: int) -> HeadSet:
        """Return the set of the first `k` heads, to tune their number afterwards."""
        if not 1 <= k <= len(self.heads):
            raise OptionError(f"expected 1 to {len(self.heads)} heads, got {k}")
        return dataclasses.replace(self, heads=self.heads[:k])

    def control(self, **options: Any) -> Any:
        """Return the guidance with these heads and the options of the search.

        Args:
            **options: override the search's, such as u=0.5.
        """
        from attnctl.control import control

        return control(self.perturbation, **{**self.options, "heads": self.heads, **options})

    def check(self, sites: Sequence[Site]) -> None:
        """Raise OptionError unless the set was made for a model with these sites."""
        table = site_table_hash(sites)
        if self.table and self.table != table:
            raise OptionError(
                f"this head set was searched on {self.model or 'another model'} (site table "
                f"{self.table}), but the model at hand has site table {table}: heads do not "
                "carry over; search on this model"
            )

    # -- files ---------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, or the official `layer,head` lines if the name ends in .txt."""
        path = Path(path)
        text = self.lines() if path.suffix == ".txt" else json.dumps(self.as_data(), indent=1)
        half = path.with_name(path.name + ".part")
        half.write_text(text + "\n", encoding="utf-8")
        half.replace(path)
        return path

    def lines(self) -> str:
        """Return the official text form, one `layer,head` line per head."""
        return "\n".join(f"{layer},{head}" for layer, head in self.heads)

    def as_data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data: dict[str, Any] = {"format": _FORMAT}
        for f in dataclasses.fields(self):
            data[f.name] = getattr(self, f.name)
        data["rounds"] = [
            {
                "chosen": r.chosen,
                "scores": [[*head, score] for head, score in r.scores.items()],
            }
            for r in self.rounds
        ]
        return data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadSet:
        """Read a head set: our JSON, or the official `layer,head` lines.

        Raises:
            OptionError: if the file is neither; the message names the line.
            OSError: if it cannot be read.
        """
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            return cls.from_data(_json(text, path), str(path))
        return cls(tuple(_head(line, n, path) for n, line in _lines(text)))

    @classmethod
    def from_data(cls, data: Mapping[str, Any], where: str = "head set") -> HeadSet:
        """Make a head set from `as_data`'s result.

        Raises:
            OptionError: if it is of another format.
        """
        if data.get("format") != _FORMAT:
            raise OptionError(f"{where}: format {data.get('format')!r}, expected {_FORMAT!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        try:
            values["heads"] = _pairs(values["heads"])
            values["rounds"] = tuple(map(_round, values.get("rounds", ())))
        except (KeyError, TypeError, ValueError) as error:
            raise OptionError(f"{where}: broken head set ({error!r})") from error
        for name in ("prompts", "seeds"):
            values[name] = tuple(values.get(name, ()))
        return cls(**values)


def _json(text: str, path: Any) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise OptionError(f"{path}: no valid JSON: {error}") from error
    return data


def _pairs(values: Iterable[Any]) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in values)


def _round(data: Mapping[str, Any]) -> Round:
    scores = {(int(a), int(b)): float(score) for a, b, score in data["scores"]}
    return Round(_pairs(data["chosen"]), scores)


def _lines(text: str) -> Iterable[tuple[int, str]]:
    return ((n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip())


def _head(line: str, number: int, path: Any) -> Head:
    try:
        layer, head = line.split(",")
        return int(layer), int(head)
    except ValueError:
        raise OptionError(
            f"{path}, line {number}: expected 'layer,head' such as '3,7', got {line!r}"
        ) from None
