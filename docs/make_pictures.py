"""Draws a picture for every control's page, without and with it, and writes its lines there.

    python -P docs/make_pictures.py [NAME ...]

The registry says which controls there are, and their kind of attention which shipped model shows
them: tiny-llava for language models, tiny-wan for sparse attention of videos, tiny-sd for
cross-attention, tiny-sd3 for the rest. Settings are those of `attnctl generate --control NAME`
(the preset or the defaults) where `SETTINGS` has none for models of this size.
Nothing is picked out: the first two held-out prompts that stock draws right and the first two that
it draws wrong, the first clips, the first photos; and the same noise without and with. Green is
what the shape world's detector, or the truth, calls right.

Of `radial` it also draws masks of real size; `carve`, which is no control, is drawn for carve.md.
About a minute of CPU time for each control.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import attnctl
from attnctl.apps.bench.effect import draw
from attnctl.apps.bench.tasks.answers import one_per_photo
from attnctl.apps.chosen import choose
from attnctl.apps.eval.second_look import carve_options
from attnctl.apps.lettering import lettering, wrapped
from attnctl.apps.models import load
from attnctl.assets import path
from attnctl.assets.train.film import film
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.train.sheet import BAD, GOOD, picture
from attnctl.assets.world import exact, heldout_prompts
from attnctl.assets.world.evaluation import album
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.pope import Case, pope
from attnctl.assets.world.questions import COLOUR
from attnctl.assets.world.watch import moved
from attnctl.control import Control
from attnctl.processors.sparse.radial import radial_block_mask
from attnctl.processors.sparse.sparse import SparseAttention

FOLDER = Path(__file__).parent / "pictures"
PAGES = Path(__file__).parent / "controls"
START, END = "<!-- picture: written by docs/make_pictures.py -->", "<!-- end of picture -->"
_MARKED = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
_FIRST_CODE = re.compile(r"^```python\n.*?^```\n", re.MULTILINE | re.DOTALL)

MOVE = "scale=0.1,normalise=true,heads=L1-2"
SETTINGS = {
    "softpag": "softpag:scale=1,u=0.25",
    "pag": "pag:scale=0.5",
    "seg": "seg:scale=0.5,sigma=2",
    "slg": "slg:heads=L3,scale=0.5,start=0,stop=1",
    "tpg": "tpg:scale=0.5,u=0.25",
    "uniform": "uniform:scale=0.5,u=0.25",
    "temperature": "temperature:scale=0.5,u=0.25",
    "nag": "nag:negative=a red circle and a blue circle,scale=5",
    "conform": f"conform:{MOVE},updates=0",
    "divide-and-bind": f"divide-and-bind:{MOVE},updates=0",
    "syngen": f"syngen:{MOVE}",
    "initno": "initno:heads=L1-2,scale=0,rounds=5,round_steps=4,last_steps=0,tau_self=0.45",
    "radial": "radial:block=32",
    "pai": "pai:alpha=0.5",
    "paicfg": "paicfg:gamma=2",
    "m3id": "m3id:lam=0.3",
    "var": "var:sink_dims=96-156,tau=2.5",
}
"""Settings of the figures on the pages, where defaults and presets are for larger models."""
WITHOUT_CFG = {"nag": "tiny-sd3"}
"""Models of controls that serve pipelines without CFG, which tiny-sd needs."""
CALLS: dict[str, dict[str, Any]] = {
    "tiny-sd3": {"num_inference_steps": 12, "guidance_scale": 1.0, "max_sequence_length": 32},
    "tiny-sd": {"num_inference_steps": 10, "guidance_scale": 5.0},
    "tiny-wan": {"num_inference_steps": 12, "guidance_scale": 3.0, "max_sequence_length": 32},
}
SHOWN = 4
SEED = 500
MASKS = {
    "Wan 2.1: 21 frames of 45 x 80, decay 0.2": (21, 3600, 0.2, "wan"),
    "Wan 2.2: 20 frames of 48 x 80, decay 0.8": (20, 3840, 0.8, "wan"),
    "HunyuanVideo: 30 frames of 48 x 80, decay 0.95": (30, 3840, 0.95, "hunyuan"),
}
CARVE = "carve:inputs=both,form=crop,p=0.1,regions=1,steps=start,layers=1-2,lam=0.001"
"""The setting of carve.md's table."""


# -- what is drawn -------------------------------------------------------------------------------


def model_of(cls: type[Control]) -> str:
    """Return the shipped model that shows a control."""
    if cls.name in WITHOUT_CFG:
        return WITHOUT_CFG[cls.name]
    if "causal" in cls.kinds:
        return "tiny-llava"
    if issubclass(cls, SparseAttention):
        return "tiny-wan"
    return "tiny-sd" if "cross" in cls.kinds else "tiny-sd3"


def setting(name: str) -> str:
    """Return the text form of a control as its picture shows it."""
    return SETTINGS.get(name, name)


@functools.cache
def loaded(model: str) -> Any:
    """Return a shipped model, loaded once."""
    if model == "tiny-llava":
        return Teller.load(path(model), torch.device("cpu"))
    pipe = load(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(name: str) -> Image.Image:
    """Return the picture of a control."""
    model = model_of(attnctl.controls()[name])
    if model == "tiny-llava":
        return answers(name)
    return clips(name) if model == "tiny-wan" else pictures(model, name)


def pictures(model: str, name: str) -> Image.Image:
    """Return pictures of four prompts, stock above and controlled below."""
    pipe, (prompts, seeds, stock) = loaded(model), cases(model)
    chosen = choose(pipe, setting(name))
    with attnctl.patch(pipe, chosen.control):
        mine = [
            draw(pipe, [p], seed=s, **CALLS[model]) for p, s in zip(prompts, seeds, strict=True)
        ]
    sheet = Sheet(SHOWN, 144)
    for title, row in (("stock", stock), (str(chosen), torch.cat(mine))):
        sheet.title(title)
        sheet.row([picture(one) for one in row], prompts, exact(row, prompts).tolist())
    return sheet.image()


@functools.cache
def cases(model: str) -> tuple[list[str], list[int], Tensor]:
    """Return two prompts that stock draws right and two that it draws wrong, the first of each.

    With the seeds of their noise, and the pictures.
    """
    found: list[tuple[str, int, Tensor]] = []
    left = {True: SHOWN // 2, False: SHOWN // 2}
    for start in itertools.count(0, SHOWN):
        prompts = heldout_prompts(SHOWN, 2, seed=11 + start // SHOWN)
        row = draw(loaded(model), prompts, seed=SEED + start, **CALLS[model])
        for i, good in enumerate(exact(row, prompts).tolist()):
            if left[good]:
                left[good] -= 1
                found.append((prompts[i], SEED + start + i, row[i]))
        if len(found) == SHOWN:
            break
    texts, seeds, images = zip(*found, strict=True)
    return list(texts), list(seeds), torch.stack(images)


def clips(name: str) -> Image.Image:
    """Return frames of two clips, each stock and controlled."""
    pipe, prompts = loaded("tiny-wan"), moving_prompts(2, 1, split="train", seed=5)
    chosen = choose(pipe, setting(name))
    both = [film(pipe, prompts, seed=SEED, **CALLS["tiny-wan"])]
    with attnctl.patch(pipe, chosen.control):
        both.append(film(pipe, prompts, seed=SEED, **CALLS["tiny-wan"]))
    right = [moved(one, prompts).right.tolist() for one in both]
    sheet = Sheet(6, 96)
    for i, prompt in enumerate(prompts):
        for title, row, good in zip(("stock", str(chosen)), both, right, strict=True):
            sheet.title(f"{prompt}, {title}", GOOD if good[i] else BAD)
            sheet.row([picture(frame) for frame in row[i, ::3]])
    return sheet.image()


def answers(name: str) -> Image.Image:
    """Return four photos with questions, and the probability of "Yes" without and with."""
    teller, asked = loaded("tiny-llava"), one_per_photo(pope("adversarial", SHOWN, 0))
    chosen = choose(teller.model, setting(name))
    before = yes(teller, asked)
    with attnctl.patch(teller.model, chosen.control):
        after = yes(teller, asked)
    sheet = Sheet(SHOWN, 144)
    sheet.title(f"stock above, {chosen} below: the bars are the probability of Yes")
    bars = [[(a, GOOD if (a > 0.5) == (case.label == "yes") else BAD) for a in pair]
            for case, *pair in zip(asked, before, after, strict=True)]  # fmt: skip
    texts = [f"{case.question} ({case.label})" for case in asked]
    sheet.row([case.image for case in asked], texts, bars=bars)
    return sheet.image()


@torch.inference_mode()
def yes(teller: Teller, cases: Sequence[Case]) -> list[float]:
    """Return the probability that the answer begins with "Yes", case by case."""
    token = teller.processor.tokenizer("Yes").input_ids[-1]
    pixels = teller.pixels(dict.fromkeys(case.photo for case in cases))
    made = teller.model.generate(
        **teller.words([case.question for case in cases]),
        pixel_values=torch.stack([pixels[case.photo] for case in cases]),
        max_new_tokens=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    found: list[float] = made.scores[0].float().softmax(-1)[:, token].tolist()
    return found


# -- how it is drawn -----------------------------------------------------------------------------


class Sheet:
    """Rows of pictures with texts, from top to bottom.

    Args:
        columns: pictures in a row.
        side: of a picture, in pixels.
    """

    GAP, LINE, SIZE = 8, 16, 12
    INK = (0, 0, 0)

    def __init__(self, columns: int, side: int) -> None:
        self.side, self.width = side, self.GAP + columns * (side + self.GAP)
        self.parts: list[Image.Image] = []

    def title(self, text: str, ink: tuple[int, int, int] = INK) -> None:
        """Add a line of text, two at most."""
        font, (text,) = lettering(self.SIZE, [text])
        lines = wrapped(text, font, self.width - 2 * self.GAP, 2)
        part = Image.new("RGB", (self.width, self.LINE * len(lines) + 4), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(part).text((self.GAP, 4 + i * self.LINE), line, fill=ink, font=font)
        self.parts.append(part)

    def row(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str] = (),
        good: Sequence[bool] = (),
        bars: Sequence[Sequence[tuple[float, tuple[int, int, int]]]] = (),
    ) -> None:
        """Add pictures, under them texts of two or three lines, under these bars from 0 to 1."""
        font, letters = lettering(self.SIZE, list(texts))
        lines = 3 if bars else 2
        below = (lines * self.LINE if texts else 0) + (self.LINE * len(bars[0]) if bars else 0)
        part = Image.new("RGB", (self.width, self.side + below + self.GAP), "white")
        pen = ImageDraw.Draw(part)
        for i, image in enumerate(images):
            x, y = self.GAP + i * (self.side + self.GAP), self.side
            small = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)
            part.paste(small, (x, 0))
            if texts:
                ink = (GOOD if good[i] else BAD) if good else self.INK
                for j, line in enumerate(wrapped(letters[i], font, self.side, lines)):
                    pen.text((x, y + j * self.LINE), line, fill=ink, font=font)
                y += lines * self.LINE
            for j, (share, colour) in enumerate(bars[i] if bars else ()):
                self._bar(pen, (x, y + j * self.LINE), share, colour, font)
        self.parts.append(part)

    def _bar(
        self,
        pen: ImageDraw.ImageDraw,
        at: tuple[int, int],
        share: float,
        colour: tuple[int, int, int],
        font: Any,
    ) -> None:
        (x, y), wide = at, self.side - 36
        pen.rectangle((x, y + 2, x + wide, y + self.LINE - 3), outline=(160, 160, 160))
        pen.rectangle((x, y + 2, x + round(wide * share), y + self.LINE - 3), fill=colour)
        pen.text((x + wide + 4, y), f"{share:.2f}", fill=self.INK, font=font)

    def image(self) -> Image.Image:
        """Return the sheet, in a palette of its own so that the file is small."""
        sheet = Image.new("RGB", (self.width, sum(part.height for part in self.parts)), "white")
        top = 0
        for part in self.parts:
            sheet.paste(part, (0, top))
            top += part.height
        return sheet.quantize(256, Image.Quantize.MAXCOVERAGE, 1, dither=Image.Dither.NONE)


def draw_masks(side: int = 380, gap: int = 20, caption: int = 34) -> None:
    """Draw the masks of Radial Attention side by side."""
    sheet = Image.new("RGB", (len(MASKS) * (side + gap) - gap, side + caption), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, (frames, tokens, decay, family)) in enumerate(MASKS.items()):
        mask = radial_block_mask(frames, tokens, decay, family)
        x = i * (side + gap)
        sheet.paste(mask.picture(1).resize((side, side), Image.Resampling.BOX), (x, caption))
        pen.text((x, 2), name, fill="black")
        size = f"{mask.rows} x {mask.cols} blocks of {mask.block} tokens"
        pen.text((x, 16), f"{size}, {mask.density:.1%} kept", fill="black")
    sheet.save(FOLDER / "radial.png", optimize=True)


def draw_second_looks() -> None:
    """Draw the first clear photos with a small object, what CARVE cuts out, and both answers."""
    shown: list[tuple[Image.Image, str, str]] = []
    for photo in album(100, 0):
        shapes = [item.pair[1] for item in photo.items]
        found = [one for one in photo.items if one.small and shapes.count(one.pair[1]) == 1]
        if found and not photo.dim and len(shown) < SHOWN:
            colour, shape = found[0].pair
            shown.append((photo.image, COLOUR[0].format(shape), colour))
    images, questions, right = zip(*shown, strict=True)
    teller = loaded("tiny-llava")
    carver = attnctl.Carver(
        teller.model, teller.processor, max_new_tokens=3, **carve_options(CARVE)
    )
    looks, sheet = carver.many(images, questions), Sheet(SHOWN, 144)
    boxed = [image.convert("RGB") for image in images]
    for image, look in zip(boxed, looks, strict=True):
        ImageDraw.Draw(image).rectangle(look.box or (0, 0, *image.size), outline=BAD, width=2)
    sheet.title("above the photo alone, in the box what is cut out; below the second look at it")
    for row, told in (
        (boxed, [x.before for x in looks]),
        ([x.image for x in looks], [x.answer for x in looks]),
    ):
        texts = [f"{q} {text}" for q, text in zip(questions, told, strict=True)]
        good = [t.strip(". ").lower() == r for t, r in zip(told, right, strict=True)]
        sheet.row(row, texts, good)
    sheet.image().save(FOLDER / "carve.png", optimize=True)


# -- the pages -----------------------------------------------------------------------------------

WHAT = {
    "tiny-llava": "The first four questions of POPE's adversarial kind about as many photos, "
    "put to [tiny-llava](../tiny-llava.md)",
    "tiny-wan": "The first two prompts of one object, filmed by [tiny-wan](../tiny-wan.md) "
    "from the same noise (12 steps, guidance 3)",
    "tiny-sd": "The first two held-out prompts that [tiny-sd](../tiny-sd.md) draws right and the "
    "first two that it draws wrong, from the same noise (10 steps, guidance 5)",
    "tiny-sd3": "The first two held-out prompts that [tiny-sd3](../tiny-sd3.md) draws right and "
    "the first two that it draws wrong, from the same noise (12 steps, no CFG)",
}


def section(name: str) -> str:
    """Return the lines of a page that show its picture."""
    model = model_of(attnctl.controls()[name])
    truth = "the truth" if model == "tiny-llava" else "the detector"
    text = (
        f"{WHAT[model]}: stock, and `{setting(name)}`. Nothing is picked out: it shows what "
        f"changes, not whether that helps. Green where {truth} says it is right. "
        f"`python -P docs/make_pictures.py {name}` makes it."
    )
    lines = textwrap.wrap(text, 105, break_long_words=False, break_on_hyphens=False)
    link = f"![{name} on {model}, without and with](../pictures/controls/{name}.png)"
    return "\n".join([START, link, "", *lines, END])


def written(page: str, name: str) -> str:
    """Return a page with the picture's lines as they should be, else after its first code."""
    if START in page:
        return _MARKED.sub(lambda _: section(name), page)
    return _FIRST_CODE.sub(lambda found: f"{found[0]}\n{section(name)}\n", page, count=1)


def main() -> None:
    """Draw the pictures named on the command line, or all."""
    torch.set_grad_enabled(False)
    names = sys.argv[1:] or [*attnctl.controls(), "carve"]
    (FOLDER / "controls").mkdir(exist_ok=True)
    if "radial" in names:
        draw_masks()
    if "carve" in names:
        draw_second_looks()
        names.remove("carve")
    for name in names:
        drawn(name).save(FOLDER / "controls" / f"{name}.png", optimize=True)
        print(name, setting(name), flush=True)
    for name in names:
        page = PAGES / f"{name}.md"
        page.write_text(written(page.read_text("utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
