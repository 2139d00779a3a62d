"""Draws the pictures of the control pages: six prompts, stock above and controlled below.

    python -P docs/make_pictures.py [NAME ...]

Captions are green where the shape world's detector calls the picture exact. Without CFG, the
same noise in both rows. Takes about a minute a control on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import attnctl
from attnctl.apps.bench.effect import draw
from attnctl.assets import path
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.world import exact, heldout_prompts

FOLDER = Path(__file__).parent / "pictures"
OPTIONS = {"num_inference_steps": 20, "guidance_scale": 1.0, "max_sequence_length": 32}
CONTROLS = {
    "softpag": attnctl.SoftPAG(scale=1.0, u=0.25),
    "pag": attnctl.PAG(scale=0.5),
    "seg": attnctl.SEG(scale=0.5, sigma=2.0),
    "slg": attnctl.SLG(heads="L3", scale=0.5, start=0.0, stop=1.0),
    "tpg": attnctl.TPG(scale=0.5, u=0.25),
    "uniform": attnctl.UniformGuidance(scale=0.5, u=0.25),
    "temperature": attnctl.TemperatureGuidance(scale=0.5, u=0.25),
    "nag": attnctl.NAG(negative="a red circle and a blue circle", scale=5.0),
}


def main() -> None:
    """Draw the pictures named on the command line, or all."""
    torch.set_grad_enabled(False)
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    pipe.set_progress_bar_config(disable=True)
    prompts = heldout_prompts(6, 2, seed=11)
    stock = draw(pipe, prompts, seed=500, **OPTIONS)
    for name in sys.argv[1:] or CONTROLS:
        with attnctl.patch(pipe, CONTROLS[name]):
            mine = draw(pipe, prompts, seed=500, **OPTIONS)
        both = torch.cat([stock, mine])
        captions = [f"stock: {p}" for p in prompts] + [f"{name}: {p}" for p in prompts]
        good = exact(both, prompts + prompts).tolist()
        contact_sheet(both, captions, good, FOLDER / f"{name}.png")
        print(name, CONTROLS[name], good, flush=True)


if __name__ == "__main__":
    main()
