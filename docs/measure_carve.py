"""Measures CARVE on small objects of tiny-llava's photos; the table of carve.md.

    python -P docs/measure_carve.py [--images 500] [--seed 103] [--arm ...] [--out FILE.json]
    python -P docs/measure_carve.py --page docs/measured/vlm/carve.json

asks of clear photos whether small objects are there (as many that are not, adversarial split) and
of what colour they are. An arm is CARVE's options in their text form, such as "p=0.1,form=crop",
"defaults", "stock", or options after "random:": a crop as large as CARVE's at a random place.
Figures are percent; gains over stock come with 95 % bootstrap intervals over the photos. `--page`
prints the table of carve.md of such a file.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

import attnctl
from attnctl import assets
from attnctl.apps.eval.estimate import Figure, Tally, difference, estimate, ratio
from attnctl.apps.eval.second_look import carve_options
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.evaluation import album
from attnctl.assets.world.pope import pope
from attnctl.assets.world.questions import COLOUR

BATCH = 128
TINY = "inputs=both,form=crop,p=0.1,regions=1,steps=start,layers=1-2,lam="
ARMS = (
    "stock", TINY + "0.001", TINY + "1e-8", TINY + "1000000", "random:" + TINY + "0.001",
    "defaults", "inputs=both", "inputs=both,form=crop",
)  # fmt: skip
"""A large lambda leaves the attention for the question alone."""
NAMES = {
    "stock": "stock",
    TINY + "0.001": "the photo and a crop, lam 0.001",
    TINY + "1e-8": "the same, lam 1e-8",
    TINY + "1000000": "the same, the question's map alone (lam 1000000)",
    "random:" + TINY + "0.001": "the photo and a random crop of that size",
    "inputs=both,form=crop": "`inputs=both,form=crop`",
    "defaults": "defaults",
}
"""What the page calls its arms."""
FIGURES = (Figure("right", "right", lambda s: ratio(s["right"], s["n"])),)


@dataclass(frozen=True)
class Question:
    """One question about one photo and the word that is right."""

    photo: int
    image: Image
    text: str
    right: str


def main() -> None:
    """Print the table, and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args()
    if given.page:
        print(page(json.loads(given.page.read_text())["rows"]))
        return
    torch.set_grad_enabled(False)
    teller = Teller.load(assets.path("tiny-llava"), dtype=torch.float32)
    tables = small(given.images, given.seed)
    print("| questions | n | arm | right | gain | s |\n|" + " --- |" * 6, flush=True)
    facts = {"images": given.images, "seed": given.seed, "torch": torch.__version__}
    found: list[dict[str, Any]] = []
    for name, asked in tables.items():
        base = None
        for arm in given.arm or ARMS:
            start = time.time()
            told = answers(teller, arm, asked)
            rows = [
                {"n": 1.0, "right": float(word(text) == one.right)}
                for text, one in zip(told, asked, strict=True)
            ]
            tally = Tally.of([str(one.photo) for one in asked], rows, FIGURES)
            base = base or tally
            gain = difference(tally, base)["right"]
            row = {
                "questions": name, "n": len(asked), "arm": arm,
                "right": estimate(tally)["right"].value, "gain": gain.value,
                "low": gain.low, "high": gain.high, "seconds": round(time.time() - start, 1),
            }  # fmt: skip
            print(line(row), flush=True)
            found.append(row)
            if given.out:
                given.out.write_text(json.dumps({**facts, "rows": found}, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    right, gain, low, high = (100 * row[key] for key in ("right", "gain", "low", "high"))
    return (
        f"| {row['questions']} | {row['n']} | `{row['arm']}` | {right:.1f} | {gain:+.1f} "
        f"[{low:+.1f}, {high:+.1f}] | {row['seconds']:.0f} |"
    )


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page's table."""
    kinds = {row["questions"]: row["n"] for row in rows}
    heads = [f"{name} ({n}) | gain" for name, n in kinds.items()]
    lines = [f"| with | {' | '.join(heads)} |", f"|{' --- |' * (1 + 2 * len(kinds))}"]
    for arm, name in NAMES.items():
        told = []
        for kind in kinds:
            (row,) = [one for one in rows if (one["arm"], one["questions"]) == (arm, kind)]
            right, gain, low, high = (100 * row[key] for key in ("right", "gain", "low", "high"))
            told.append(f"{right:.1f}")
            told.append("" if arm == "stock" else f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {name} | {' | '.join(told)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def small(images: int, seed: int) -> dict[str, list[Question]]:
    """Return questions about small objects of clear photos, half of those of presence no."""
    cases = pope("adversarial", n_images=images, seed=seed)
    there = [c for c in cases if c.small and not c.dim]
    absent = [c for c in cases if c.item is None and not c.dim][: len(there)]
    colours = []
    for photo in album(images, seed):
        shapes = [item.pair[1] for item in photo.items]
        for item in photo.items:
            if item.small and not photo.dim and shapes.count(item.pair[1]) == 1:
                text = COLOUR[0].format(item.pair[1])
                colours.append(Question(photo.number, photo.image, text, item.pair[0]))
    asked = [Question(c.photo.number, c.image, c.question, c.label) for c in there + absent]
    return {"is it there?": asked, "of what colour?": colours}


def answers(teller: Teller, arm: str, asked: Sequence[Question]) -> list[str]:
    """Return an arm's answers."""
    text = arm.removeprefix("random:")
    options = {} if text in ("stock", "defaults") else carve_options(f"carve:{text}")
    told = []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        carver = attnctl.Carver(teller.model, teller.processor, max_new_tokens=3, **options)
        if arm == "stock":
            told += carver.ask_many([[one.image] for one in some], [one.text for one in some])
        elif text == arm:
            found = carver.many([one.image for one in some], [one.text for one in some])
            told += [one.answer for one in found]
        else:
            told += misled(carver, some, random.Random(start))
    return told


def misled(carver: attnctl.Carver, asked: Sequence[Question], draw: random.Random) -> list[str]:
    """Return answers with the photos and parts of them as large as CARVE's, at random places."""
    found = carver.many([one.image for one in asked], [one.text for one in asked])
    shown = []
    for one, carved in zip(asked, found, strict=True):
        box = carved.box or (0, 0, *one.image.size)
        wide, high = box[2] - box[0], box[3] - box[1]
        x, y = draw.randint(0, one.image.width - wide), draw.randint(0, one.image.height - high)
        part = one.image.crop((x, y, x + wide, y + high)).resize(one.image.size)
        shown.append([one.image, part])
    return carver.ask_many(shown, [one.text for one in asked])


def word(told: str) -> str:
    """Return the first word."""
    return told.strip().lower().split(" ")[0].strip(".")


if __name__ == "__main__":
    main()
