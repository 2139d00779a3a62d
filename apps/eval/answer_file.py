"""The file of an arm's answers: a line of what was run, then one line per item.

Every line is on the disk before the next one is begun, so that a run that was killed at any
moment goes on where it was. The file's name holds a hash of everything that the answers depend
on: another model, control, prompt, image or version is another file. A lock, which the system
lets go of when the process ends in whatever way, keeps two runs from one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from attnctl.lines import append_line, cut_torn_line, read_lines

from .bad_data import BadData, EvalError
from .items import Answer, Item

__all__ = ["AnswerFile", "Stored", "load", "run_key"]

FORMAT = 1
_HEAD = {"run", "benchmark", "facts", "tables"}
_FIELDS = {"run", "id", "image", "question", "truth"}


def run_key(facts: Mapping[str, Any]) -> str:
    """Return the name of a run: a hash of everything that its answers depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class Stored:
    """What a file of answers holds.

    Args:
        head: its first line.
        lines: the others, by item.
    """

    def __init__(self, head: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> None:
        self.head, self.lines = head, dict(lines)

    def answers(self) -> dict[str, Answer]:
        """Return the answers by item; items that were skipped have none."""
        return {key: _answer(key, line) for key, line in self.lines.items() if "answer" in line}

    @property
    def skipped(self) -> list[str]:
        """Why items have no answer."""
        return [line["skipped"] for line in self.lines.values() if "skipped" in line]


def _answer(key: str, line: Mapping[str, Any]) -> Answer:
    item = Item(key, line["image"], line["question"], line["truth"])
    return Answer(item, line["answer"], line.get("ended"))


def load(path: Path) -> Stored:
    """Read a file of answers; a last line without its end, as a kill leaves it, is not counted.

    Raises:
        BadData: if it is no such file or a line is damaged.
    """
    try:
        rows = read_lines(path)
    except OSError as error:
        raise BadData(path, None, f"cannot be read: {error.strerror or error}") from error
    if not rows or rows[0].get("attnctl_eval") != FORMAT or not set(rows[0]) >= _HEAD:
        raise BadData(path, 1, "this is no file of answers that attnctl eval wrote")
    head, lines = rows[0], {}
    for number, row in enumerate(rows[1:], start=2):
        if not set(row) >= _FIELDS or ("answer" in row) == ("skipped" in row):
            raise BadData(path, number, "the line is no answer: fields are missing")
        texts = (row["id"], row["image"], row.get("answer", ""), row.get("skipped", ""))
        if not all(isinstance(text, str) for text in texts) or not isinstance(row["truth"], dict):
            raise BadData(path, number, "the line is no answer: a field is not of its type")
        if row["run"] != head["run"]:
            raise BadData(path, number, f"the line is of run {row['run']}, not {head['run']}")
        if row["id"] in lines:
            raise BadData(path, number, f"the item {row['id']!r} was there before")
        lines[row["id"]] = row
    return Stored(head, lines)


class AnswerFile:
    """A file of answers that is being written. Leaving its `with` block lets the lock go.

    Args:
        path: the file.
        head: its first line; "run" is the key of the run.

    Raises:
        EvalError: if another process writes it, or it holds another run.
        BadData: if it is damaged.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle: BinaryIO = path.open("ab")
        try:
            _lock(self._handle, path)
            cut_torn_line(path)
            if not path.stat().st_size:
                append_line(path, {"attnctl_eval": FORMAT, **head})
            self.stored = load(path)
            if self.stored.head["run"] != head["run"]:
                raise EvalError(f"{path} holds another run; delete it or give another --out")
        except BaseException:
            self._handle.close()
            raise

    def add(self, item: Item, outcome: Mapping[str, Any]) -> None:
        """Append what came of an item; it is on the disk when this returns."""
        row = {
            "run": self.stored.head["run"],
            "id": item.id,
            "image": item.image,
            "question": item.question,
            "truth": item.truth,
            **outcome,
        }
        append_line(self.path, row)
        self.stored.lines[item.id] = row

    def missing(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that have no line yet."""
        return [item for item in items if item.id not in self.stored.lines]

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.close()


def _lock(handle: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no lock of this kind
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise EvalError(
            f"another process is writing {path}; wait for it, or give another --out"
        ) from error
