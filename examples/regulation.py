"""Attention Regulation: every word of the prompt gets a peak and its share of the picture."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

PROMPT = "a red circle and a blue square"
pipe = DiffusionPipeline.from_pretrained(attnctl.assets.path("tiny-sd"))


def draw():
    noise = torch.Generator().manual_seed(2)
    return pipe(PROMPT, num_inference_steps=20, guidance_scale=5, generator=noise).images[0]


pictures = [draw()]
notes = []
regulation = attnctl.Regulation(targets=["red circle", "blue square"], sink=notes.append)
with attnctl.patch(pipe, regulation) as handle:
    pictures.append(draw())
    print(handle.report())
before, after = torch.stack([note.area[:, 0] for note in notes]).mean(0)
print("areas of the tokens, stock:", before.tolist(), "at the optimum:", after.tolist())

strip = Image.new("RGB", (2 * pictures[0].width, pictures[0].height))
for i, picture in enumerate(pictures):
    strip.paste(picture, (i * picture.width, 0))
strip.save(sys.argv[1] if len(sys.argv) > 1 else "regulation.png")
