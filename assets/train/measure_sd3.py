"""The figures of tiny-sd3's card, measured on the saved weights with the stock pipeline.

The third text encoder's zero tokens are folded into one (see `zeros`), which gives the same
pictures at half the cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from attnctl.assets.train.generate import generate
from attnctl.assets.train.measure import draw_sheet, exactness, sizes
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.zeros import FoldedZeros

GUIDANCE = (3.0, 1.0, 2.0, 5.0)
ZEROS = 256
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Exactness for prompts of one, two and three objects, and the contact sheet."""
    pipe = load_folded(folder, run.device)
    paint = partial(pictures, pipe)
    steps = 2 if run.smoke else 20
    rows = exactness(paint, run, settings(run.smoke, steps))
    sheet = run.out / "tiny-sd3.png"
    draw_sheet(paint, run, sheet, guidance_scale=GUIDANCE[0], num_inference_steps=steps)
    return sizes(pipe, folder, PARTS) | {"exact": rows}


def load_folded(folder: Path, device: torch.device) -> StableDiffusion3Pipeline:
    """The stock pipeline with its zero tokens folded; float16 on a GPU, float32 on the CPU."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.transformer.set_attn_processor(FoldedZeros())
    return pipe.to(device, torch.float16) if device.type == "cuda" else pipe


def pictures(pipe: Any, prompts: Sequence[str], seed: int, **options: Any) -> torch.Tensor:
    """Pictures as the pipeline draws them with its default of 256 zero tokens."""
    zeros = {"log_zeros": torch.tensor([math.log(ZEROS)], device=pipe.device)}
    size = 500 if pipe.device.type == "cuda" else 10
    options |= {"max_sequence_length": 1, "joint_attention_kwargs": zeros}
    return generate(pipe, prompts, seed=seed, batch=size, **options).to(pipe.device)


def settings(smoke: bool, steps: int) -> list[tuple[float, int]]:
    """Guidance scales and step counts that are measured."""
    if smoke:
        return [(3.0, steps)]
    return [(guidance, steps) for guidance in GUIDANCE] + [(3.0, 28), (3.0, 8)]
