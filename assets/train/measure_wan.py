"""The figures of tiny-wan's card, measured on the saved weights with the stock pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import is_accelerate_available
from safetensors.torch import load_file
from tqdm import tqdm

from attnctl.assets.train.film import film
from attnctl.assets.train.measure import judge_of, sizes
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.strip import strips
from attnctl.assets.train.wan_parts import euler
from attnctl.assets.world.detector import Detector
from attnctl.assets.world.motion import FRAMES
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.watch import moved

SEED = 20
STEPS = 12
GUIDANCE = (3.0, 1.0, 5.0)
LONGER = (33, 65)
SHEET = 8


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """Judged clips of one and two objects and of longer clips, and the sheet of film strips."""
    pipe, judge = load_pipeline(folder, run.device), judge_of(run)
    frames = 5 if run.smoke else FRAMES
    rows = [
        line(pipe, judge, name, prompts, frames, guidance_scale=scale, num_inference_steps=steps)
        for name, prompts in sets(run.prompts).items()
        for scale, steps in settings(run.smoke)
    ]
    rows += longer(pipe, judge, run)
    draw_sheet(pipe, judge, run)
    parts = ("transformer", "text_encoder", "vae")
    return {**sizes(pipe, folder, parts), "moved": rows, "euler": by_euler(pipe, judge, run)}


def load_pipeline(folder: Path, device: torch.device) -> WanPipeline:
    """The stock pipeline; float16 on a GPU, float32 on the CPU."""
    own = {} if is_accelerate_available() else {"transformer": plain_transformer(folder)}
    pipe = WanPipeline.from_pretrained(folder, **own)
    return pipe.to(device, torch.float16) if device.type == "cuda" else pipe


def plain_transformer(folder: Path) -> WanTransformer3DModel:
    """The transformer in float32, where diffusers refuses to load it for lack of accelerate."""
    place = folder / "transformer"
    config = WanTransformer3DModel.load_config(place)
    model: Any = WanTransformer3DModel.from_config(config)
    model.load_state_dict(load_file(place / "diffusion_pytorch_model.safetensors"))
    return model.eval()


def sets(n: int) -> dict[str, list[str]]:
    """The card's prompt sets, ``n`` prompts each."""
    return {
        "one object": moving_prompts(n, 1, seed=1),
        "one object, held out": moving_prompts(n, 1, split="heldout", seed=1),
        "two objects": moving_prompts(n, 2, seed=1),
    }


def settings(smoke: bool) -> list[tuple[float, int]]:
    """Guidance scales and step counts that are measured."""
    if smoke:
        return [(3.0, 1)]
    return [*((guidance, STEPS) for guidance in GUIDANCE), (3.0, 8), (3.0, 24)]


def line(
    pipe: Any,
    judge: Detector,
    name: str,
    prompts: list[str],
    frames: int = FRAMES,
    **options: Any,
) -> dict[str, Any]:
    """One row of figures: share of right clips, and of each thing that has to be right."""
    size = max(1, 64 * FRAMES // frames) if pipe.device.type == "cuda" else 2
    clips = film(pipe, prompts, seed=SEED, frames=frames, batch=size, **options)
    seen = moved(clips, prompts, judge)
    parts = ("objects", "direction", "speed")
    shares = {part: round(float(getattr(seen, part).float().mean()), 4) for part in parts}
    tqdm.write(f"{name} {frames} {options} {seen.right.float().mean():.3f}", file=sys.stderr)
    row = {"prompts": name, "frames": frames, **options, **proportion(seen.right.cpu())}
    return row | shares | {"score": round(float(seen.score.mean()), 3)}


def longer(pipe: Any, judge: Detector, run: Run) -> list[dict[str, Any]]:
    """Clips longer than trained, of one slow object, so that it need not leave the picture."""
    if run.smoke:
        return []
    prompts = moving_prompts(max(2, run.prompts // 4), 1, seed=1, speeds=("slowly",))
    options = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
    return [
        line(pipe, judge, "one slow object", prompts, frames, **options)
        for frames in (FRAMES, *LONGER)
    ]


def by_euler(pipe: Any, judge: Detector, run: Run) -> list[dict[str, Any]]:
    """One object by plain Euler steps, to compare with the folder's scheduler."""
    if run.smoke:
        return []
    own, pipe.scheduler = pipe.scheduler, euler()
    prompts = sets(run.prompts)["one object"]
    rows = [
        line(pipe, judge, "one object", prompts, guidance_scale=3.0, num_inference_steps=steps)
        for steps in (8, STEPS, 24)
    ]
    pipe.scheduler = own
    return rows


def draw_sheet(pipe: Any, judge: Detector, run: Run) -> None:
    """Film strips of one and two objects at guidance 3."""
    frames, steps, n = (5, 1, 2) if run.smoke else (FRAMES, STEPS, SHEET)
    one = moving_prompts(n * 5 // 8, 1, seed=2)
    prompts = one + moving_prompts(n - len(one), 2, seed=2)
    options: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": steps}
    clips = film(pipe, prompts, seed=7, frames=frames, **options)
    strips(clips, prompts, moved(clips, prompts, judge).right.tolist(), run.out / "tiny-wan.png")
