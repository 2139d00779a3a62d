"""Files of jobs: text, CSV, JSON lines and TOML, each as raw options with the place they stand."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnctl.errors import AttnctlError

from .limits import FILE_BYTES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["JobError", "Raw", "read_jobs"]


class JobError(AttnctlError):
    """A file of jobs cannot be used; the message names the place."""


@dataclass(frozen=True)
class Raw:
    """One job as it stands in the file.

    Args:
        where: its place, for messages.
        options: as written.
        grid: lists of values by option, every combination of which is drawn.
    """

    where: str
    options: Mapping[str, Any]
    grid: Mapping[str, Any] = field(default_factory=dict)


def read_jobs(path: Path) -> list[Raw]:
    """Return the jobs of a file.

    Args:
        path: .txt (a prompt per line), .csv (a column per option), .jsonl (an object per
            line) or .toml ([[job]], [defaults], [grid]).

    Raises:
        JobError: if it cannot be read; the message names the line.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise JobError(f"{path} must end in {', '.join(READERS)}")
    jobs = list(reader(path.name, _text(path)))
    if not jobs:
        raise JobError(f"{path} holds no job")
    return jobs


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_BYTES:
            raise JobError(f"{path} is larger than {FILE_BYTES // 2**20} MiB; split it")
        data = path.read_bytes()
    except OSError as error:
        raise JobError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JobError(f"{path.name}, line {line}: not UTF-8 text") from error


def _txt(name: str, text: str) -> Iterator[Raw]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield Raw(f"{name}, line {number}", {"prompt": line.strip()})


def _csv(name: str, text: str) -> Iterator[Raw]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    heads: list[str] | None = None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise JobError(f"{name}, line {rows.line_num}: {error}") from error
        where = f"{name}, line {rows.line_num}"
        if row is None:
            return
        if heads is None:
            heads = _heads(where, row)
        elif any(cell.strip() for cell in row):
            if len(row) != len(heads):
                raise JobError(f"{where}: {len(row)} cells, but {len(heads)} columns")
            yield Raw(where, _cells(heads, row))


def _heads(where: str, row: list[str]) -> list[str]:
    heads = [head.strip() for head in row]
    if "prompt" not in heads:
        raise JobError(f"{where}: the first line must name the columns, 'prompt' among them")
    twice = next((h for h in heads if heads.count(h) > 1 and h != "control"), None)
    if twice is not None:
        raise JobError(f"{where}: the column {twice[:40]!r} comes twice; only 'control' may")
    return heads


def _cells(heads: list[str], row: list[str]) -> dict[str, Any]:
    """Return a row by column; the columns called control are a stack, in order."""
    cells: dict[str, Any] = {}
    for head, cell in zip(heads, row, strict=True):
        if head != "control":
            cells[head] = cell
        elif cell.strip():
            cells.setdefault(head, []).append(cell)
    return cells


def _jsonl(name: str, text: str) -> Iterator[Raw]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}, line {number}"
        if line.strip():
            try:
                data = json.loads(line, parse_constant=_constant, object_pairs_hook=_pairs)
            except (ValueError, RecursionError) as error:
                raise JobError(f"{where}: no valid JSON: {error}") from error
            if not isinstance(data, dict):
                raise JobError(f'{where}: expected an object such as {{"prompt": ...}}')
            yield _job(where, data)


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an option comes twice")
    return found


def _toml(name: str, text: str) -> Iterator[Raw]:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise JobError(f"{name}: no valid TOML: {error}") from error
    parts = {"defaults": dict, "grid": dict, "job": list}
    for key, value in data.items():
        kind = parts.get(key)
        if kind is None or not isinstance(value, kind):
            raise JobError(f"{name}: {key[:40]!r} is none of [[job]], [defaults] and [grid]")
    for number, entry in enumerate(data.get("job", []), 1):
        where = f"{name}, job {number}"
        if not isinstance(entry, dict):
            raise JobError(f"{where}: expected a table [[job]]")
        job = _job(where, entry)
        options = {**data.get("defaults", {}), **job.options}
        yield Raw(where, options, {**data.get("grid", {}), **job.grid})


def _job(where: str, data: dict[str, Any]) -> Raw:
    grid = data.pop("grid", {})
    if not isinstance(grid, dict):
        raise JobError(f"{where}: grid must hold lists by option")
    return Raw(where, data, grid)


READERS: dict[str, Callable[[str, str], Iterator[Raw]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".toml": _toml,
}
