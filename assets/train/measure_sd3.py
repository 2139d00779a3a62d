"""The figures of tiny-sd3's card, measured on the saved weights with the stock pipeline.

The third text encoder's zero tokens are folded into one (see `zeros`), which gives the same
pictures at half the cost.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from tqdm import tqdm

from attnctl.assets.train.generate import generate
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.train.weights import millions
from attnctl.assets.train.zeros import FoldedZeros
from attnctl.assets.world.captions import heldout_prompts, trained_prompts
from attnctl.assets.world.detector import WEIGHTS, Detector, exact, load, log_prob

GUIDANCE = (3.0, 1.0, 2.0, 5.0)
SEED = 20
ZEROS = 256
SHEET = 24


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Exactness for prompts of one, two and three objects, and the contact sheet."""
    pipe = load_folded(folder, run.device)
    judge = load(run.find(WEIGHTS)).to(run.device)
    steps = 2 if run.smoke else 20
    rows = [
        line(pipe, judge, name, prompts, guidance_scale=guidance, num_inference_steps=count)
        for name, prompts in sets(run.prompts).items()
        for guidance, count in settings(run.smoke, steps)
    ]
    draw_sheet(pipe, judge, run.out / "tiny-sd3.png", steps, 4 if run.smoke else SHEET)
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return {
        "millions": {part: millions(getattr(pipe, part)) for part in parts},
        "megabytes": round(size / 1e6, 2),
        "exact": rows,
    }


def load_folded(folder: Path, device: torch.device) -> StableDiffusion3Pipeline:
    """The stock pipeline with its zero tokens folded; float16 on a GPU, float32 on the CPU."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipe.transformer.set_attn_processor(FoldedZeros())
    return pipe.to(device, torch.float16) if device.type == "cuda" else pipe


def pictures(pipe: Any, prompts: list[str], seed: int, **options: Any) -> torch.Tensor:
    """Pictures as the pipeline draws them with its default of 256 zero tokens."""
    zeros = {"log_zeros": torch.tensor([math.log(ZEROS)], device=pipe.device)}
    size = 500 if pipe.device.type == "cuda" else 10
    options |= {"max_sequence_length": 1, "joint_attention_kwargs": zeros}
    return generate(pipe, prompts, seed=seed, batch=size, **options).to(pipe.device)


def sets(n: int) -> dict[str, list[str]]:
    """The card's prompt sets, ``n`` prompts each."""
    return {
        "one object": trained_prompts(n, 1, seed=1),
        "two objects": trained_prompts(n, 2, seed=1),
        "two objects, held out": heldout_prompts(n, 2, seed=1),
        "three objects": trained_prompts(n, 3, seed=1),
        "three objects, held out": heldout_prompts(n, 3, seed=1),
    }


def settings(smoke: bool, steps: int) -> list[tuple[float, int]]:
    """Guidance scales and step counts that are measured."""
    if smoke:
        return [(3.0, steps)]
    return [(guidance, steps) for guidance in GUIDANCE] + [(3.0, 28), (3.0, 8)]


def line(
    pipe: Any, judge: Detector, name: str, prompts: list[str], **options: Any
) -> dict[str, Any]:
    """One row of figures: share of exact pictures and mean log-probability."""
    images = pictures(pipe, prompts, SEED, **options)
    hits = exact(images, prompts, judge).cpu()
    with torch.no_grad():
        sure = float(log_prob(images, prompts, judge).mean())
    tqdm.write(f"{name} {options} {hits.float().mean():.3f}", file=sys.stderr)
    return {"prompts": name, **options, **proportion(hits), "log_prob": round(sure, 3)}


def draw_sheet(pipe: Any, judge: Detector, path: Path, steps: int, n: int) -> None:
    """Contact sheet of one, two and three objects at guidance 3."""
    part = n // 4
    prompts = trained_prompts(part, 1, seed=2) + heldout_prompts(2 * part, 2, seed=2)
    prompts += heldout_prompts(part, 3, seed=2)
    images = pictures(pipe, prompts, 7, guidance_scale=3.0, num_inference_steps=steps)
    contact_sheet(images, prompts, exact(images, prompts, judge).tolist(), path)
