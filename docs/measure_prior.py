"""Where tiny-llava's errors on POPE come from, and what a contrast could take away.

    python -P docs/measure_prior.py [--images 500] [--seed 101] [--model FOLDER]

Prints, for each split, from the margins log p(Yes) - log p(No) of the first token: how much of
the error lies on dim photos, how well margins separate there, what the model says without the
image, which share of the errors the right weight of a contrast would turn, question by question,
and how many questions the best fixed mix of the margins (with the image, with noisy ones, without)
gets right on photos that it was not fitted on. No contrast of these passes can do better than
about that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl import assets
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.evaluation import album
from attnctl.assets.world.pope import SPLITS, Case, questions
from attnctl.hosts.vlm_tokens import image_ids
from attnctl.processors.vlm.vcd import noised

NOISE = (500, 800, 999)
BATCH = 250
Margins = np.ndarray[Any, Any]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--model", type=Path, default=assets.path("tiny-llava"))
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    teller = Teller.load(given.model, dtype=torch.float32)
    photos = album(given.images, given.seed)
    for name in SPLITS:
        cases = questions(photos, name, given.seed)
        told = {
            "image": margins(teller, cases, lambda pixels: pixels),
            **{f"noise {t}": margins(teller, cases, noise(t)) for t in NOISE},
            "no image": blind(teller, cases),
        }
        print(f"\n{name}, {len(cases)} questions")
        describe(cases, told)


def margins(teller: Teller, cases: Sequence[Case], change: Callable[[Tensor], Tensor]) -> Margins:
    """Return the margins with changed photos."""
    pixels = teller.pixels(dict.fromkeys(case.photo for case in cases))
    parts = []
    for start in range(0, len(cases), BATCH):
        some = cases[start : start + BATCH]
        seen = change(torch.stack([pixels[case.photo] for case in some]))
        words = teller.words([case.question for case in some])
        parts.append(margin(teller, words, pixel_values=seen))
    return np.concatenate(parts)


def margin(teller: Teller, words: dict[str, Tensor], **inputs: Any) -> Margins:
    """Return the margins of a batch."""
    logits = teller.model(**words, **inputs, logits_to_keep=1).logits[:, -1].float()
    encode = teller.processor.tokenizer.encode
    yes, no = (encode(word, add_special_tokens=False)[0] for word in ("Yes", "No"))
    found: Margins = (logits[:, yes] - logits[:, no]).cpu().numpy()
    return found


def noise(step: int) -> Callable[[Tensor], Tensor]:
    """Return what VCD does to photos."""
    draw = torch.Generator().manual_seed(0)
    return lambda pixels: noised(
        pixels, torch.randn(pixels.shape[1:], generator=draw.manual_seed(0)).to(pixels), step
    )


def blind(teller: Teller, cases: Sequence[Case]) -> Margins:
    """Return the margins of the words alone; the questions are few."""
    (image,) = image_ids(teller.model.config)
    known: dict[str, float] = {}
    for text in {case.question for case in cases}:
        ids = teller.words([text])["input_ids"]
        ids = ids[ids != image][None]
        known[text] = float(margin(teller, {"input_ids": ids})[0])
    return np.array([known[case.question] for case in cases])


def describe(cases: Sequence[Case], told: dict[str, Margins]) -> None:
    """Print one split's figures."""
    yes = np.array([case.label == "yes" for case in cases])
    dim = np.array([case.dim for case in cases])
    seen = told["image"]
    wrong = (seen > 0) != yes
    print(f"right {1 - wrong.mean():.3f}; of the errors on dim photos {dim[wrong].mean():.2f}")
    for part, where in (("clear", ~dim), ("dim", dim)):
        right = 1 - wrong[where].mean()
        print(f"  {part}: right {right:.3f}, AUC {auc(seen[where], yes[where]):.3f}")
    alone = told["no image"]
    print(f"without the image: says yes {(alone > 0).mean():.3f}, AUC {auc(alone, yes):.3f}")
    for name, weak in told.items():
        if name != "image":
            turned = np.where(yes, seen > weak, seen < weak)[wrong].mean()
            print(f"  errors that some weight of the contrast with {name} turns: {turned:.2f}")
    photo = np.array([case.photo.number for case in cases])
    print(f"best mix of all margins, held out: {mixed(np.stack([*told.values()], 1), yes, photo)}")


def auc(score: Margins, yes: Margins) -> float:
    """Return the chance that a yes has the higher score than a no."""
    return float((score[yes][:, None] > score[~yes][None]).mean())


def mixed(x: Margins, yes: Margins, photo: Margins) -> str:
    """Return the share of right answers of a logistic fit, on the other half of the photos."""
    right = np.zeros(len(yes))
    for half in (0, 1):
        held = photo % 2 == half
        weights = logistic(x[~held], yes[~held])
        right[held] = (x[held] @ weights[:-1] + weights[-1] > 0) == yes[held]
    return f"{right.mean():.3f}"


def logistic(x: Margins, yes: Margins) -> Margins:
    """Return weights and the constant of a logistic fit."""
    rows = torch.tensor(np.concatenate([x, np.ones((len(x), 1))], axis=1), dtype=torch.float64)
    goal = torch.tensor(yes, dtype=torch.float64)
    weights = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> Tensor:
        search.zero_grad()
        made = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weights, goal)
        made.backward()  # type: ignore[no-untyped-call]
        return made

    with torch.enable_grad():
        search.step(loss)
    return weights.detach().numpy()


if __name__ == "__main__":
    main()
