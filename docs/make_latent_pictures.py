"""Draws the pictures of the page on moving latents, with tiny-sd and the presets made for it.

    python -P docs/make_latent_pictures.py [strips] [curves]

`strips`: four held-out prompts of two objects, a row for stock and one for each control, from
the same noise; captions are green where the shape world's detector calls the picture exact.
`curves`: the maps of the two nouns at every step, stock and with A-STAR, over twelve prompts:
their overlap, and how much of a noun's mask of the first step is in that of the last (IoU).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import attnctl
from attnctl.apps.bench.curves import Curve, Panel, curves
from attnctl.apps.bench.effect import draw
from attnctl.assets import path
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.world import exact, heldout_prompts
from attnctl.processors.latent.a_star import overlap, peak_mask
from attnctl.processors.latent.engine import LatentControl
from attnctl.processors.latent.maps import smoothed

FOLDER = Path(__file__).parent / "pictures"
OPTIONS = {"num_inference_steps": 10, "guidance_scale": 5.0}
SITES = "L1-2"
MOVE: dict[str, Any] = {"scale": 1.0, "keep_norm": True, "heads": SITES}


def controls(pipe: Any) -> dict[str, attnctl.Control]:
    """Return the presets for tiny-sd; where there is none, small moves."""
    return {
        "a-star": attnctl.AStar.for_model(pipe),
        "attend-and-excite": attnctl.AttendAndExcite.for_model(pipe),
        "conform": attnctl.Conform(**MOVE, updates=0),
        "divide-and-bind": attnctl.DivideAndBind(**MOVE, updates=0),
        "syngen": attnctl.SynGen(**MOVE),
        "disendiff": attnctl.DisenDiff.for_model(pipe),
        "regulation": attnctl.Regulation.for_model(pipe),
    }


def strips(pipe: Any) -> None:
    """Draw the rows and save them."""
    prompts = heldout_prompts(4, 2, seed=11)
    rows = {"stock": draw(pipe, prompts, seed=500, **OPTIONS)}
    for name, control in controls(pipe).items():
        with attnctl.patch(pipe, control):
            rows[name] = draw(pipe, prompts, seed=500, **OPTIONS)
        print(control, flush=True)
    captions = [f"{name}: {prompt}" for name in rows for prompt in prompts]
    every = torch.cat(list(rows.values()))
    good = exact(every, prompts * len(rows)).tolist()
    contact_sheet(every, captions, good, FOLDER / "latent_strips.png", columns=len(prompts))


def maps_by_step(
    pipe: Any, prompts: Sequence[str], words: Any, *stack: attnctl.Control
) -> list[Tensor]:
    """Return the maps [samples, words, height, width] of every step."""
    runs: list[Any] = []
    sums: list[Tensor] = []

    def note(pipe: Any, index: int, time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        (total,) = runs[0].sums.values()
        sums.append(total[:, 0].clone())
        return kept

    noise = [torch.Generator().manual_seed(500 + i) for i in range(len(prompts))]
    watch = attnctl.HeatMap(words, sink=runs.append, heads=SITES)
    with attnctl.patch(pipe, *stack, watch):
        pipe(prompts, generator=noise, callback_on_step_end=note, output_type="latent", **OPTIONS)
    ((key, count),) = runs[0].counts.items()
    means = [b - a for a, b in itertools.pairwise([torch.zeros_like(sums[0]), *sums])]
    return [mean.unflatten(-1, key.grid)[:, :, 0] * len(sums) / count[0] for mean in means]


def measured(steps: list[Tensor]) -> tuple[list[float], float]:
    """Return the mean overlap at each step, and the mean IoU of first and last masks."""
    blurred = [smoothed(maps) for maps in steps]
    overlaps = [float(overlap(maps[:, 0], maps[:, 1]).mean()) for maps in blurred]
    first, last = (peak_mask(maps.flatten(0, 1)) for maps in (blurred[0], blurred[-1]))
    union = torch.maximum(first, last).flatten(1).sum(1)
    shared = torch.minimum(first, last).flatten(1).sum(1)
    return overlaps, float((shared / union).mean())


def overlap_curves(pipe: Any) -> None:
    """Draw the overlap over the steps, and print it with the IoU."""
    prompts = [p for p in heldout_prompts(60, 2, seed=11) if len(set(nouns(p))) == 2][:12]
    preset = attnctl.AStar.for_model(pipe)
    assert isinstance(preset, LatentControl)
    stacks: dict[str, tuple[attnctl.Control, ...]] = {
        "stock": (),
        "a-star, preset": (preset,),
        "a-star, all steps": (dataclasses.replace(preset, stop=1.0),),
        f"a-star at {SITES}, scale 20": (attnctl.AStar(heads=SITES, keep_norm=True),),
    }
    lines = []
    for name, stack in stacks.items():
        groups = [maps_by_step(pipe, [p], nouns(p), *stack) for p in prompts]
        steps = [torch.cat(maps) for maps in zip(*groups, strict=True)]
        overlaps, iou = measured(steps)
        lines.append(Curve(name, [(i + 1, value) for i, value in enumerate(overlaps)]))
        print(f"{name}: overlap {[round(v, 4) for v in overlaps]}, IoU {iou:.3f}", flush=True)
    title = "Overlap of two nouns' maps, tiny-sd, mean over 12 prompts"
    picture = curves(title, [Panel("step", "sum min / sum", lines)])
    picture.save(FOLDER / "latent_overlap.png", optimize=True)


def nouns(prompt: str) -> list[str]:
    """Return the nouns of a prompt's concepts."""
    return [concept.noun.text for concept in attnctl.concepts(prompt)]


def main() -> None:
    """Draw what is named on the command line, or both."""
    torch.set_grad_enabled(False)
    pipe = StableDiffusionPipeline.from_pretrained(path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    names = sys.argv[1:] or ["strips", "curves"]
    if "strips" in names:
        strips(pipe)
    if "curves" in names:
        overlap_curves(pipe)


if __name__ == "__main__":
    main()
