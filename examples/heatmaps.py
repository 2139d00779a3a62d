"""Where does the model look for each word? The picture, and a heat map over it per word."""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import attnctl.assets

pipe = DiffusionPipeline.from_pretrained(attnctl.assets.path("tiny-sd"))
found = attnctl.heatmaps(
    pipe,
    "a red circle and a blue square",
    words=["red", "circle", "blue", "square"],
    num_inference_steps=12,
    guidance_scale=5,
    generator=torch.Generator().manual_seed(3),
)
for word, heat in found.items():  # [samples, height, width]: shares of attention
    print(f"{word}: {tuple(heat.shape)}, at most {heat.max():.1%}")
print(found.report)

picture = found.images[0][0]
strip = Image.new("RGB", ((1 + len(found)) * picture.width, picture.height))
for i, image in enumerate([picture, *map(found.overlay, found)]):
    strip.paste(image, (i * picture.width, 0))
strip.save(sys.argv[1] if len(sys.argv) > 1 else "heatmaps.png")
