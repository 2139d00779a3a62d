"""Draws the picture of the heat map page, and measures whether maps sit on their objects.

    python -P docs/make_heatmaps.py [N]

For the first N (default 20) trained prompts of two objects of different colours whose picture
the shape world's detector calls exact, the mask of an object is where the picture is nearest to
its colour. For the words of each object: the share of the map's sum that lies in the mask, in
the mask of the other object, and how often the map's greatest value lies in the own one. The
map of "and" says what a word without an object gets. Takes about two minutes on one core.
"""

from __future__ import annotations

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
from attnctl.apps.heatmap import sheet
from attnctl.assets import path
from attnctl.assets.world import exact, trained_prompts
from attnctl.assets.world.captions import parse
from attnctl.assets.world.palette import COLOUR_NAMES, rgb_table

PICTURE = Path(__file__).parent / "pictures" / "heatmaps.png"
PROMPT = "a red circle and a blue square"
CALLS: dict[str, dict[str, Any]] = {
    "tiny-sd": {"guidance_scale": 5.0},
    "tiny-sd3": {"guidance_scale": 3.0, "max_sequence_length": 32},
}


def main() -> None:
    """Draw with tiny-sd, measure with both models."""
    torch.set_grad_enabled(False)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    for model, call in CALLS.items():
        pipe = DiffusionPipeline.from_pretrained(path(model))
        pipe.set_progress_bar_config(disable=True)
        if model == "tiny-sd":
            found = mapped(pipe, PROMPT, 3, call, ["red", "circle", "blue", "square"])
            sheet(found, PROMPT, "tiny-sd, seed 3, 20 steps").save(PICTURE, optimize=True)
        print(model)
        for line in measured(pipe, count, call):
            print("  ", line, flush=True)


def mapped(pipe: Any, prompt: str, seed: int, call: dict[str, Any], words: Any) -> Any:
    """Return the heat maps of one picture."""
    noise = torch.Generator().manual_seed(seed)
    return attnctl.heatmaps(pipe, prompt, words, num_inference_steps=20, generator=noise, **call)


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
