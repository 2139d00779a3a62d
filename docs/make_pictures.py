"""Draws the pictures of the control pages: six prompts, stock above and controlled below.

For `radial`, whose models are too large for that, it draws masks instead.

    python -P docs/make_pictures.py [NAME ...]

Captions are green where the shape world's detector calls the picture exact. Without CFG, the
same noise in both rows. Takes about a minute a control on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

import attnctl
from attnctl.apps.bench.effect import draw
from attnctl.assets import path
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.world import exact, heldout_prompts
from attnctl.processors.sparse.radial import radial_block_mask

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
MASKS = {
    "Wan 2.1: 21 frames of 45 x 80, decay 0.2": (21, 3600, 0.2, "wan"),
    "Wan 2.2: 20 frames of 48 x 80, decay 0.8": (20, 3840, 0.8, "wan"),
    "HunyuanVideo: 30 frames of 48 x 80, decay 0.95": (30, 3840, 0.95, "hunyuan"),
}


def draw_masks(side: int = 380, gap: int = 20, caption: int = 34) -> None:
    """Draw the masks of Radial Attention side by side."""
    sheet = Image.new("RGB", (len(MASKS) * (side + gap) - gap, side + caption), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, (frames, tokens, decay, family)) in enumerate(MASKS.items()):
        mask = radial_block_mask(frames, tokens, decay, family)
        x = i * (side + gap)
        sheet.paste(mask.picture(1).resize((side, side), Image.Resampling.BOX), (x, caption))
        pen.text((x, 2), name, fill="black")
        size = f"{mask.rows} x {mask.cols} blocks of {mask.block} tokens"
        pen.text((x, 16), f"{size}, {mask.density:.1%} kept", fill="black")
    sheet.save(FOLDER / "radial.png", optimize=True)


def main() -> None:
    """Draw the pictures named on the command line, or all."""
    names = sys.argv[1:] or [*CONTROLS, "radial"]
    if "radial" in names:
        draw_masks()
        names.remove("radial")
    if names:
        draw_pairs(names)


def draw_pairs(names: list[str]) -> None:
    """Draw six prompts without and with each control."""
    torch.set_grad_enabled(False)
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    pipe.set_progress_bar_config(disable=True)
    prompts = heldout_prompts(6, 2, seed=11)
    stock = draw(pipe, prompts, seed=500, **OPTIONS)
    for name in names:
        with attnctl.patch(pipe, CONTROLS[name]):
            mine = draw(pipe, prompts, seed=500, **OPTIONS)
        both = torch.cat([stock, mine])
        captions = [f"stock: {p}" for p in prompts] + [f"{name}: {p}" for p in prompts]
        good = exact(both, prompts + prompts).tolist()
        contact_sheet(both, captions, good, FOLDER / f"{name}.png")
        print(name, CONTROLS[name], good, flush=True)


if __name__ == "__main__":
    main()
