"""Shows what tells sinks on a photo, and moves attention off them while an answer is written."""

import sys

from transformers import LlavaForConditionalGeneration, LlavaProcessor

import attnctl.assets
from attnctl.assets.world.pope import pope
from attnctl.processors.analysis.overlay import overlay

MODEL = attnctl.assets.path("tiny-llava")
model = LlavaForConditionalGeneration.from_pretrained(MODEL)
processor = LlavaProcessor.from_pretrained(MODEL)

case = pope("adversarial", n_images=2, seed=0)[0]
ask = [{"type": "image"}, {"type": "text", "text": case.question}]
chat = [{"role": "user", "content": ask}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=case.image, text=prompt, return_tensors="pt")

# this small model has no real sinks, so that a low bar is set; a real one: VAR.for_model(model)
with attnctl.patch(model, attnctl.VAR(sink_dims=(96, 156), tau=2.5)) as handle:
    ids = model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    print(handle.report())
print(case.question, processor.batch_decode(ids, skip_special_tokens=True)[0])

found = attnctl.sink_map(model, inputs, sink_dims=(96, 156))
attention = found.mass[:, 0, found.image[0]].mean(0).reshape(12, 12)
overlay(case.image, attention).save(sys.argv[1] if len(sys.argv) > 1 else "sinks_and_var.png")
