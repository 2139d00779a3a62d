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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
from .rows import tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Carved", "Carver", "ImageAttention", "carve", "grid_of"]

GENERAL = "Write a general description of the image."
LAYERS, DEPTH = (20, 25), 32
"""Published for models of 28 to 40 layers; the depth that shares are taken of below that."""
PUBLISHED_FROM = 28


@dataclass(frozen=True)
class ImageAttention(Control):
    """Notes how the last row attends to a picture; changes nothing.

    Args:
        layers: first and last layer.
        runs: for each generation, `image_row` by step and layer.
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
        call.state[call.step.index, call.site.index] = image_row(call.queries_at(last))
        return call.proceed()

    def maps(self, grid: tuple[int, int]) -> Tensor:
        """Return the maps [T, L, gh, gw] of the first generation."""
        width = self.layers[1] - self.layers[0] + 1
        rows = [row for _, row in sorted(self.runs[0].items(), key=lambda item: item[0])]
        return torch.stack(rows).view(-1, width, *grid)


def image_row(call: AttentionCall) -> Tensor:
    """Return the attention [n] of a call's only query to its n image tokens, mean over heads."""
    tokens = tokens_of(call, ImageAttention.name)
    batch, heads, _, width = call.q.shape
    grouped = call.q.float().reshape(batch, call.k.shape[1], -1, width)
    logits = (grouped @ call.k.float().transpose(-1, -2)).view(batch, heads, 1, -1)
    logits = logits * (width**-0.5 if call.scale is None else call.scale)
    weights = add_bias(call.mask, logits).softmax(dim=-1)
    return weights[0, :, 0].mean(dim=0)[tokens.keys("image")[0]]


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
    """

    answer: str
    before: str
    image: Image
    box: tuple[int, int, int, int] | None
    mask: Mask | None
    map: Map


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
        image = _upright(image)
        before, asked = self._look(image, question)
        s = fused(asked, self._general(image, len(asked)), image.size, self.lam, self.steps)
        if flat(s) or self.p == 1:
            return Carved(before, before, image, None, None, s)
        mask = regions(s, self.p, self.regions)
        refined = refine(image, mask, self.form)
        answer = self.ask([refined] if self.inputs == "refined" else [image, refined], question)
        return Carved(answer, before, refined, box_of(mask), mask, s)

    def ask(self, images: Sequence[Image], question: str) -> str:
        """Return the answer to a question about pictures, without a second look."""
        return self._ask(self._inputs(images, question), self.max_new_tokens)

    def _look(self, image: Image, text: str, steps: int | None = None) -> tuple[str, Tensor]:
        """Return the answer to a text and the maps [T, L, gh, gw] that it was made with."""
        inputs = self._inputs([image], text)
        probe = ImageAttention(self.span())
        with patch(self.model, probe):
            answer = self._ask(inputs, steps or self.max_new_tokens)
        return answer, probe.maps(grid_of(self.model, inputs))

    def _general(self, image: Image, steps: int) -> Tensor:
        """Return the general maps of a picture, at least `steps` of them if it has so many."""
        steps = 1 if self.steps == "start" else steps
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        tried, maps = self.known.get(key, (0, None))
        if maps is None or (tried < steps and len(maps) == tried):
            maps = self._look(image, self.general, steps)[1]
            self.known[key] = steps, maps
        return maps

    def span(self) -> tuple[int, int]:
        """Return the first and the last layer whose maps are used."""
        if self.layers is not None:
            return self.layers
        depth = 1 + max(s.layer or 0 for s in sites(self.model))
        if depth >= PUBLISHED_FROM:
            return LAYERS
        first, last = (round(one * (depth - 1) / (DEPTH - 1)) for one in LAYERS)
        return first, last

    def _inputs(self, images: Sequence[Image], text: str) -> Any:
        text = f"{text} {self.suffix}".strip()
        if self.prompt is not None:
            prompt = self.prompt(text, len(images))
        else:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        made = self.processor(images=list(images), text=[prompt], return_tensors="pt")
        return made.to(self.model.device, self.model.dtype)

    def _ask(self, inputs: Any, tokens: int) -> str:
        with torch.no_grad():
            out = self.model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, num_beams=1
            )
        written = out[:, inputs["input_ids"].shape[1] :]
        answer: str = self.processor.batch_decode(written, skip_special_tokens=True)[0]
        return answer.strip()


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


def grid_of(model: Any, inputs: Any) -> tuple[int, int]:
    """Return (rows, columns) of the image tokens of a prompt with one picture.

    Raises:
        HostError: if they are none, those of several tiles, or no grid.
    """
    found = sum(int((inputs["input_ids"] == one).sum()) for one in image_ids(model.config))
    if "image_grid_thw" in inputs:
        merge = model.config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        grid = rows // merge, columns // merge
    else:
        pixels = inputs["pixel_values"]
        tiles = pixels.shape[0] if pixels.ndim == 4 else pixels.shape[0] * pixels.shape[1]
        side = math.isqrt(found) if tiles == 1 else 0
        grid = side, side
    if hasattr(model, "qformer") or not found or grid[0] * grid[1] != found:
        raise HostError(
            f"the prompt's {found} image tokens are not one square grid of one picture (tiles, "
            "a Q-Former, several pictures): CARVE cannot tell where they look"
        )
    return grid


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")
