"""CARVE: ask twice what to look at, cut the picture to it, and ask again.

A vision-language model reads the picture with the question and with a general instruction. The
ratio of the two attention maps shows what the question is about, since what draws attention
anyway (clutter, sinks) is in both; see `carve_maps` for the formulas. This is no control: it
changes the picture, and works with whatever is patched into the model.

References:
    Ge et al., "Focusing by Contrastive Attention: Enhancing VLMs' Visual Reasoning", 2025
    (arXiv 2509.06461), algorithm 1.

Defaults: the paper's best rows: p 0.4, two regions, the last step, the refined picture alone;
lambda 1e-8 and the general instruction are the official code's. Deviations: the maps are computed
for the chosen layers and one row from queries and keys, on the model's own attention, with its
cache, and not from a run with all maps; where the ratio points nowhere the picture is left as it
is; a model of fewer than 28 layers takes the layers at the same share of its depth.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError, OptionError
from attnctl.hosts.run import Run
from attnctl.hosts.vlm_tokens import image_ids
from attnctl.patch import patch
from attnctl.records import AttentionCall
from attnctl.selectors import Selection
from attnctl.sites import sites

from .carve_maps import Form, Map, Mask, Steps, box_of, flat, fused, refine, regions
from .pai import add_bias
from .prompts import begun
from .rows import tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Carved", "Carver", "ImageAttention", "carve", "grids_of"]

GENERAL = "Write a general description of the image."
LAYERS, DEPTH = (20, 25), 32
"""Published for models of 28 to 40 layers; the depth that shares are taken of below that."""
PUBLISHED_FROM = 28
KEPT = 512
"""Pictures whose general maps are kept."""


@dataclass(frozen=True)
class ImageAttention(Control):
    """Notes how the last row attends to a picture; changes nothing.

    Args:
        layers: first and last layer.
        runs: for each generation, `image_rows` by step and layer.
    """

    layers: tuple[int, int]
    runs: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)

    name: ClassVar[str] = "image-attention"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    @property
    def selector(self) -> str:
        """The layers, whole."""
        return f"L{self.layers[0]}-{self.layers[1]}"

    def begin(self, run: Run, selection: Selection) -> dict[tuple[int, int], Tensor]:
        """Return room for one generation."""
        self.runs.append({})
        return self.runs[-1]

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the last row's probabilities beside the stock attention."""
        last = torch.tensor([call.q.shape[2] - 1], device=call.q.device)
        # a control further out that computes rows anew comes here again: its row counts
        call.state[call.step.index, call.site.index] = image_rows(call.queries_at(last))
        return call.proceed()

    def maps(self, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the maps [T, L, gh, gw] of each prompt of the first generation.

        Args:
            grids: (gh, gw) of each prompt's picture.
        """
        width = self.layers[1] - self.layers[0] + 1
        rows = [row for _, row in sorted(self.runs[0].items(), key=lambda item: item[0])]
        parts = torch.stack(rows).cpu().split([high * wide for high, wide in grids], dim=1)
        return [part.view(-1, width, *grid) for part, grid in zip(parts, grids, strict=True)]


def image_rows(call: AttentionCall) -> Tensor:
    """Return how each prompt's only query attends to its image tokens, mean over heads.

    Returns:
        [n], prompt after prompt: pictures may differ in their number of tokens.
    """
    tokens = tokens_of(call, ImageAttention.name)
    batch, heads, _, width = call.q.shape
    grouped = call.q.float().reshape(batch, call.k.shape[1], -1, width)
    logits = (grouped @ call.k.float().transpose(-1, -2)).view(batch, heads, 1, -1)
    logits = logits * (width**-0.5 if call.scale is None else call.scale)
    weights = add_bias(call.mask, logits).softmax(dim=-1)
    return weights[:, :, 0].mean(dim=1)[tokens.keys("image")]


@dataclass(frozen=True, eq=False)
class Carved:
    """What came of one question.

    Args:
        answer: the answer after the second look.
        before: the answer to the whole picture.
        image: the refined picture; the picture itself if the maps point nowhere.
        box: (left, top, right, bottom) of the regions in the picture, None if they do.
        mask: the regions, bool [H, W], None if they do.
        map: S, [H, W].
        ended: whether the model ended the answer by itself.
    """

    answer: str
    before: str
    image: Image
    box: tuple[int, int, int, int] | None
    mask: Mask | None
    map: Map
    ended: bool


class _Told(NamedTuple):
    """An answer, the number of tokens that it took, and whether the model ended it."""

    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Carver:
    """CARVE with its options, for many questions: general maps are made once a picture.

    Args:
        model: a vision-language model that reads one token a patch of the whole picture.
        processor: its processor.
        p: share of the pixels at or above the threshold, in (0, 1]; 1 keeps the picture.
        regions: the most regions that stay; None for the official code's count.
        steps: tokens of the answer whose maps are used: "start", "end" or "full".
        lam: lambda >= 0.
        layers: first and last layer, None for the published ones.
        inputs: what the second look sees: "refined" (the paper) or "both", the picture and the
            refined one (the official code).
        form: what is made of the regions: "masked crop" (both publications), "crop" or "mask".
        general: the general instruction.
        suffix: text after the question and after the general instruction.
        max_new_tokens: longest answer.
        prompt: returns the prompt of a text and a number of pictures; None for the
            processor's chat template.
    """

    model: Any
    processor: Any
    p: float = 0.4
    regions: int | None = 2
    steps: Steps = "end"
    lam: float = 1e-8
    layers: tuple[int, int] | None = None
    inputs: Literal["refined", "both"] = "refined"
    form: Form = "masked crop"
    general: str = GENERAL
    suffix: str = ""
    max_new_tokens: int = 32
    prompt: Callable[[str, int], str] | None = None
    known: dict[str, tuple[int, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise OptionError(f"carve: p={self.p} must be above 0 and at most 1")
        if self.regions is not None and self.regions < 1:
            raise OptionError(f"carve: regions={self.regions} must be 1 or more, or None")
        if self.lam < 0:
            raise OptionError(f"carve: lam={self.lam} must be 0 or above")
        for name, known in (
            ("steps", ("start", "end", "full")),
            ("inputs", ("refined", "both")),
            ("form", ("masked crop", "crop", "mask")),
        ):
            if getattr(self, name) not in known:
                raise OptionError(
                    f"carve: {name}={getattr(self, name)!r} must be {', '.join(known)}"
                )

    def __call__(self, image: Image, question: str) -> Carved:
        """Answer a question about a picture.

        Raises:
            HostError: if the model's image tokens are not one grid of one picture.
        """
        return self.many([image], [question])[0]

    def many(self, images: Sequence[Image], questions: Sequence[str]) -> list[Carved]:
        """Answer questions about pictures, one about each, in batches of that size.

        Args:
            images: the pictures; the same one may come several times.
            questions: as many.

        Raises:
            HostError: if the model's image tokens are not one grid of one picture each.
        """
        images = [_upright(image) for image in images]
        looks = self._look(images, questions)
        general = self._general(images, max((told.tokens for told, _ in looks), default=1))
        found = [
            self._refined(image, told, fused(asked, maps, image.size, self.lam, self.steps))
            for image, (told, asked), maps in zip(images, looks, general, strict=True)
        ]
        again = [i for i, one in enumerate(found) if one.mask is not None]
        shown = [
            [found[i].image] if self.inputs == "refined" else [images[i], found[i].image]
            for i in again
        ]
        told = self._ask(shown, [questions[i] for i in again], self.max_new_tokens)
        for i, one in zip(again, told, strict=True):
            found[i] = replace(found[i], answer=one.text, ended=one.ended)
        return found

    def _refined(self, image: Image, told: _Told, s: Map) -> Carved:
        """Return what is known before the second look; it is not taken where the mask is None."""
        if flat(s) or self.p == 1:
            return Carved(told.text, told.text, image, None, None, s, told.ended)
        mask = regions(s, self.p, self.regions)
        refined = refine(image, mask, self.form)
        return Carved("", told.text, refined, box_of(mask), mask, s, False)

    def ask(self, images: Sequence[Image], question: str) -> str:
        """Return the answer to a question about pictures, without a second look."""
        return self.ask_many([images], [question])[0]

    def ask_many(self, images: Sequence[Sequence[Image]], questions: Sequence[str]) -> list[str]:
        """Return the answers to questions, each about pictures of its own, in one batch."""
        return [one.text for one in self._ask(images, questions, self.max_new_tokens)]

    def _look(
        self, images: Sequence[Image], texts: Sequence[str], steps: int | None = None
    ) -> list[tuple[_Told, Tensor]]:
        """Return the answers to texts and the maps [T, L, gh, gw] that they were made with."""
        if not images:
            return []
        inputs = self._inputs([[image] for image in images], texts)
        grids, probe = grids_of(self.model, inputs), ImageAttention(self.span())
        with patch(self.model, probe):
            answers = self._told(inputs, steps or self.max_new_tokens)
        # a row that ended goes on beside the others, with padding for tokens
        maps = zip(answers, probe.maps(grids), strict=True)
        return [(told, whole[: told.tokens]) for told, whole in maps]

    def _general(self, images: Sequence[Image], steps: int) -> list[Tensor]:
        """Return the general maps of pictures, at least `steps` of each if it has so many."""
        steps = 1 if self.steps == "start" else steps
        keys = [_name(image) for image in images]
        fresh = {
            key: image
            for key, image in zip(keys, images, strict=True)
            if key not in self.known or self.known[key][0] == len(self.known[key][1]) < steps
        }
        made = self._look([*fresh.values()], [self.general] * len(fresh), steps)
        for key, (_, maps) in zip(fresh, made, strict=True):
            self.known[key] = steps, maps
        found = [self.known[key][1] for key in keys]
        while len(self.known) > KEPT:
            del self.known[next(iter(self.known))]
        return found

    def span(self) -> tuple[int, int]:
        """Return the first and the last layer whose maps are used."""
        if self.layers is not None:
            return self.layers
        depth = 1 + max(s.layer or 0 for s in sites(self.model))
        if depth >= PUBLISHED_FROM:
            return LAYERS
        first, last = (round(one * (depth - 1) / (DEPTH - 1)) for one in LAYERS)
        return first, last

    def _inputs(self, images: Sequence[Sequence[Image]], texts: Sequence[str]) -> Any:
        prompts = [
            self._prompt(f"{text} {self.suffix}".strip(), len(some))
            for some, text in zip(images, texts, strict=True)
        ]
        flat_list = [image for some in images for image in some]
        padding = {"padding": True, "padding_side": "left"} if len(prompts) > 1 else {}
        how = {**padding, **begun(self.processor, prompts)}
        made = self.processor(images=flat_list, text=prompts, return_tensors="pt", **how)
        return made.to(self.model.device, self.model.dtype)

    def _prompt(self, text: str, images: int) -> str:
        if self.prompt is not None:
            return self.prompt(text, images)
        content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(chat, add_generation_prompt=True))

    def _ask(
        self, images: Sequence[Sequence[Image]], texts: Sequence[str], tokens: int
    ) -> list[_Told]:
        return self._told(self._inputs(images, texts), tokens) if texts else []

    def _told(self, inputs: Any, tokens: int) -> list[_Told]:
        with torch.no_grad():
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1
            )
        written = out[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(written, skip_special_tokens=True)
        ends = self.model.generation_config.eos_token_id
        last = {ends} if isinstance(ends, int) else {*(ends or ())}
        return [
            _Told(text.strip(), *_length(row, last))
            for text, row in zip(texts, written.tolist(), strict=True)
        ]


def _length(row: Sequence[int], ends: set[int]) -> tuple[int, bool]:
    """Return the tokens of an answer up to its end, and whether it has one."""
    n = next((i + 1 for i, token in enumerate(row) if token in ends), None)
    return (len(row), False) if n is None else (n, True)


def _name(image: Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def carve(model: Any, processor: Any, image: Image, question: str, **options: Any) -> Carved:
    """Answer a question about a picture with a second look at what it is about.

    Args:
        model: a vision-language model of transformers; what is patched into it takes part.
        processor: its processor.
        image: the picture; it is turned upright and made RGB first.
        question: the question.
        **options: options of `Carver`, which is for more than one question.
    """
    return Carver(model, processor, **options)(image, question)


def grids_of(model: Any, inputs: Any) -> list[tuple[int, int]]:
    """Return (rows, columns) of the image tokens of prompts with one picture each.

    Raises:
        HostError: if some are none, those of several tiles, or no grid.
    """
    ids = inputs["input_ids"]
    image = torch.isin(ids, torch.tensor(image_ids(model.config), device=ids.device))
    found = image.sum(dim=1).tolist()
    if "image_grid_thw" in inputs:
        merge = model.config.vision_config.spatial_merge_size
        sizes = inputs["image_grid_thw"].tolist()
        grids = [(rows // merge, columns // merge) for _, rows, columns in sizes]
    else:
        pixels = inputs["pixel_values"]
        tiles = pixels.shape[0] if pixels.ndim == 4 else pixels.shape[0] * pixels.shape[1]
        sides = [math.isqrt(n) if tiles == len(found) else 0 for n in found]
        grids = [(side, side) for side in sides]
    whole = [a * b for a, b in grids] == found and all(found)
    if hasattr(model, "qformer") or not whole:
        raise HostError(
            f"the prompts' {', '.join(map(str, found))} image tokens are not one square grid of "
            "one picture each (tiles, a Q-Former, several pictures): CARVE cannot tell where "
            "they look"
        )
    return grids


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")
