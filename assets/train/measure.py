"""Figures of an image model's card: how many pictures show exactly what their prompts say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.train.weights import millions
from attnctl.assets.world.captions import heldout_prompts, trained_prompts
from attnctl.assets.world.detector import WEIGHTS, Detector, exact, load, log_prob

SEED = 20
SHEET = 24
Paint = Callable[..., Tensor]  # (prompts, seed, **options) to pictures [N, 3, H, W] in 0 to 1


def sets(n: int) -> dict[str, list[str]]:
    """The card's prompt sets, ``n`` prompts each."""
    return {
        "one object": trained_prompts(n, 1, seed=1),
        "two objects": trained_prompts(n, 2, seed=1),
        "two objects, held out": heldout_prompts(n, 2, seed=1),
        "three objects": trained_prompts(n, 3, seed=1),
        "three objects, held out": heldout_prompts(n, 3, seed=1),
    }


def exactness(
    paint: Paint, run: Run, settings: Iterable[tuple[float, int]]
) -> list[dict[str, Any]]:
    """Rows of figures for prompts of one, two and three objects.

    Args:
        paint: draws pictures, on the run's device.
        run: says how many prompts.
        settings: guidance scales and step counts.
    """
    judge, settings = judge_of(run), list(settings)
    return [
        line(paint, judge, name, prompts, guidance_scale=guidance, num_inference_steps=count)
        for name, prompts in sets(run.prompts).items()
        for guidance, count in settings
    ]


def judge_of(run: Run) -> Detector:
    """The detector, on the run's device."""
    return load(run.find(WEIGHTS)).to(run.device)


def line(
    paint: Paint, judge: Detector, name: str, prompts: list[str], **options: Any
) -> dict[str, Any]:
    """One row of figures: share of exact pictures and mean log-probability."""
    images = paint(prompts, SEED, **options)
    hits = exact(images, prompts, judge).cpu()
    with torch.no_grad():
        sure = float(log_prob(images, prompts, judge).mean())
    tqdm.write(f"{name} {options} {hits.float().mean():.3f}", file=sys.stderr)
    return {"prompts": name, **options, **proportion(hits), "log_prob": round(sure, 3)}


def draw_sheet(paint: Paint, run: Run, path: Path, **options: Any) -> None:
    """Contact sheet of one, two and three objects."""
    part = (4 if run.smoke else SHEET) // 4
    prompts = trained_prompts(part, 1, seed=2) + heldout_prompts(2 * part, 2, seed=2)
    prompts += heldout_prompts(part, 3, seed=2)
    images = paint(prompts, 7, **options)
    contact_sheet(images, prompts, exact(images, prompts, judge_of(run)).tolist(), path)


def sizes(pipe: Any, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Millions of parameters of each part, and megabytes of all weights in the folder."""
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return {
        "millions": {part: millions(getattr(pipe, part)) for part in parts},
        "megabytes": round(size / 1e6, 2),
    }


def probe(paint: Paint, run: Run, n: int) -> dict[str, float]:
    """Share of exact pictures for ``n`` prompts of one object and of two."""
    judge = judge_of(run)
    kinds = {"one": trained_prompts(n, 1, seed=3), "two": trained_prompts(n, 2, seed=3)}
    hits = {name: exact(paint(prompts, SEED), prompts, judge) for name, prompts in kinds.items()}
    return {name: round(float(hit.float().mean()), 3) for name, hit in hits.items()}
