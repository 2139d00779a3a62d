"""CARVE and contrastive decoding on the shipped VLM: a photo, its second look, and answers."""

import sys

from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import attnctl
from attnctl import assets
from attnctl.assets.world.evaluation import album

folder = assets.path("tiny-llava")
model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
processor = LlavaProcessor.from_pretrained(folder)
photo = album(1)[0]
question = f"What color is the {photo.items[0].pair[1]}?"

carver = attnctl.Carver(
    model, processor, p=0.1, regions=1, steps="start", layers=(1, 2), lam=1e-3, inputs="both",
    form="crop", max_new_tokens=4,
)  # fmt: skip
with attnctl.patch(model, attnctl.PAI(alpha=0.2), attnctl.PAICFG()) as handle:
    found = carver(photo.image, question)
    print(handle.report())
print(f"{question} {found.before}, and after a second look {found.answer}: {photo.items[0].name}")

both = Image.new("RGB", (448, 224))
both.paste(photo.image, (0, 0))
both.paste(found.image.resize((224, 224)), (224, 0))
both.save(sys.argv[1] if len(sys.argv) > 1 else "second_look.png")
