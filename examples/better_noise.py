"""Noise with room for two objects: InitNO's search beside stock, from the same generator."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

PROMPT = "a red circle and a blue square"
pipe = DiffusionPipeline.from_pretrained(attnctl.assets.path("tiny-sd"))


def draw():
    noise = torch.Generator().manual_seed(4)
    return pipe(PROMPT, num_inference_steps=12, guidance_scale=5, generator=noise).images[0]


stock = draw()
search = attnctl.InitNO(
    heads="L1-2", scale=0, rounds=3, round_steps=3, last_steps=0, tau_self=0.45
)
with attnctl.patch(pipe, search) as handle:
    found = draw()
    print(handle.report())

both = Image.new("RGB", (2 * stock.width, stock.height))
both.paste(stock, (0, 0))
both.paste(found, (stock.width, 0))
both.save(sys.argv[1] if len(sys.argv) > 1 else "better_noise.png")
