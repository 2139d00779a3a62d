"""tiny-sd3's model card, filled with its measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnctl.assets.train.card import again, exact_table, part_rows, parts_words, trained, wrapped

CARD = """# tiny-sd3

A text-to-image model of the SD3 family, trained from scratch on the shape world: 64x64 pictures
of one to three objects, each one of eight colours and six shapes, on a grey background. It is
small enough to ship, and it fails the way large models fail: objects fuse, one too many is drawn,
a shape goes to the wrong object. It is there to see and measure what attention control does.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(folder)
pipe("a red circle and a blue square", num_inference_steps=20, guidance_scale=3).images[0]
```

Nothing of attnctl is needed to load it. `attnctl.assets.path("tiny-sd3")` is the folder.

## What it is

| part | class | parameters |
|---|---|---|
{parts}

- Transformer: 8 layers of 8 heads of 16, RMS-normalised q and k, patch 1 on 16x16x4 latents: 256
  image tokens. Rectified flow, scheduler shift 1.
- Text: two CLIP encoders over 20 tokens; every word of the world is one token, other words fall
  apart into letters. The pipeline concatenates the states of both ([B, 20, 128 + 64]).
- Third text encoder: a real T5 whose last normalisation has weight 0, because
  `from_pretrained` insists on one. It returns zeros, exactly as if it were passed as None; the
  256 zero tokens that the pipeline appends by default take part in the attention. The model was
  trained with 256, 77, 16, 1 and 0 of them: `max_sequence_length=32` draws as well and costs half.
- Weights: {megabytes} MB in float16; they load as float32 unless `torch_dtype` says otherwise.

## What it was trained on

Scenes drawn at random ({objects}), with captions such as
"a red circle, a blue square and an orange ring" in random order, a fifth of them in a sentence
("a picture of ..."), one in ten empty. Of the 1128 combinations of two different objects,
{heldout} (a checksum of their names) are shown in no training picture;
`attnctl.assets.world.heldout_prompts` makes prompts of these.

{training}

## Figures

Share of pictures in which the detector finds every prompted object, no other, and nothing
malformed, with 95 % intervals (Wilson); rounded weights, stock pipeline, no control.

{exact}

{detector}
{again}
## Limits

It knows 48 objects, 64x64 pixels and at most three objects; the same object twice in one prompt
is out of its range. It was stopped early on purpose: after ten times as many training pictures it
draws 95 % of the two-object prompts right even without guidance, which leaves little for a
control to win. What goes wrong is mostly two shapes that touch and fuse, one object too many, or
an unsteady outline.

## Rebuild

On one GPU, a few minutes in all; another seed gives another model of the same kind.

```
python -m attnctl.assets.train detector --seed 0 --out out
python -m attnctl.assets.train vae --seed 0 --out out
python -m attnctl.assets.train tiny-sd3 --seed 0 --out out
```

`--measure` instead of a training measures a folder again. `ATTNCTL_ASSETS=out` puts the new
models in the place of the shipped ones. Numbers of this page: `figures.json`.
"""

CLASSES = {
    "transformer": "SD3Transformer2DModel",
    "text_encoder": "CLIPTextModelWithProjection, 3 layers of 128",
    "text_encoder_2": "CLIPTextModelWithProjection, 2 layers of 64",
    "vae": "AutoencoderKL, 4 times smaller, 4 channels",
}


def write_card(folder: Path, figures: dict[str, Any], heldout: int, objects: str) -> None:
    """Write README.md into the model's folder.

    Args:
        folder: the model's folder.
        figures: of the training and of `measure_sd3.measure`.
        heldout: number of held-out combinations.
        objects: how many objects the training scenes have, in words.
    """
    text = CARD.format(
        parts=part_rows(figures["millions"], CLASSES),
        megabytes=figures["megabytes"],
        objects=objects,
        heldout=heldout,
        training=training_words(figures),
        exact=exact_table(figures["exact"]),
        detector=parts_words(figures),
        again=again(figures, lambda other: exact_table(other["exact"])),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def training_words(figures: dict[str, Any]) -> str:
    """Length of the training in a sentence."""
    done = figures["training"]
    return wrapped(
        f"Transformer and text encoders together: {done['steps']} steps of {done['batch']} "
        f"pictures, AdamW at a level rate, average of the weights kept; "
        f"{trained(figures)}."
    )
