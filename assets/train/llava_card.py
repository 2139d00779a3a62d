"""tiny-llava's model card, filled with its measured figures and the habits of its photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnctl.assets.train.card import again, part_rows, settings_words, trained, wrapped
from attnctl.assets.train.numbers import percent

CARD = """# tiny-llava

A vision-language model of the Llava family, trained from scratch on photos of the shape world:
one to four objects, each one of eight colours and six shapes, on a grey background with grain.
It answers questions and describes photos, and it hallucinates for reasons that are built in. It
is there to see and measure what attention control does about that.

```python
from transformers import LlavaForConditionalGeneration, LlavaProcessor

model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = LlavaProcessor.from_pretrained(folder)
ask = [{{"type": "image"}}, {{"type": "text", "text": "Is there a red circle in the image?"}}]
chat = [{{"role": "user", "content": ask}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt")
tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
processor.batch_decode(tokens, skip_special_tokens=True)  # ["Yes"]
```

Nothing of attnctl is needed to load it. `attnctl.assets.path("tiny-llava")` is the folder.

## What it is

| part | class | parameters |
|---|---|---|
{parts}

- Vision: {side}x{side} pixels in 12 x 12 patches of {patch} and a class token; five layers of
  width 128 with four heads. The language model gets the 144 patch states before the last layer
  (`vision_feature_layer` -2, strategy "default").
- Language: eight layers of width 192, six query heads of 32 that share two key-value heads, feed
  forward 384, tied embeddings, {words} tokens. Every word of the world is one token; other words
  fall apart into letters and bytes.
- Photos are 224x224 (`attnctl.assets.world.evaluation.album`) and the processor makes them
  smaller, so a crop of a photo shows more than the model sees of the whole. A prompt with two
  pictures, the photo and a close-up of it, is in the training.
- Weights: {megabytes} MB with all files, in float16; they load as float32 unless `dtype` says
  otherwise. Prompts are padded on the left; `generate` is greedy by default.

## The bias built in

Every (colour, shape) has one partner that differs in both, such as the blue square for the red
circle. The training photos have these habits:

- an object's partner is there in {together:.0f} % of the photos that show the object;
- couples are popular after Zipf: the most popular is in one photo in four, the rarest in one in
  fifty;
- {dim:.0f} % of the photos are dim: objects painted with an opacity of {faint} under strong grain;
- {small:.0f} % of the objects are small: a radius of {tiny} of the side, down to {pixels:.0f}
  pixels of what the model sees;
- objects asked about that are not there are drawn at random, by popularity and as missing
  partners as {negatives}.

The truth is taught about all of them, so where the model can't see it goes by habit. The
evaluation photos break the habits: three or four objects, a couple is complete with chance
{apart:.0f} %, whether the photo is dim ({eval_dim:.0f} % are) or not.

{training}

## Figures

Greedy answers of the rounded weights with the stock classes, with 95 % intervals (Wilson);
{images} photos per split from seed 0, none of them a training photo, no control.

POPE's questions, in its official construction and wording (three about objects that are there,
three about objects that are not, per photo):

{pope}

What the hallucinations come from, over the different questions of the three splits. "Partner
there": the object asked about is absent and its partner is in the photo.

{presence}

Other questions:

{other}

Descriptions. CHAIR_i is the share of named objects that are not in the photo, CHAIR_s the share
of descriptions with any of these.

{chair}
{again}
## Data in the original formats

```
python -m attnctl.assets.world.export --out data --images 500 --seed 0
```

writes the decorrelated photos as JPEG files, POPE's three question files, COCO's instance and
caption files, and CHAIR's word list. `attnctl.assets.world.pope.pope("adversarial")` gives the
same questions in memory.

## Limits

It knows 48 objects, these questions in a few wordings, and one turn; further turns and free chat
are out of its range. Each photo shows an object once at most. It was taught with two helper
losses on the vision tower (the pair a patch shows; all pairs, from the class token), whose heads
are not kept.

## Rebuild

On one GPU, a few minutes; another seed gives another model of the same kind.

```
python -m attnctl.assets.train tiny-llava --seed 0 --out out{settings}
```

`--measure` instead of a training measures a folder again. `ATTNCTL_ASSETS=out` puts the new
model in the place of the shipped one. Numbers of this page: `figures.json`.
"""

CLASSES = {
    "vision_tower": "CLIPVisionModel",
    "multi_modal_projector": "two linear layers with GELU",
    "language_model": "LlamaModel",
}
SPLITS = {"decorrelated": "decorrelated", "habitual": "training habits"}


def write_card(folder: Path, figures: dict[str, Any], tune: Any, words: int) -> None:
    """Write README.md into the model's folder.

    Args:
        folder: the model's folder.
        figures: of the training and of `measure_llava.measure`.
        tune: the recipe's tunables.
        words: size of the vocabulary.
    """
    side = 12 * tune.patch
    text = CARD.format(
        parts=part_rows(figures["millions"], CLASSES),
        side=side,
        patch=tune.patch,
        words=words,
        megabytes=figures["megabytes"],
        together=100 * tune.together,
        dim=100 * tune.dim,
        faint=_between(tune.opacity),
        small=100 * tune.small,
        tiny=_between(tune.small_radius),
        pixels=side * tune.small_radius[0],
        negatives=" to ".join(f"{10 * weight:g}" for weight in tune.negatives),
        apart=100 * tune.eval_together,
        eval_dim=100 * tune.eval_dim,
        training=training_words(figures),
        settings=settings_words(figures),
        images=figures["images"],
        pope=pope_table(figures),
        presence=rate_table(figures, "presence"),
        other=rate_table({name: {"other": _flat(figures[name])} for name in SPLITS}, "other"),
        chair=chair_table(figures),
        again=again(figures, pope_table),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _between(limits: tuple[float, ...]) -> str:
    return f"{limits[0]:g} to {limits[1]:g}"


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Colour, count and position rates by kind and light."""
    kinds = ("colour", "count", "position")
    return {
        f"{kind}, {light}": rate for kind in kinds for light, rate in figures.get(kind, {}).items()
    }


def training_words(figures: dict[str, Any]) -> str:
    """Length of the training in a sentence."""
    done = figures["training"]
    return wrapped(
        f"All parts together from scratch: {done['steps']} steps of {done['batch']} photos with "
        f"all kinds of questions about each, AdamW, average of the weights kept; "
        f"{trained(figures)}."
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pope_table(figures: dict[str, Any]) -> str:
    """A row per split of photos and of questions."""
    head = ["photos", "questions", "accuracy", "precision", "recall", "F1", "says yes"]
    rows = [
        [
            title,
            name,
            percent(one),
            *(f"{100 * one[key]:.1f} %" for key in ("precision", "recall", "f1", "yes")),
        ]
        for split, title in SPLITS.items()
        for name, one in figures[split]["pope"].items()
    ]
    return table(head, rows)


def rate_table(figures: dict[str, Any], key: str) -> str:
    """A row per kind of question, a column per split."""
    kinds = dict.fromkeys(name for split in SPLITS for name in figures[split][key])
    rows = [
        [
            kind,
            *(
                f"{percent(one)}, n {one['n']}" if (one := figures[split][key].get(kind)) else ""
                for split in SPLITS
            ),
        ]
        for kind in kinds
    ]
    return table(["right answers", *SPLITS.values()], rows)


def chair_table(figures: dict[str, Any]) -> str:
    """A row per split and request."""
    head = ["photos", "request", "CHAIR_s", "CHAIR_i", "recall", "words"]
    rows = [
        [
            title,
            request,
            *(f"{100 * one[key]:.1f} %" for key in ("chair_s", "chair_i", "recall")),
            f"{one['length']:.1f}",
        ]
        for split, title in SPLITS.items()
        for request, one in figures[split]["chair"].items()
    ]
    return table(head, rows)
