"""The figures of tiny-sd's card, measured on the saved weights with the stock pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from attnctl.assets.train.generate import generate
from attnctl.assets.train.measure import draw_sheet, exactness, sizes
from attnctl.assets.train.recipe import Run

GUIDANCE = (5.0, 1.0, 3.0, 7.5)
STEPS = 20
OTHERS = ((5.0, 10), (7.5, 50))
PARTS = ("unet", "text_encoder", "vae")


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Exactness for prompts of one, two and three objects, and the contact sheet."""
    pipe = load_pipeline(folder, run.device)
    paint = partial(pictures, pipe)
    steps = 2 if run.smoke else STEPS
    rows = exactness(paint, run, settings(run.smoke, steps))
    sheet = run.out / "tiny-sd.png"
    draw_sheet(paint, run, sheet, guidance_scale=GUIDANCE[0], num_inference_steps=steps)
    return sizes(pipe, folder, PARTS) | {"exact": rows}


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The stock pipeline; float16 on a GPU, float32 on the CPU."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    return pipe.to(device, torch.float16) if device.type == "cuda" else pipe


def pictures(pipe: Any, prompts: Sequence[str], seed: int, **options: Any) -> torch.Tensor:
    """Pictures ``[N, 3, 64, 64]`` on the pipeline's device."""
    size = 500 if pipe.device.type == "cuda" else 12
    return generate(pipe, prompts, seed=seed, batch=size, **options).to(pipe.device)


def settings(smoke: bool, steps: int) -> list[tuple[float, int]]:
    """Guidance scales and step counts that are measured."""
    if smoke:
        return [(GUIDANCE[0], steps)]
    return [(guidance, steps) for guidance in GUIDANCE] + list(OTHERS)
