"""CHAIR: which objects that a description names are not in the picture. Reader and score.

Over all descriptions, with mentions counted as often as they come:

    CHAIR_s = descriptions with a wrong mention / descriptions
    CHAIR_i = wrong mentions / mentions
    recall  = different objects found / objects there
    precision = different objects found / different objects named

References:
    Rohrbach et al., "Object Hallucination in Image Captioning", 2018 (arXiv 1809.02156);
    recall as in github.com/Maxlinn/CHAIR-metric-standalone, precision and F1 as in
    zhuzhenxiaoshi/VISTA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import open_answers
from .bad_data import BadData, Skips
from .estimate import Figure, Sums, Tally, ratio
from .items import Answer, Item
from .objects import Objects
from .rows import read_json, read_lines

__all__ = ["FIGURES", "REQUEST", "find_synonyms", "read", "read_ids", "score"]

REQUEST = "Please describe this image in detail."
_SOURCE = "data/synonyms.txt of github.com/LisaAnne/Hallucination"


def read(annotations: Path, skips: Skips, ids: Sequence[int] | None = None) -> list[Item]:
    """Return one request per image of COCO 2014.

    The truth of an image are the categories of its instances and the captions of its
    annotators. Images of the two years' parts have different ids, so the training files, which
    take gigabytes of memory, are read only if one of `ids` is not in the validation files.

    Args:
        annotations: folder with instances_val2014.json and captions_val2014.json, and the same
            of train2014 if they are needed.
        skips: bad annotations go there.
        ids: the images' ids; None for all of the validation set.

    Raises:
        BadData: if a file is not what it should be, or an id is in none of them.
    """
    found = _part(annotations, "val", skips)
    if ids is None:
        return list(found.values())
    if not set(ids) <= set(found) and (annotations / "instances_train2014.json").is_file():
        found |= _part(annotations, "train", skips)
    for one in ids:
        if one not in found:
            skips.bad(BadData(annotations, None, f"no annotations of an image with the id {one}"))
    return [found[one] for one in ids if one in found]


def read_ids(path: Path) -> list[int]:
    """Return the image ids of a list, one a line; file names of COCO are taken too.

    Raises:
        BadData: if a line is neither.
    """
    found = []
    for line, text in read_lines(path, Skips()):
        word = text.strip().rpartition("_")[2].partition(".")[0]
        if not word.isdecimal():
            raise BadData(path, line, f"{text.strip()[:60]!r} is no image id")
        found.append(int(word))
    return list(dict.fromkeys(found))


def _part(folder: Path, part: str, skips: Skips) -> dict[int, Item]:
    instances, captions = (
        folder / f"{kind}_{part}2014.json" for kind in ("instances", "captions")
    )
    told = read_json(instances)
    names = {one["id"]: one["name"] for one in _table(told, "categories", instances, "id", "name")}
    images = _table(told, "images", instances, "id", "file_name")
    objects: dict[int, set[str]] = {one["id"]: set() for one in images}
    sentences: dict[int, list[str]] = {one["id"]: [] for one in images}
    for one in _table(told, "annotations", instances, "image_id", "category_id"):
        try:
            objects[one["image_id"]].add(names[one["category_id"]])
        except KeyError as error:
            skips.bad(BadData(instances, None, f"annotation {one.get('id')}: no id {error}"))
    for one in _table(read_json(captions), "annotations", captions, "image_id", "caption"):
        if one["image_id"] in sentences:
            sentences[one["image_id"]].append(str(one["caption"]))
    made: dict[int, Item] = {}
    for one in images:
        number = one["id"]
        truth = {"objects": sorted(objects[number]), "captions": sentences[number]}
        item = Item(str(number), str(one["file_name"]), REQUEST, truth, instances)
        if number in made:
            skips.bad(item.bad(f"the image id {number} comes twice"))
        else:
            made[number] = item
    return made


def _table(told: Any, name: str, path: Path, *fields: str) -> list[dict[str, Any]]:
    """Return a list of a COCO file after a look at its rows."""
    rows = told.get(name) if isinstance(told, dict) else None
    if not isinstance(rows, list):
        raise BadData(path, None, f"there is no list {name!r}: this is no COCO file of 2014")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(_plain(row.get(field)) for field in fields):
            raise BadData(path, None, f"{name}[{number}] has no {' or no '.join(fields)}")
    return rows


def _plain(value: Any) -> bool:
    return isinstance(value, (int, str))


def find_synonyms(given: Path | None, annotations: Path) -> Path:
    """Return the table of synonyms: the one that was given, or one beside the annotations.

    Raises:
        BadData: if there is none; the message says where the usual one is.
    """
    if given is not None:
        return given
    for place in (annotations / "synonyms.txt", annotations.parent / "synonyms.txt"):
        if place.is_file():
            return place
    raise BadData(
        annotations, None,
        f"there is no synonyms.txt here nor a folder above; CHAIR on COCO uses {_SOURCE}: fetch "
        "it and give --synonyms FILE",
    )  # fmt: skip


def score(answers: Sequence[Answer], objects: Objects) -> Tally:
    """Return the counts of descriptions.

    Raises:
        BadData: if the table of synonyms lacks a category.
    """
    rows = [_counts(one, objects) for one in answers]
    return Tally.of([one.item.image for one in answers], rows, FIGURES)


def _counts(answer: Answer, objects: Objects) -> dict[str, float]:
    truth = answer.item.truth
    there = _nodes(answer.item, truth["objects"], objects)
    there |= {node for caption in truth["captions"] for node in objects(caption)}
    named = objects(answer.text)
    wrong = [node for node in named if node not in there]
    return {
        **open_answers.open_counts(answer),
        "wrong captions": bool(wrong),
        "wrong": len(wrong),
        "mentions": len(named),
        "found": len(there & {*named}),
        "there": len(there),
        "different": len({*named}),
    }


def _nodes(item: Item, categories: Iterable[str], objects: Objects) -> set[str]:
    try:
        return {objects.node[name] for name in categories}
    except KeyError as error:
        raise item.bad(f"the table of synonyms has no {error}, a category of the image") from error


def f1(sums: Sums) -> np.ndarray:
    """Harmonic mean of precision and recall over different objects."""
    return ratio(2 * sums["found"], sums["there"] + sums["different"])


FIGURES = (
    Figure("chair_s", "CHAIR_s", lambda s: ratio(s["wrong captions"], s["captions"])),
    Figure("chair_i", "CHAIR_i", lambda s: ratio(s["wrong"], s["mentions"])),
    Figure("recall", "recall", lambda s: ratio(s["found"], s["there"])),
    Figure("precision", "precision", lambda s: ratio(s["found"], s["different"])),
    Figure("f1", "F1", f1),
    *open_answers.FIGURES,
)
