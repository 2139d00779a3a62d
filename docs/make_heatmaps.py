"""Draws the pictures of the heat map page, and measures whether maps sit on their objects.

    python -P docs/make_heatmaps.py [N] [pictures] [videos] [answers]

For the first N (default 20) trained prompts of two objects of different colours whose picture
the shape world's detector calls exact, the mask of an object is where the picture is nearest to
its colour. For the words of each object: the share of the map's sum that lies in the mask, in
the mask of the other object, and how often the map's greatest value lies in the own one. The
map of "and" says what a word without an object gets. Takes about two minutes on one core.

Videos of one object, the first N // 2 of the held-out prompts: the mask is taken from every frame.
Answers to "Describe the image." about the first 5 N evaluation photos: a word for an object that
is there, told by its colour and shape together, against the circle around it. Two and one minutes.
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate

import attnctl
from attnctl.apps.answer_heatmap import answer_sheet, bare, words_shown
from attnctl.apps.eval.answering import Answerer
from attnctl.apps.heatmap import sheet
from attnctl.assets import path
from attnctl.assets.world import exact, trained_prompts
from attnctl.assets.world.captions import parse
from attnctl.assets.world.evaluation import Item, album
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.palette import COLOUR_NAMES, rgb_table

FOLDER = Path(__file__).parent / "pictures"
PROMPT, MOTION = "a red circle and a blue square", "a blue triangle moving up"
QUESTION, PHOTO = "Describe the image.", 0
CALLS: dict[str, dict[str, Any]] = {
    "tiny-sd": {"guidance_scale": 5.0},
    "tiny-sd3": {"guidance_scale": 3.0, "max_sequence_length": 32},
}


def main() -> None:
    """Draw and measure what was asked for, or all."""
    torch.set_grad_enabled(False)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    parts = sys.argv[2:] or ["pictures", "videos", "answers"]
    for part in parts:
        {"pictures": pictures, "videos": videos, "answers": answers}[part](count)


def pictures(count: int) -> None:
    """Draw with tiny-sd, measure with both models for pictures."""
    for model, call in CALLS.items():
        pipe = DiffusionPipeline.from_pretrained(path(model))
        pipe.set_progress_bar_config(disable=True)
        if model == "tiny-sd":
            found = mapped(pipe, PROMPT, 3, call, ["red", "circle", "blue", "square"])
            sheet(found, PROMPT, "tiny-sd, seed 3, 20 steps").save(
                FOLDER / "heatmaps.png", optimize=True
            )
        print(model)
        for line in measured(pipe, count, call):
            print("  ", line, flush=True)


def mapped(
    pipe: Any, prompt: str, seed: int, call: dict[str, Any], words: Any, steps: int = 20
) -> Any:
    """Return the heat maps of one picture or clip."""
    noise = torch.Generator().manual_seed(seed)
    return attnctl.heatmaps(
        pipe, prompt, words, num_inference_steps=steps, generator=noise, **call
    )


def measured(pipe: Any, count: int, call: dict[str, Any]) -> Iterator[str]:
    """Yield a line per kind of word: means over the objects of `count` exact pictures."""
    rows = defaultdict(list)
    pictures = 0
    for seed, prompt in enumerate(trained_prompts(8 * count, 2, seed=7)):
        pairs = parse(prompt)
        if pairs[0][0] == pairs[1][0] or pictures == count:
            continue
        # "circle#1" where both are circles
        shapes = [f"{s}#{i + 1}" if pairs[0][1] == pairs[1][1] else s
                  for i, (_, s) in enumerate(pairs)]  # fmt: skip
        words = [[c, shape, f"{c} {s}"] for (c, s), shape in zip(pairs, shapes, strict=True)]
        found = mapped(pipe, prompt, seed, call, ["and", *words[0], *words[1]])
        image = found.images[0][0]
        if not bool(exact([image], [prompt])[0]):
            continue
        pictures += 1
        masks = [mask_of(image, colour) for colour, _ in pairs]
        for i in (0, 1):
            named = zip(("colour", "shape", "both", "and"), [*words[i], "and"], strict=True)
            for kind, word in named:
                rows[kind].append(shares(found[word], masks[i], masks[1 - i]))
    yield f"{pictures} pictures"
    yield from told(rows)


def videos(count: int) -> None:
    """Draw and measure with tiny-wan."""
    pipe = DiffusionPipeline.from_pretrained(path("tiny-wan"))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 32}
    call = {**size, "guidance_scale": 3.0, "output_type": "pil"}
    found = mapped(pipe, MOTION, 0, call, ["blue", "triangle", "up"], steps=12)
    title = "tiny-wan, seed 0, 12 steps"
    sheet(found, MOTION, title).save(FOLDER / "heatmaps-video.png", optimize=True)
    rows = defaultdict(list)
    for seed, prompt in enumerate(moving_prompts(count // 2, split="heldout", seed=0)):
        ((colour, shape),) = parse(" ".join(prompt.split()[:3]))
        found = mapped(pipe, prompt, seed, call, [colour, shape, "moving"], steps=12)
        frames = found.images[0]
        for kind, word in (("colour", colour), ("shape", shape), ("moving", "moving")):
            for i, frame in enumerate(frames):
                mask = mask_of(frame, colour)
                if mask.any():
                    near = round(i * (found.grid_frames - 1) / (len(frames) - 1))
                    rows[kind].append(shares(found[word][:, near], mask, ~mask))
    print("tiny-wan,", count // 2, "clips")
    for line in told(rows):
        print("  ", line, flush=True)


def answers(count: int) -> None:
    """Draw and measure with tiny-llava."""
    teller = Answerer.load("tiny-llava", "cpu")
    rows = defaultdict(list)
    for number, photo in enumerate(album(5 * count)):
        found = attnctl.answer_maps(
            teller.model, teller.processor, photo.image, QUESTION, pad_token_id=teller.pad
        )
        if number == PHOTO:
            drawn = answer_sheet(found, words_shown(found), QUESTION, "tiny-llava")
            drawn.save(FOLDER / "heatmaps-answer.png", optimize=True)
        words = [bare(word) for word in found.words]
        names = [item.name for item in photo.items]
        for i, pair in enumerate(itertools.pairwise(words)):
            name = " ".join(pair)
            if names.count(name) != 1:
                continue
            own = circle(photo.items[names.index(name)])
            rest = [circle(item) for item in photo.items if item.name != name]
            other = torch.stack([*rest, torch.zeros_like(own)]).any(0) & ~own
            for kind, at in (("colour", i), ("shape", i + 1)):
                rows[kind].append(shares(found.maps[at].view(1, 12, 12), own, other))
    print("tiny-llava,", 5 * count, "photos,", len(rows["shape"]), "objects named rightly")
    for line in told(rows):
        print("  ", line, flush=True)


def circle(item: Item, side: int = 72) -> Tensor:
    """Return the circle around an object, bool [side, side]."""
    at = (torch.arange(side) + 0.5) / side
    return (at[None] - item.x) ** 2 + (at[:, None] - item.y) ** 2 <= item.radius**2


def told(rows: dict[str, list[tuple[float, float, float, float]]]) -> Iterator[str]:
    """Yield a line of means per kind of word."""
    for kind, values in rows.items():
        own, other, area, top = torch.tensor(values).mean(0).tolist()
        yield (
            f"{kind:6}: in its object {own:.1%}, in the other {other:.1%} (area {area:.1%}), "
            f"greatest value in its object {top:.0%}"
        )


def mask_of(image: Any, colour: str) -> Tensor:
    """Return where a picture is nearest to a colour, bool [H, W]; greys belong to none."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(image.height, image.width, 3).float() / 255
    distance = (pixels[:, :, None] - rgb_table()).norm(dim=-1)
    strong = pixels.amax(-1) - pixels.amin(-1) > 0.25
    return (distance.argmin(-1) == COLOUR_NAMES.index(colour)) & strong


def shares(heat: Tensor, own: Tensor, other: Tensor) -> tuple[float, float, float, float]:
    """Return the map's share in two masks, the first one's area, and whether its top is there."""
    big = interpolate(heat[None], own.shape, mode="bilinear")[0, 0]
    part = big / big.sum()
    top = bool(own.flatten()[big.flatten().argmax()])
    return float(part[own].sum()), float(part[other].sum()), float(own.float().mean()), float(top)


if __name__ == "__main__":
    main()
