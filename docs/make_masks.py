"""Measures whether masks of words lie on their objects, and draws the picture of their page.

    python -P docs/make_masks.py choose [N]     # settings, on N (40) pictures of trained prompts
    python -P docs/make_masks.py [N]            # presets, on N (60) of held-out prompts; the page

Pictures have two objects of different colours and are exact for the shape world's detector. A
mask's intersection over union (IoU) is with the pixels that are nearest to its object's colour.
`choose` ranks settings, and thresholds for raw cross-attention, into
`docs/measured/masks/choosing.json`; the presets of tiny-sd and tiny-sd3 are its first. Without it
`docs/measured/masks/heldout.json`, the table in `docs/masks.md` and the picture are made. About
ten minutes on one core each.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.nn.functional import interpolate

import attnctl
from attnctl.apps.bench.statistics import mean_interval, paired_interval
from attnctl.assets import path
from attnctl.assets.train.sheet import contact_sheet
from attnctl.assets.world import exact, heldout_prompts, trained_prompts
from attnctl.assets.world.captions import parse
from attnctl.assets.world.palette import COLOUR_NAMES, rgb_table
from attnctl.presets import find
from attnctl.processors.analysis.affinity import labelled
from attnctl.processors.analysis.mask_reading import SelfReader, TextReader
from attnctl.processors.analysis.word_masks import extracted

DOCS = Path(__file__).parent
PAGE, PICTURE = DOCS / "masks.md", DOCS / "pictures" / "masks.png"
CHOOSING, HELDOUT = (DOCS / "measured" / "masks" / f"{x}.json" for x in ("choosing", "heldout"))
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
PROMPT, SEED = "a red circle and a blue square", 3
CALLS: dict[str, dict[str, Any]] = {
    "tiny-sd": {"guidance_scale": 5.0},
    "tiny-sd3": {"guidance_scale": 3.0, "max_sequence_length": 32},
}
STEPS = 20
HEADS = {
    "tiny-sd": ("all", "L0", "L5", "L0,L5", "L1", "L2", "L1-2", "L1-4"),
    "tiny-sd3": ("all", "L0", "L6", "L7", "L0,L6", "L6-7"),
}
ALONG = {
    "tiny-sd": ("all", "L0", "L5", "L6", "L0,L5"),
    "tiny-sd3": ("all", "L0", "L4", "L7", "L0,L7"),
}
AT, POWERS, MARGINS = (0.5, 0.7, 0.9), (0, 1, 2, 4), (0.05, 0.1, 0.2)
THRESHOLDS = tuple(i / 20 for i in range(2, 19))


def main() -> None:
    """Choose, or confirm and draw."""
    torch.set_grad_enabled(False)
    choose = sys.argv[1:2] == ["choose"]
    number = sys.argv[2 if choose else 1 :]
    count = int(number[0]) if number else (40 if choose else 60)
    found = {model: (chosen if choose else confirmed)(model, count) for model in CALLS}
    file = CHOOSING if choose else HELDOUT
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not choose:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        draw()


# -- pictures -----------------------------------------------------------------------------------


def loaded(model: str) -> Any:
    """Return a pipeline."""
    pipe = DiffusionPipeline.from_pretrained(path(model))
    pipe.set_progress_bar_config(disable=True)
    return partial(pipe, num_inference_steps=STEPS, output_type="pt", **CALLS[model])


def noise(seed: int) -> torch.Generator:
    """Return the source of a picture's noise."""
    return torch.Generator().manual_seed(seed)


def pictures(
    run: Callable[[str, int], tuple[Tensor, Any]], prompts: list[str], first: int, count: int
) -> Iterator[tuple[Any, Tensor]]:
    """Yield what was read with each exact picture of two objects of different colours.

    Args:
        run: draws the picture of a prompt and seed; returns it [1, 3, h, w], and what it read.
        prompts: prompts of two objects.
        first: seed of the first.
        count: how many pictures.

    Yields:
        What was read, and the objects' pixels [2, h, w].
    """
    found = 0
    for seed, prompt in enumerate(prompts, first):
        colours = [colour for colour, _ in parse(prompt)]
        if colours[0] == colours[1] or found == count:
            continue
        image, read = run(prompt, seed)
        if bool(exact(image, [prompt])[0]):
            found += 1
            yield read, torch.stack([of_colour(image[0], colour) for colour in colours])


def of_colour(image: Tensor, colour: str) -> Tensor:
    """Return which pixels [H, W] of a picture are nearest to a colour; greys belong to none."""
    apart = torch.cdist(image.flatten(1).T, rgb_table()).argmin(1).view(image.shape[1:])
    return (apart == COLOUR_NAMES.index(colour)) & (image.amax(0) - image.amin(0) > 0.25)


def overlaps(masks: Tensor, objects: Tensor) -> list[float]:
    """Return the IoU of masks with objects, both [2, h, w]; masks may be on a coarser grid."""
    grown = interpolate(masks[None].float(), objects.shape[1:])[0].bool()
    both, either = ((x).flatten(1).sum(1) for x in (grown & objects, grown | objects))
    return (both / either.clamp_min(1)).tolist()


def of_words(labels: Tensor) -> Tensor:
    """Return the masks [2, h, w] of the first two words, which are the objects."""
    return torch.stack([labels == 0, labels == 1])


# -- choosing -----------------------------------------------------------------------------------


def chosen(model: str, count: int) -> dict[str, Any]:
    """Rank settings, and thresholds for raw cross-attention, on trained prompts."""
    pipe = loaded(model)
    rows: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    alike: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    prompts = trained_prompts(8 * count, 2, seed=7)
    drawn = 0
    for read, objects in pictures(partial(read_all, pipe, model), prompts, 0, count):
        drawn += 1
        for (heads, along, at, power), soft in every(model, *read):
            for margin in MARGINS if power or along == "all" else ():
                masks = of_words(labelled(soft[None], margin)[0])
                rows[heads, along, at, power, margin] += overlaps(masks, objects)
            alike[heads, along, at, power].append(correlation(soft))
            for threshold in THRESHOLDS if not power and along == "all" else ():
                # what is carried 0 times is the map squared
                rows["raw", heads, at, threshold] += overlaps(
                    soft[:2] > threshold**2, objects
                )  # fmt: skip
    names = ("heads", "along", "at", "power", "margin")
    ranked = sorted(rows, key=lambda key: -float(np.mean(rows[key])))
    own = [key for key in ranked if key[0] != "raw"]
    raw = [key for key in ranked if key[0] == "raw"]
    heads, along, at, _, _ = own[0]
    return {
        "pictures": drawn,
        "settings": len(own),
        "best": [told(dict(zip(names, key, strict=True)), rows[key]) for key in own[:10]],
        "raw": [told(thresholded(key), rows[key]) for key in raw[:3]],
        "raw of these heads": [
            told(thresholded(key), rows[key]) for key in raw if key[1:3] == (heads, at)
        ][:1],
        "correlation of the two objects' maps, by power": {
            f"heads={heads}, along={name}": {
                str(power): round(float(np.mean(alike[heads, name, at, power])), 3)
                for power in POWERS
            }
            for name in dict.fromkeys((along, "all"))
        },
    }


def thresholded(key: tuple[Any, ...]) -> dict[str, Any]:
    """Return what a key of raw cross-attention says."""
    return dict(zip(("heads", "at", "threshold"), key[1:], strict=True))


def told(options: dict[str, Any], ious: list[float]) -> dict[str, Any]:
    """Return a line of the ranking."""
    each = np.asarray(ious)
    return {**options, "iou": round(each.mean(), 4), "above half": round((each > 0.5).mean(), 3)}


Reads = dict[Any, list[Any]]
"""What readers read, by their options."""


def read_all(pipe: Any, model: str, prompt: str, seed: int) -> tuple[Tensor, tuple[Reads, Reads]]:
    """Return a picture, and what all settings need."""
    texts: Reads = defaultdict(list)
    images: Reads = defaultdict(list)
    text = [TextReader(texts[h, at].append, h, at) for h in HEADS[model] for at in AT]
    image = [SelfReader(images[a, at].append, a, at) for a in ALONG[model] for at in AT]
    with attnctl.patch(pipe.func, *text, *image):
        out = pipe(prompt=prompt, generator=noise(seed))[0]
    return out, (texts, images)


def every(model: str, texts: Reads, images: Reads) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield M [words, h, w] of all settings."""
    for heads, along, at, power in itertools.product(HEADS[model], ALONG[model], AT, POWERS):
        read = texts[heads, at][0], images[along, at][0]
        yield (heads, along, at, power), extracted(*read, power)[0, :, 0]


def correlation(soft: Tensor) -> float:
    """Return Pearson's correlation of the first two maps."""
    return float(torch.corrcoef(soft[:2].flatten(1))[0, 1])


# -- confirming ---------------------------------------------------------------------------------


def confirmed(model: str, count: int) -> dict[str, Any]:
    """Measure masks without options, and what they are compared with, on held-out prompts."""
    pipe = loaded(model)
    known = json.loads(CHOOSING.read_text(encoding="utf-8"))[model]
    own, best = known["raw of these heads"][0], known["raw"][0]
    ious: dict[str, list[list[float]]] = defaultdict(list)
    areas: dict[str, list[float]] = defaultdict(list)
    missing: dict[str, int] = defaultdict(int)
    arms = {
        "published": dict(find("masks", pipe.func, "any-model").options),
        "power=0": {**find("masks", pipe.func).options, "power": 0},
        "best": {**find("masks", pipe.func).options, "power": 0, **best},
    }
    prompts = heldout_prompts(8 * count, 2, seed=91)
    for runs, objects in pictures(partial(read_beside, pipe, arms), prompts, 5000, count):
        each = {name: of_words(run.labels[0]) for name, run in runs.items() if name != "best"}
        size = objects.shape[1:]
        each["no options, resized"] = of_words(runs["no options"].resized(*size).labels[0])
        each["raw, same heads"] = above(runs["power=0"], own)
        each["raw, best heads"] = above(runs["best"], best)
        each["raw, best heads, resized"] = above(runs["best"].resized(*size), best)
        for name, masks in each.items():
            ious[name].append(overlaps(masks, objects))
            areas[name].append(float(masks.float().mean() / objects.float().mean()))
        for name in ("no options", "published"):
            missing[name] += sum(word != "background" for word in runs[name].missing[0])
    rows = {name: np.asarray(of_arm) for name, of_arm in ious.items()}
    return {
        "pictures": len(rows["no options"]),
        "options": dict(runs["no options"].options),
        "raw, same heads": own,
        "raw, best heads": best,
        "arms": {name: summary(of_arm, rows["no options"]) for name, of_arm in rows.items()},
        "area of masks over area of objects": {
            name: round(float(np.mean(of_arm)), 3) for name, of_arm in areas.items()
        },
        "empty masks": missing,
    }


def read_beside(
    pipe: Any, arms: dict[str, dict[str, Any]], prompt: str, seed: int
) -> tuple[Tensor, dict[str, attnctl.Masks]]:
    """Return a picture, and masks of it without options and with those of the arms."""
    texts: Reads = defaultdict(list)
    images: Reads = defaultdict(list)
    text = [TextReader(texts[arm].append, o["heads"], o["at"]) for arm, o in arms.items()]
    image = [SelfReader(images[arm].append, o["along"], o["at"]) for arm, o in arms.items()]
    with attnctl.patch(pipe.func, *text, *image):
        found = of_run(pipe, prompt, seed)
    all_of = {"no options": found}
    for arm, options in arms.items():
        soft = extracted(texts[arm][0], images[arm][0], options["power"])[:, :, 0]
        labels = labelled(soft, options["margin"])
        all_of[arm] = attnctl.Masks(soft, labels, found.words, options=options)
    return found.images, all_of


def above(found: attnctl.Masks, raw: dict[str, Any]) -> Tensor:
    """Return where maps that were carried 0 times, so only squared, exceed a threshold."""
    return found.soft[0, :2] > raw["threshold"] ** 2


def of_run(pipe: Any, prompt: str, seed: int, **options: Any) -> attnctl.Masks:
    """Return the masks of one picture."""
    call = {**pipe.keywords, **options}
    return attnctl.masks(pipe.func, prompt, generator=noise(seed), **call)


def summary(rows: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    """Return means over objects [n, 2] with 95 % intervals; pictures are resampled."""
    over = paired_interval(base.mean(1), rows.mean(1))
    return {
        "iou": asdict(mean_interval(rows.mean(1))),
        "above half": asdict(mean_interval((rows > 0.5).mean(1))),
        "no options gain": asdict(over),
    }


LABELS = {
    "no options": "`attnctl.masks(pipe, prompt)`",
    "no options, resized": "the same, `.resized` to the picture",
    "power=0": "`power=0`",
    "raw, same heads": "raw cross-attention of the same heads",
    "raw, best heads": "raw cross-attention of the best heads",
    "raw, best heads, resized": "the same, resized to the picture",
    "published": 'published numbers (`preset="any-model"`)',
}


def page(text: str) -> str:
    """Return the page with its table written anew."""
    data = json.loads(HELDOUT.read_text(encoding="utf-8"))
    return TABLE.sub(lambda found: f"{found[1]}{table(data)}\n{found[2]}", text)


def table(data: dict[str, Any]) -> str:
    """Return the table of what was confirmed."""
    lines = ["| model | masks | mean IoU | above 0.5, % |", "| --- | --- | --- | --- |"]
    for model, of_model in data.items():
        for name, label in LABELS.items():
            arm = of_model["arms"][name]
            half = {key: 100 * value for key, value in arm["above half"].items()}
            cells = model, label, spanned(arm["iou"], 2), spanned(half, 0)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spanned(interval: dict[str, float], digits: int) -> str:
    """Return a mean with its interval."""
    mean, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{mean} [{low}, {high}]"


# -- the picture --------------------------------------------------------------------------------


def draw() -> None:
    """Draw what the masks of one picture of each model cut out."""
    cells: list[Tensor] = []
    captions: list[str] = []
    for model in CALLS:
        found = of_run(loaded(model), PROMPT, SEED)
        image = found.images[0]
        sized = found.resized(*image.shape[1:])
        cells += [
            image,
            *(torch.where(sized[word][0], image, 0.85 + 0.15 * image) for word in sized),
        ]
        captions += [f"{model}: the picture", *found]
    contact_sheet(torch.stack(cells), captions, [True] * len(cells), PICTURE, columns=4)


if __name__ == "__main__":
    main()
