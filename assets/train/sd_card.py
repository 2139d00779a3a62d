"""tiny-sd's model card, filled with its measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnctl.assets.train.card import (
    again,
    exact_table,
    part_rows,
    parts_words,
    settings_words,
    trained,
    wrapped,
)

CARD = """# tiny-sd

A text-to-image model of the Stable Diffusion 1 family, trained from scratch on the shape world:
64x64 pictures of one to three objects, each one of eight colours and six shapes, on a grey
background. It is small enough to ship. One object it draws reliably; with two it fails often,
which is what attention control is for, and what it can be measured by.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe("a red circle and a blue square", num_inference_steps=20, guidance_scale=5).images[0]
```

Nothing of attnctl is needed to load it. `attnctl.assets.path("tiny-sd")` is the folder.

## What it is

| part | class | parameters |
|---|---|---|
{parts}

- UNet: two levels, {channels} channels wide, with
  {sites}
  (256 and 64 image tokens). Every site has 8 heads, of {heads} dimensions; SD1's
  configurations call this number of heads `attention_head_dim`.
- Noise: epsilon prediction over SD1's 1000 levels (scaled linear, 0.00085 to 0.012). The
  folder's scheduler is DDIM.
- Text: a CLIP encoder over 20 tokens; every word of the world is one token, other words fall
  apart into letters. The UNet's cross-attention reads its last states ([B, 20, {text}]).
- Autoencoder: the one of tiny-sd3, without its latent shift of -0.006, which this family of
  pipelines does not know. There is no safety checker.
- Weights: {megabytes} MB in float16; they load as float32 unless `torch_dtype` says otherwise.

## What it was trained on

Scenes drawn at random (one, two and three objects as {objects}), with captions such as
"a red circle, a blue square and an orange ring" in random order, a fifth of them in a sentence
("a picture of ..."), one in ten empty. Of the 1128 combinations of two different objects,
{heldout} (a checksum of their names) are shown in no training picture;
`attnctl.assets.world.heldout_prompts` makes prompts of these.

{training}

## Figures

Share of pictures in which the detector finds every prompted object, no other, and nothing
malformed, with 95 % intervals (Wilson); rounded weights, stock pipeline, no control. The
pipeline's own defaults are guidance (g) 7.5 and 50 steps.

{exact}

{detector}
{again}
## Limits

It knows 48 objects, 64x64 pixels and at most three objects; the same object twice in one prompt
is out of its range. The share of training scenes with several objects and the length of the
training were chosen so that prompts of two often fail: more of either makes them easier and
leaves less for a control to win.

## Rebuild

On one GPU, a few minutes in all; another seed gives another model of the same kind.

```
python -m attnctl.assets.train detector --seed 0 --out out
python -m attnctl.assets.train vae --seed 0 --out out
python -m attnctl.assets.train tiny-sd --seed 0 --out out{settings}
```

`--measure` instead of a training measures a folder again. `ATTNCTL_ASSETS=out` puts the new
models in the place of the shipped ones. Without the first two commands the shipped detector and
autoencoder are used. Numbers of this page: `figures.json`.
"""

SHARED = "Detector and autoencoder are tiny-sd3's; its card has their figures."

CLASSES = {
    "unet": "UNet2DConditionModel",
    "text_encoder": "CLIPTextModel",
    "vae": "AutoencoderKL, 4 times smaller, 4 channels",
}


def write_card(
    folder: Path, figures: dict[str, Any], heldout: int, objects: str, tune: Any
) -> None:
    """Write README.md into the model's folder.

    Args:
        folder: the model's folder.
        figures: of the training and of `measure_sd.measure`.
        heldout: number of held-out combinations.
        objects: weights of the training scenes with one, two and three objects, in words.
        tune: the recipe's tunables.
    """
    layers = f"{tune.text_layers} layers of {tune.text_width}"
    classes = CLASSES | {"text_encoder": f"CLIPTextModel, {layers}"}
    text = CARD.format(
        parts=part_rows(figures["millions"], classes),
        channels=" and ".join(map(str, tune.channels)),
        sites=sites_words(tune.layers),
        heads=" and ".join(str(width // 8) for width in tune.channels),
        text=tune.text_width,
        megabytes=figures["megabytes"],
        objects=objects,
        heldout=heldout,
        training=training_words(figures),
        exact=exact_table(figures["exact"]),
        detector=parts_words(figures) or SHARED,
        again=again(figures, lambda other: exact_table(other["exact"])),
        settings=settings_words(figures),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def sites_words(layers: int) -> str:
    """How many self- and cross-attentions there are at each resolution."""
    high, low = 2 * layers + 1, 2 * layers + 2
    return f"{high} self- and {high} cross-attentions at 16x16, {low} of each at 8x8"


def training_words(figures: dict[str, Any]) -> str:
    """Length of the training in a sentence."""
    done = figures["training"]
    return wrapped(
        f"UNet and text encoder together: {done['steps']} steps of {done['batch']} pictures, "
        f"AdamW, average of the weights kept; {trained(figures)}."
    )
