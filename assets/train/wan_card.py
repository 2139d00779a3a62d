"""tiny-wan's model card, filled with its measured figures."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnctl.assets.train.card import again, part_rows, settings_words, trained, wrapped
from attnctl.assets.train.numbers import percent
from attnctl.assets.world.motion import DIRECTIONS, SPEEDS, is_heldout_motion
from attnctl.assets.world.palette import PAIRS

CARD = """# tiny-wan

A text-to-video model of the Wan family, trained from scratch on the shape world in motion: clips
of 17 frames of 64x64 pixels, in which one or two objects (eight colours, six shapes) move left,
right, up or down, slowly, at a medium speed or fast, or stand still. It has Wan 2.1's classes,
heads of 64 and 2304 video tokens, so that attention kernels for video models apply unchanged.

```python
from diffusers import WanPipeline
from diffusers.utils import export_to_gif

pipe = WanPipeline.from_pretrained(folder)
prompt = "a red circle moving left fast and a blue square standing still"
size = {{"height": 64, "width": 64, "num_frames": 17}}
clip = pipe(prompt, **size, num_inference_steps=12, guidance_scale=3, output_type="pil").frames[0]
export_to_gif(clip, "clip.gif")
```

Nothing of attnctl is needed to load it, but diffusers wants `accelerate` for any Wan transformer.
`attnctl.assets.path("tiny-wan")` is the folder. The pipeline's own defaults are 480x832 and 81
frames; always give the size.

## What it is

| part | class | parameters |
|---|---|---|
{parts}

- Transformer: 6 layers of 3 heads of 64, normalised q and k, patch 1 on 9x16x16 latents of
  {channels} channels. Rectified flow; UniPC with flow shift 3 in the folder, as Wan uses it.
- Autoencoder: causal in time; 4 times smaller pictures, half the frames after the first.
{text}
- Weights: {megabytes} MB in float16; they load as float32 unless `torch_dtype` says otherwise.

## What it was trained on

{data}

{training}

## Figures

Share of clips that are right: the detector finds exactly the prompted objects, well formed, in at
least 80 % of the frames, and every object's track (the centroid of its colour) follows the
prompted direction evenly at about the prompted speed (`attnctl.assets.world.moved`). With 95 %
intervals (Wilson); rounded weights, stock pipeline, no control. "g" is the guidance scale.

{moved}

What is right, one by one, at guidance 3 and 12 steps:

{shares}

Longer than trained, one slowly moving object, guidance 3, 12 steps:

{longer}

{extra}
{again}
## Limits

It knows 48 objects, 64x64 pixels and straight motions; three objects or two of one colour are out
of its range. It never saw a clip longer than 17 frames. Longer ones are generated, with the right
object, but the object stands still: that is where methods for longer videos have something to win.
A guidance scale of 5 deforms the objects.

## Rebuild

On one GPU; another seed gives another model of the same kind.

```
{commands}
```

`--measure` instead of a training measures a folder again. `ATTNCTL_ASSETS=out` puts the new
models in the place of the shipped ones. Numbers of this page: `figures.json`.
"""

DATA = """Scenes drawn at random, one and two objects as {objects}, two objects always of
different colours. In 17 frames an object travels {ways} of the side ({words}), evenly and without
leaving the picture or touching another. A fifth of the captions are put into a sentence ("a video
of ..."), one in ten is empty. Of the 240 combinations of an object and a direction (or none),
{heldout} (a checksum of their names) are shown in no training clip, nor are the combinations of
two objects that tiny-sd3 holds out; `attnctl.assets.world.moving_prompts(n, split="heldout")`
makes prompts of such motions."""
TEXT = """- Text: every word of the world is one token, other words fall apart into letters, other
letters are unknown. The pipeline pads prompts by zeros to `max_sequence_length` (512 by default);
the model was trained with lengths of {lengths}, so `max_sequence_length=32` films as well and
costs less."""

CLASSES = {
    "transformer": "WanTransformer3DModel",
    "text_encoder": "UMT5EncoderModel, 2 layers of 96",
    "vae": "AutoencoderKLWan",
}
STEPS = 12
LONGER = "one slow object"
Rows = list[dict[str, Any]]


def write_card(folder: Path, figures: dict[str, Any], tune: Any) -> None:
    """Write README.md into the model's folder.

    Args:
        folder: the model's folder.
        figures: of the training and of `measure_wan.measure`.
        tune: the recipe's tunables.
    """
    rows: Rows = figures["moved"]
    longer = [row for row in rows if row["prompts"] == LONGER]
    sets = clips_of(figures)
    text = CARD.format(
        parts=part_rows(figures["millions"], CLASSES),
        channels=len(figures.get("video-vae", {}).get("latents_std", ())) or "a few",
        text=text_words(tune.lengths),
        megabytes=figures["megabytes"],
        data=data_words(tune.objects),
        training=training_words(figures, tune),
        moved=moved_table(sets),
        shares=table([row for row in sets if _setting(row) == (3.0, STEPS)] or sets),
        longer=table(longer, "frames") if longer else "not measured",
        extra=extra_words(figures),
        again=again(figures, other_words),
        commands="\n".join(commands(figures)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def clips_of(figures: Mapping[str, Any]) -> Rows:
    """The measured rows of the length that was trained."""
    return [row for row in figures["moved"] if row["prompts"] != LONGER]


def other_words(other: Mapping[str, Any]) -> str:
    """What another training of the transformer, and one of the autoencoder, came to."""
    found = moved_table(clips_of(other))
    if not (vae := other.get("video-vae")):
        return found
    words = (
        "With the same autoencoder. The autoencoder trained with this seed, alone: "
        f"{vae['psnr']} dB, {percent(vae['right'])} of drawn clips still right."
    )
    return f"{found}\n\n{wrapped(words)}"


def text_words(lengths: Sequence[int]) -> str:
    """The tokenizer and the padding in a list item."""
    *first, last = map(str, sorted(set(lengths), reverse=True))
    words = TEXT.format(lengths=" and ".join([", ".join(first), last] if first else [last]))
    return textwrap.fill(words, 98, subsequent_indent="  ", break_on_hyphens=False)


def data_words(objects: Sequence[float]) -> str:
    """The training clips in a paragraph."""
    held = sum(is_heldout_motion(pair, one) for pair in PAIRS for one in (*DIRECTIONS, ""))
    words = DATA.format(
        objects=" to ".join(f"{one:g}" for one in objects),
        ways=", ".join(f"{way:g}" for way in SPEEDS.values()),
        words=", ".join(f'"{word}"' if word else "no word" for word in SPEEDS),
        heldout=held,
    )
    return wrapped(words)


def commands(figures: Mapping[str, Any]) -> list[str]:
    """The commands that train the model anew, with the settings it was trained with."""
    parts = {name: figures.get(name, {}) for name in ("detector", "video-vae")}
    return [
        f"python -m attnctl.assets.train {name} --seed {one.get('seed', 0)} --out out"
        f"{settings_words(one)}"
        for name, one in {**parts, "tiny-wan": figures}.items()
    ]


def training_words(figures: Mapping[str, Any], tune: Any) -> str:
    """Length of the training in a sentence."""
    done = figures["training"]
    return wrapped(
        f"Transformer and text encoder together: {done['steps']} steps of {done['batch']} clips, "
        f"the first {100 * tune.stills:.0f} % of them of {tune.many * done['batch']} first frames "
        f"instead; AdamW, average of the weights kept; {trained(figures)}."
    )


def moved_table(rows: Rows) -> str:
    """Markdown table: a row per prompt set, a column per guidance scale and step count."""
    settings = sorted({_setting(row) for row in rows})
    found = {(row["prompts"], _setting(row)): percent(row) for row in rows}
    lines = [["prompts", "n", *(f"g {g:g}, {n} steps" for g, n in settings)]]
    lines.append(["---"] * len(lines[0]))
    for name in dict.fromkeys(row["prompts"] for row in rows):
        count = max(row["n"] for row in rows if row["prompts"] == name)
        cells = [found.get((name, setting), "") for setting in settings]
        lines.append([name, str(count), *cells])
    return _markdown(lines)


def table(rows: Rows, *extra: str) -> str:
    """Markdown table: what is right in each row, beside further columns."""
    names = ("prompts", *extra, "n", "right", "objects", "direction", "speed")
    lines = [list(names), ["---"] * len(names)]
    for row in rows:
        shares = {name: f"{100 * row[name]:.1f} %" for name in names[-3:]}
        cells = {**row, **shares, "right": percent(row)}
        lines.append([str(cells[name]) for name in names])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setting(row: Mapping[str, Any]) -> tuple[float, int]:
    return row["guidance_scale"], row["num_inference_steps"]


def extra_words(figures: Mapping[str, Any]) -> str:
    """Euler instead of UniPC, and the autoencoder alone, where their figures are known."""
    words = []
    if rows := figures.get("euler"):
        found = ", ".join(f"{percent(row)} in {row['num_inference_steps']} steps" for row in rows)
        words.append(f"Euler steps in place of UniPC, one object at guidance 3: {found}.")
    if vae := figures.get("video-vae"):
        words.append(
            f"The autoencoder alone: {vae['psnr']} dB, {percent(vae['right'])} of drawn clips are "
            "still right after encoding and decoding."
        )
    return "\n\n".join(map(wrapped, words))
