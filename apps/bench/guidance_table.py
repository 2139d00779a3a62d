"""The table of the docs: guidance controls on tiny-sd3, with CFG and without.

    python -m attnctl.apps.bench.guidance_table --n 400 --out docs/tables

Writes guidance.md and guidance.json. On a GPU a minute, on two CPU cores an hour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import attnctl
from attnctl.assets import path
from attnctl.assets.world import heldout_prompts

from .effect import Arm, Scores, row, run_arms, table
from .placebo import shuffled

SCALES = (0.5, 1.0, 2.0)
US = (0.0, 0.25, 0.5, 0.75, 1.0)


def arms(scales: tuple[float, ...], layers: int) -> Iterator[Arm]:
    """Yield stock, PAG on all layers, SoftPAG over u, single layers, and the placebo."""
    yield Arm("stock")
    for w in scales:
        for u in US:
            name = f"SoftPAG, all layers, w={w:g}, u={u:g}"
            yield Arm(name if u < 1 else f"PAG, all layers, w={w:g} (u=1)", (_soft(w, u),))
        pag = attnctl.PAG(scale=w, block="image_logit")
        yield Arm(f"PAG image_logit, all layers, w={w:g}", (pag,))
    for layer in range(layers):
        control = attnctl.SoftPAG(heads=f"L{layer}", scale=scales[-1], u=1.0)
        yield Arm(f"PAG layer {layer}, w={scales[-1]:g}", (control,))
    w = scales[-1]
    others: dict[str, attnctl.Control] = {
        "SEG infinite": attnctl.SEG(scale=w),
        "SEG sigma 2": attnctl.SEG(scale=w, sigma=2.0),
        "uniform": attnctl.UniformGuidance(scale=w),
        "SLG": attnctl.SLG(scale=w, start=0.0, stop=1.0),
        "temperature 1e-5": attnctl.TemperatureGuidance(scale=w),
        "TPG": attnctl.TPG(scale=w),
    }
    for name, other in others.items():
        yield Arm(f"{name}, all layers, w={w:g}", (other,))
        soft = type(other)(**{**vars(other), "u": 0.5})
        yield Arm(f"{name}, all layers, w={w:g}, u=0.5", (soft,))
    for w, u in ((0.5, 0.5), (1.0, 0.25), (2.0, 0.5)):
        placebo = shuffled(attnctl.SoftPAG(scale=w, u=u))
        yield Arm(f"placebo: neighbour's term, SoftPAG w={w:g}, u={u:g}", (placebo,))


def _soft(scale: float, u: float) -> attnctl.Control:
    return attnctl.SoftPAG(scale=scale, u=u)


def measure(
    pipe: Any, n: int, guidance: float, only: str = "", **options: Any
) -> dict[str, Scores]:
    """Return the scores of the arms over n held-out two-object prompts.

    Args:
        pipe: tiny-sd3.
        n: prompts.
        guidance: guidance scale of the pipeline.
        only: a text that the names of the arms beside stock must contain.
        **options: as in `run_arms`.
    """
    layers = 1 + max(s.layer or 0 for s in attnctl.sites(pipe))
    prompts = heldout_prompts(n, 2, seed=5)
    stock, *others = arms(SCALES, layers)
    every = [stock, *(arm for arm in others if only in arm.name)]
    return run_arms(
        pipe, every, prompts, seed=1000, guidance_scale=guidance,
        show=lambda name, found: print(row(name, found), flush=True), **options,
    )  # fmt: skip


def main() -> None:
    """Run from the command line."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--out", type=Path, default=Path("."))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3")).to(device)
    text, data = [], {}
    for guidance in given.guidance:
        title = f"With CFG, g = {guidance:g}" if guidance > 1 else "Without CFG"
        found = measure(
            pipe, given.n, guidance, given.only, num_inference_steps=given.steps,
            batch=given.batch,
        )  # fmt: skip
        text.append(f"### {title}\n\n{table(found)}\n")
        stock = found["stock"]
        data[title] = {name: scores.summary(stock) for name, scores in found.items()}
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "guidance.md").write_text("\n".join(text))
        (given.out / "guidance.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
