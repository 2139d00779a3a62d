"""Measures contrastive decoding and CARVE on tiny-llava; the tables of their pages.

    python -P docs/measure_contrast.py greedy|sampled|carve [--images 500] [--seed 0] [--arm ...]

`greedy` and `sampled` (temperature 1) ask POPE's questions of the three splits, all in one run;
an arm is controls in their text form, joined by "+", or "stock". `carve` asks about small
objects: whether they are there (adversarial split) and of what colour they are; an arm is
options of `attnctl.Carver` such as "p=0.1,form=crop", "defaults", or the same after "random:",
which crops as large a box at a random place. The first arm is what the others are compared
with, question by question. Figures are percent with 95 % bootstrap intervals; sampled ones are
means over three seeds. Where a GPU is found it is used.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

import attnctl
from attnctl import assets
from attnctl.apps.bench.statistics import paired_interval
from attnctl.apps.control_syntax import parse_control, split_control
from attnctl.assets.world.evaluation import album
from attnctl.assets.world.pope import SPLITS, pope
from attnctl.assets.world.questions import COLOUR

BATCH = 128
SEEDS = 3
GREEDY = (
    "stock", "vcd:alpha=0", "vcd", "vcd:noise_step=999", "m3id", "m3id:lam=0.3", "paicfg",
    "paicfg:gamma=2", "pai:alpha=0.5", "pai:alpha=0.5+paicfg:gamma=2",
    "pai:alpha=0.5+vcd", "pai:alpha=0.5+vcd:both=true",
)  # fmt: skip
SAMPLED = ("stock", "vcd:alpha=0", "vcd", "vcd:alpha=0,beta=0.2", "vcd:beta=0.2", "paicfg:gamma=2")
TINY = "inputs=both,form=crop,p=0.1,regions=1,steps=start,layers=1-2,lam="
CARVE = (
    "stock", "defaults", "inputs=both", "inputs=both,form=crop", TINY + "0.001", TINY + "1e-8",
    TINY + "1000000", "random:" + TINY + "0.001",
)  # fmt: skip
"""A large lambda leaves the attention for the question alone."""


@dataclass
class Question:
    """One question about one picture and the word that is right."""

    image: Image
    text: str
    right: str


@dataclass
class Teller:
    """tiny-llava, and the inputs of its questions, made once."""

    model: Any
    processor: Any
    made: dict[int, list[Any]] = field(default_factory=dict)

    def answers(self, asked: Sequence[Question], seed: int | None) -> list[str]:
        """Return the answers, greedy or drawn from a seed."""
        if id(asked) not in self.made:
            self.made[id(asked)] = [
                self.inputs(asked[i : i + BATCH]) for i in range(0, len(asked), BATCH)
            ]
        drawn = {"do_sample": seed is not None, "max_new_tokens": 3}
        if seed is not None:
            torch.manual_seed(seed)
            drawn |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        told: list[str] = []
        for inputs in self.made[id(asked)]:
            tokens = self.model.generate(**inputs, **drawn)[:, inputs["input_ids"].shape[1] :]
            told += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return told

    def inputs(self, asked: Sequence[Question]) -> Any:
        """Return one batch."""
        texts = [self.prompt(one.text) for one in asked]
        images = [one.image for one in asked]
        made = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        return made.to(self.model.device)

    def prompt(self, text: str) -> str:
        """Return the prompt of a question."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("greedy", "sampled", "carve"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append")
    options = parser.parse_args()
    teller = load()
    torch.set_grad_enabled(False)
    if options.what == "carve":
        tables = small(options.images, options.seed)
        arms = options.arm or CARVE
    else:
        tables = {s: presence(s, options.images, options.seed) for s in SPLITS}
        arms = options.arm or (GREEDY if options.what == "greedy" else SAMPLED)
    for name, asked in tables.items():
        print(f"\n{name}, {len(asked)} questions\n")
        print("| arm | right | gain | F1 | recall | says yes | s |\n|" + " --- |" * 7, flush=True)
        first = None
        for arm in arms:
            start = time.time()
            told = run(teller, options.what, arm, asked)
            right = np.mean([[*map(hit, t, asked)] for t in told], axis=0)
            first = right if first is None else first
            print(line(arm, asked, told, right, first, time.time() - start), flush=True)


def load() -> Teller:
    """Return the shipped model."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = assets.path("tiny-llava")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return Teller(model.to(place), LlavaProcessor.from_pretrained(folder))


def presence(split: Any, images: int, seed: int) -> list[Question]:
    """Return a split of POPE."""
    cases = pope(split, n_images=images, seed=seed)
    return [Question(case.image, case.question, case.label) for case in cases]


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
                colours.append(Question(photo.image, COLOUR[0].format(item.pair[1]), item.pair[0]))
    return {
        "small objects, presence": [
            Question(c.image, c.question, c.label) for c in there + absent
        ],
        "small objects, colour": colours,
    }


def run(teller: Teller, what: str, arm: str, asked: Sequence[Question]) -> list[list[str]]:
    """Return the answers of an arm, once for each seed."""
    seeds = range(SEEDS) if what == "sampled" else (None,)
    if what == "carve" and arm != "stock":
        return [second_looks(teller, arm, asked)]
    controls = [] if arm == "stock" else [parse_control(part) for part in arm.split("+")]
    patched = attnctl.patch(teller.model, *controls) if controls else contextlib.nullcontext()
    with patched:
        return [teller.answers(asked, seed) for seed in seeds]


def second_looks(teller: Teller, arm: str, asked: Sequence[Question]) -> list[str]:
    """Return the answers of CARVE, or of crops as large at random places."""
    text = arm.removeprefix("random:")
    given = {} if text == "defaults" else split_control(f"carve:{text}")[1]
    kinds: dict[str, Any] = {"p": float, "lam": float, "regions": int, "layers": two}
    options = {key: kinds.get(key, str)(value) for key, value in given.items()}
    carver = attnctl.Carver(teller.model, teller.processor, max_new_tokens=3, **options)
    if text == arm:
        return [carver(one.image, one.text).answer for one in asked]
    return [misled(carver, one, random.Random(i)) for i, one in enumerate(asked)]


def two(text: str) -> tuple[int, int]:
    """Return (1, 2) for "1-2"."""
    first, last = text.split("-")
    return int(first), int(last)


def misled(carver: attnctl.Carver, one: Question, draw: random.Random) -> str:
    """Return the answer with the picture and a part of it as large as CARVE's, at random."""
    found = carver(one.image, one.text)
    if found.box is None:
        return found.answer
    wide, high = found.box[2] - found.box[0], found.box[3] - found.box[1]
    x, y = draw.randint(0, one.image.width - wide), draw.randint(0, one.image.height - high)
    part = one.image.crop((x, y, x + wide, y + high)).resize(one.image.size)
    return carver.ask([one.image, part], one.text)


def hit(told: str, one: Question) -> bool:
    """Whether the first word is the right one."""
    return told.strip().lower().split(" ")[0].strip(".") == one.right


def line(
    arm: str,
    asked: Sequence[Question],
    told: list[list[str]],
    right: np.ndarray[Any, Any],
    first: np.ndarray[Any, Any],
    seconds: float,
) -> str:
    """Return a row of the table."""
    gain = paired_interval(right, first)
    gained = f"{100 * gain.value:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    cells = [f"`{arm}`", f"{100 * right.mean():.1f}", "" if right is first else gained]
    yes = np.array([[t.strip().lower().startswith("yes") for t in run] for run in told])
    truth = np.array([one.right == "yes" for one in asked])
    if truth.any():
        caught = (yes & truth).sum() / max(1, len(told) * truth.sum())
        precise = (yes & truth).sum() / max(1, yes.sum())
        f1 = 2 * caught * precise / max(1e-9, caught + precise)
        cells += [f"{100 * f1:.1f}", f"{100 * caught:.1f}", f"{100 * yes.mean():.1f}"]
    else:
        cells += ["", "", ""]
    return f"| {' | '.join([*cells, f'{seconds:.0f}'])} |"


if __name__ == "__main__":
    main()
