"""Answer files of other programs, in the forms that the official scorers read.

- POPE: rows {"question_id", "text" or "answer"}, paired by id; without ids by order.
- CHAIR: rows {"image_id", "caption"}.
- MME: the annotation lines with the answer as a fourth column.
- AMBER: rows {"id", "response"}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import mme
from .bad_data import BadData, EvalError, Skips
from .items import Answer, Item
from .rows import Row, read_lines, read_rows

__all__ = ["read_answers"]

_IDS = {"pope": ("question_id",), "chair": ("image_id",), "amber": ("id",)}
_TEXTS = {
    "pope": ("answer", "text", "response"),
    "chair": ("caption", "answer", "text", "response"),
    "amber": ("response", "answer", "text"),
}


def read_answers(
    benchmark: str, path: Path, items: Sequence[Item], skips: Skips
) -> dict[str, Answer]:
    """Return the answers of a file by item.

    Args:
        benchmark: one of the four.
        path: the file; for MME also a folder with a file per subtask.
        items: the benchmark's items.
        skips: bad rows go there.

    Raises:
        BadData: if the file or a row is not what it should be, or an item has no answer.
    """
    known = {item.id: item for item in items}
    if benchmark == "mme":
        return _mme(path, known, skips)
    rows = read_rows(path, skips)
    if benchmark == "pope" and not any("question_id" in row.data for row in rows):
        return _by_order(path, rows, items)
    found: dict[str, Answer] = {}
    for row in rows:
        try:
            key = str(row.value(*_IDS[benchmark]))
            if key not in known:
                raise row.bad(f"there is no item with the id {key} in the annotations")
            if key in found:
                raise row.bad(f"the id {key} was there before")
            found[key] = Answer(known[key], row.text(*_TEXTS[benchmark]))
        except BadData as error:
            skips.bad(error)
    _complete(benchmark, path, known, found, skips)
    return found


def _by_order(path: Path, rows: Sequence[Row], items: Sequence[Item]) -> dict[str, Answer]:
    if len(rows) != len(items):
        raise BadData(
            path, None,
            f"{len(rows)} answers without question_id for {len(items)} questions: they cannot be "
            "paired by order",
        )  # fmt: skip
    for row, item in zip(rows, items, strict=True):
        asked = row.data.get("question")
        if asked is not None and asked != item.question:
            raise row.bad(f"the question is {asked!r}, but in this place stands {item.question!r}")
    return {
        item.id: Answer(item, row.text("answer", "text"))
        for row, item in zip(rows, items, strict=True)
    }


def _mme(path: Path, known: Mapping[str, Item], skips: Skips) -> dict[str, Answer]:
    named = [path / f"{task}.txt" for task in (*mme.PERCEPTION, *mme.COGNITION)]
    files = [path] if path.is_file() else [file for file in named if file.is_file()]
    if not files:
        raise BadData(path, None, "there is no file of a subtask, such as existence.txt")
    found: dict[str, Answer] = {}
    for file in files:
        for line, text in read_lines(file, skips):
            cells = text.split("\t")
            key = f"{file.stem}/{cells[0].strip()}/{cells[1].strip()}" if len(cells) == 4 else ""
            if key in known:
                found[key] = Answer(known[key], cells[3])
            else:
                what = "no question of the annotations" if key else "expected four columns"
                skips.bad(BadData(file, line, what))
    return found


def _complete(
    benchmark: str,
    path: Path,
    known: Mapping[str, Item],
    found: Mapping[str, Answer],
    skips: Skips,
) -> None:
    """Refuse answers that are missing; descriptions may be of some images only."""
    if not found:
        raise EvalError(f"{path} has no answer to any of the items")
    if benchmark != "pope":
        return
    for key in known:
        if key not in found:
            skips.bad(BadData(path, None, f"there is no answer to the item {key}"))
