"""Where does the model look for each word of its answer? The picture, and a map per word."""

import sys

from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import attnctl
import attnctl.assets
from attnctl.assets.world.pope import pope

folder = attnctl.assets.path("tiny-llava")
model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
processor = LlavaProcessor.from_pretrained(folder)
photo = pope("adversarial", n_images=1, seed=0)[0].image

found = attnctl.answer_maps(model, processor, photo, "Describe the image.")
for word, share in zip(found.words, found.shares(), strict=True):
    print(f"{word:10} {float(share):.0%} of the attention is on the image")
print(found.report)
layer, head = max(found.heads, key=lambda place: float(found.heads[place].sum()))
print(f"the head that looks most at the image: L{layer}H{head}")

under = attnctl.answer_maps(model, processor, photo, "Describe the image.", attnctl.PAI(alpha=0.5))
print(f"on average {found.shares().mean():.0%}, with PAI {under.shares().mean():.0%}")

pictures = [found.plain(), *(found.overlay(i) for i in range(len(found.words)))]
strip = Image.new("RGB", (len(pictures) * 72, 72))
for i, picture in enumerate(pictures):
    strip.paste(picture, (i * 72, 0))
strip.save(sys.argv[1] if len(sys.argv) > 1 else "where_words_look.png")
