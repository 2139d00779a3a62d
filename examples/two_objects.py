"""Two objects in one picture: Attend-and-Excite beside stock, from the same noise."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

PROMPT = "a purple heart and a green ring"
pipe = DiffusionPipeline.from_pretrained(attnctl.assets.path("tiny-sd"))


def draw():
    noise = torch.Generator().manual_seed(1)
    return pipe(PROMPT, num_inference_steps=12, guidance_scale=5, generator=noise).images[0]


stock = draw()
with attnctl.patch(pipe, attnctl.AttendAndExcite.for_model(pipe)) as handle:
    steered = draw()
    print(handle.report())

both = Image.new("RGB", (2 * stock.width, stock.height))
both.paste(stock, (0, 0))
both.paste(steered, (stock.width, 0))
both.save(sys.argv[1] if len(sys.argv) > 1 else "two_objects.png")
