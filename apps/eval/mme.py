"""MME: yes and no in fourteen subtasks, two questions per image. Reader and score.

A subtask's score is 100 (accuracy + accuracy+), accuracy+ being the share of images with both
answers right; perception is the sum of ten subtasks, cognition that of four.

References:
    Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
    2023 (arXiv 2306.13394); the files and calculation.py of its evaluation tool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .bad_data import BadData, EvalError, Skips
from .estimate import Figure, Sums, Tally, ratio
from .items import Answer, Item
from .parsers import Parser
from .pope import yes_no_counts
from .rows import read_lines

__all__ = ["COGNITION", "PERCEPTION", "read", "score"]

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
HALLUCINATION = PERCEPTION[:4]
_ENDINGS = (".jpg", ".png", ".jpeg")


def read(annotations: Path, skips: Skips) -> list[Item]:
    """Return the questions of one subtask's file, or of a folder of them.

    A file has lines "image TAB question TAB Yes|No". A folder is that of the evaluation tool
    (existence.txt and so on) or of the data set (a folder per subtask, a file per image).

    Raises:
        BadData: if a file or a line is not what it should be.
    """
    if annotations.is_file():
        return _pairs(_table(annotations, annotations.stem, skips), skips)
    items: list[Item] = []
    for task in (*PERCEPTION, *COGNITION):
        whole, folder = annotations / f"{task}.txt", annotations / task
        if whole.is_file():
            items += _table(whole, task, skips)
        elif folder.is_dir():
            items += _per_image(folder, task, skips)
    if not items:
        raise BadData(annotations, None, "there is no subtask of MME here, such as existence.txt")
    return _pairs(items, skips)


def _table(path: Path, task: str, skips: Skips) -> list[Item]:
    items = []
    for line, text in read_lines(path, skips):
        try:
            items.append(_item(path, line, task, text.split("\t")))
        except BadData as error:
            skips.bad(error)
    return items


def _per_image(folder: Path, task: str, skips: Skips) -> list[Item]:
    places = (folder / "questions_answers_YN", folder)
    files = next((found for p in places if (found := sorted(p.glob("*.txt")))), [])
    items = []
    for path in files:
        for line, text in read_lines(path, skips):
            try:
                items.append(_item(path, line, task, [path.stem, *text.split("\t")]))
            except BadData as error:
                skips.bad(error)
    return items


def _item(path: Path, line: int, task: str, cells: list[str]) -> Item:
    if len(cells) not in (3, 4):  # the fourth is an answer
        raise BadData(
            path,
            line,
            f"expected image, question and Yes or No between tabs, got {len(cells)} cells",
        )
    image, question, label = cells[0].strip(), cells[1].strip(), cells[2].strip().lower()
    if label not in ("yes", "no"):
        raise BadData(path, line, f"the truth is {cells[2]!r}, expected Yes or No")
    names = [image] if image.lower().endswith(_ENDINGS) else [image + e for e in _ENDINGS]
    places = [f"{task}/{n}" for n in names] + [f"{task}/images/{n}" for n in names] + names
    truth = {"label": label, "task": task}
    return Item(
        f"{task}/{image}/{question}", places[0], question, truth, path, line, tuple(places)
    )


def _pairs(items: Sequence[Item], skips: Skips) -> list[Item]:
    """Return the items whose image has two questions, which is what accuracy+ needs."""
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(item.image, []).append(item)
    for image, found in by_image.items():
        if len(found) != 2:
            skips.bad(found[-1].bad(f"{image} has {len(found)} questions, expected 2"))
    return [item for item in items if len(by_image[item.image]) == 2]


def score(answers: Sequence[Answer], parser: Parser) -> Tally:
    """Return the counts of answers; an image of which one answer is missing is left out.

    Raises:
        EvalError: if there is no image with two answers.
    """
    by_image: dict[str, list[Answer]] = {}
    for one in answers:
        by_image.setdefault(one.item.image, []).append(one)
    whole = {image: pair for image, pair in by_image.items() if len(pair) == 2}
    if not whole:
        raise EvalError("no image has answers to both of its questions")
    rows = [_counts(pair, parser) for pair in whole.values()]
    tasks = list(dict.fromkeys(pair[0].item.truth["task"] for pair in whole.values()))
    return Tally.of(list(whole), rows, figures(tasks))


def _counts(pair: Sequence[Answer], parser: Parser) -> dict[str, float]:
    task = pair[0].item.truth["task"]
    both = [yes_no_counts(one.text, one.item.truth["label"], parser) for one in pair]
    sums = {key: sum(one[key] for one in both) for key in both[0]}
    shown = {"images": 1, "n": 2, "right": sums["right"], "both": sums["right"] == 2}
    return {**sums, **{f"{key} {task}": value for key, value in shown.items()}}


def figures(tasks: Sequence[str]) -> list[Figure]:
    """Return the figures of the subtasks that there are, and the sums of those that are whole."""
    found = [Figure(task, task, _points((task,)), "", 2) for task in tasks]
    sums = (
        ("perception", PERCEPTION), ("cognition", COGNITION),
        ("hallucination", HALLUCINATION),
    )  # fmt: skip
    for key, parts in sums:
        if set(parts) <= set(tasks):
            found.append(Figure(key, f"{key} (sum)", _points(parts), "", 2))
    shares = (("accuracy", "right"), ("says yes", "yes"), ("unparsed", "unparsed"))
    found += [Figure(head, head, _share(name)) for head, name in shares]
    return found


def _points(tasks: Sequence[str]) -> Callable[[Sums], np.ndarray]:
    def points(s: Sums) -> np.ndarray:
        scores = [
            100 * ratio(s[f"right {t}"], s[f"n {t}"])
            + 100 * ratio(s[f"both {t}"], s[f"images {t}"])
            for t in tasks
        ]
        return np.sum(scores, axis=0)

    return points


def _share(name: str) -> Callable[[Sums], np.ndarray]:
    return lambda s: ratio(s[name], s["n"])
