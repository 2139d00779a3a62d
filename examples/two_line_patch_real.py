"""Two lines put SoftPAG on a stock pipeline. Draws with and without it, from the same noise."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

MODEL = "stabilityai/stable-diffusion-3.5-medium"
PROMPT = "a red circle and a blue square"


def draw(pipe):
    noise = torch.Generator().manual_seed(0)
    return pipe(PROMPT, num_inference_steps=20, guidance_scale=4, generator=noise).images[0]


pipe = DiffusionPipeline.from_pretrained(MODEL)
if torch.cuda.is_available():
    pipe.to("cuda", torch.bfloat16)
stock = draw(pipe)

handle = attnctl.patch(pipe, attnctl.SoftPAG.for_model(pipe))
controlled = draw(pipe)
print(handle.report())
handle.undo()

both = Image.new("RGB", (2 * stock.width, stock.height))
both.paste(stock, (0, 0))
both.paste(controlled, (stock.width, 0))
both.save(sys.argv[1] if len(sys.argv) > 1 else "two_line_patch.png")
