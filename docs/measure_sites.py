"""Which sites of tiny-sd show where an object is: the table of `docs/steering_effects.md`.

    python -P docs/measure_sites.py

Pictures of held-out prompts of two objects of different colours are drawn while every
cross-attention's maps are read in the first 30 % of the run. In pictures that came out exact, the
pixels of an object are those of its colour. How well the map of its noun, or of its colour word,
ranks these pixels before others is the area under the ROC curve: 1 always, 0.5 by chance, below
it the other way round. Means over objects.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate

import attnctl
from attnctl import assets
from attnctl.assets import world
from attnctl.assets.world.palette import COLOURS, rgb_table

FEWEST = 20
"""Pixels an object must have."""


def masks(picture: Tensor, colours: list[str]) -> list[Tensor]:
    """Return which pixels of a picture [3, h, w] have each colour rather than another or grey."""
    apart = ((picture[None] - rgb_table()[:, :, None, None]) ** 2).sum(1)
    vivid = picture.amax(0) - picture.amin(0) > 0.15
    return [(apart.argmin(0) == list(COLOURS).index(colour)) & vivid for colour in colours]


def area(scores: Tensor, inside: Tensor) -> float:
    """Return the area under the ROC curve of scores [h, w] for pixels inside or not."""
    ranks = scores.flatten().argsort().argsort().double() + 1
    mine, n = ranks[inside.flatten()], int(inside.sum())
    return float((mine.sum() - n * (n + 1) / 2) / (n * (inside.numel() - n)))


def measure(pipe: Any, prompts: list[str], steps: int) -> dict[str, dict[str, list[float]]]:
    """Return the areas by site, and by whose map it is over whose pixels."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i, prompt in enumerate(prompts):
        pairs = world.parse(prompt)
        words = [word for pair in pairs for word in pair]
        if len({c for c, _ in pairs}) < 2 or len(set(words)) < len(words):
            continue
        heat = attnctl.heatmaps(
            pipe, prompt, words, stop=0.3, each_head=True, num_inference_steps=steps,
            guidance_scale=5, generator=torch.Generator().manual_seed(i), output_type="pt",
        )  # fmt: skip
        # the picture was not kept as tensors can't be overlaid: draw it again
        picture = pipe(
            prompt, num_inference_steps=steps, guidance_scale=5, output_type="pt",
            generator=torch.Generator().manual_seed(i),
        ).images.cpu().float()  # fmt: skip
        if not world.exact(picture, [prompt]).all():
            continue
        seen = masks(picture[0], [colour for colour, _ in pairs])
        if min(int(mask.sum()) for mask in seen) < FEWEST:
            continue
        for key, mean in heat.runs[0].means().items():
            maps = interpolate(mean[0].float().mean(0).cpu(), picture.shape[-2:], mode="bilinear")
            for j, one in enumerate(maps[:, 0]):
                kind = ("colour word", "noun")[j % 2]
                found[key.site][f"{kind}, own"].append(area(one, seen[j // 2]))
                found[key.site][f"{kind}, other"].append(area(one, seen[1 - j // 2]))
    return found


def main() -> None:
    """Run from the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    found = measure(pipe, world.heldout_prompts(given.n, 2, seed=3), given.steps)
    layers = {site.name: site.layer for site in attnctl.sites(pipe)}
    heads = list(next(iter(found.values())))
    print(f"| site | {' | '.join(heads)} |\n|{' --- |' * (1 + len(heads))}")
    for site, areas in found.items():
        values = [f"{sum(areas[head]) / len(areas[head]):.2f}" for head in heads]
        print(f"| L{layers[site]} | {' | '.join(values)} |")
    print(f"\n{len(areas[heads[0]])} objects")


if __name__ == "__main__":
    main()
