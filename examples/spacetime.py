"""Objects where you want them: SpaceTime with a red circle on the left, then on the right."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

pipe = DiffusionPipeline.from_pretrained(attnctl.assets.path("tiny-sd"))
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)  # left, top, right, bottom

strip = Image.new("RGB", (128, 64))
for i, (circle, square) in enumerate([(LEFT, RIGHT), (RIGHT, LEFT)]):
    layout = {"red circle": circle, "blue square": square}
    with attnctl.patch(pipe, attnctl.SpaceTime(layout=layout)) as handle:
        picture = pipe(
            "a red circle and a blue square",
            num_inference_steps=12,
            guidance_scale=5,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
        print(handle.report())
    strip.paste(picture, (64 * i, 0))
strip.save(sys.argv[1] if len(sys.argv) > 1 else "spacetime.png")
