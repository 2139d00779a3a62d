"""SpaceTime's weights for one picture: drawn with several lambda, the best by a score kept.

With x the picture, crop_i its part around object i and s a similarity up to 1, such as CLIP's,

    loss = 1 - s(x, prompt) + part * sum_i (1 - s(crop_i, "A photo of <object i>"))

lambda is a straight line over the run, and the lines that are tried are a list.

References:
    Wu et al., "Harnessing the Spatial-Temporal Attention of Diffusion Models for High-Fidelity
    Text-to-Image Synthesis", ICCV 2023 (arXiv 2304.03869); the loss is that of the official code.

Deviations: the official code takes two steps of Adam on lambda by object and step, with gradients
through a whole run, which takes about 45 GB at 512 pixels and moves lambda by 0.01 at most.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attnctl.errors import OptionError
from attnctl.patch import patch
from attnctl.words.prompts import Prompt

from .regions import RADIUS
from .spacetime import SpaceTime

__all__ = ["LINES", "ClipScore", "Fitted", "cropped", "fit_weights", "picture_losses"]

Score = Callable[[Tensor, Sequence[str]], Tensor]
Places = Sequence[tuple[Any, Any]]
LINES = ((0.7, 0.0), (0.4, 0.0), (1.0, 0.0), (0.4, 0.6), (1.0, -0.5), (1.0, -1.0))
"""(lambda at the beginning, what is added by the end), for mode "convex"."""


@dataclass(frozen=True)
class Fitted:
    """The best picture of each prompt.

    Args:
        images: [n, 3, H, W], 0 to 1.
        controls: what drew each of them.
        losses: of every line that was tried and every prompt, [lines, n].
    """

    images: Tensor
    controls: tuple[SpaceTime, ...]
    losses: Tensor


def fit_weights(
    pipe: Any,
    control: SpaceTime,
    score: Score,
    prompt: str | Sequence[str],
    *,
    lines: Sequence[tuple[float, float]] = LINES,
    part: float = 5.0,
    good: float = -math.inf,
    **call: Any,
) -> Fitted:
    """Draw each prompt once a line, from the same noise, and keep its picture of least loss.

    Args:
        pipe: a text-to-image pipeline.
        control: layout, mode and the rest; its `lam` and `slope` are those of the lines.
        score: similarity [n] of pictures [n, 3, h, w] (0 to 1, of any size) and n texts.
        prompt: one prompt or several.
        lines: (lam, slope) in the order in which they are tried.
        part: weight of the objects' parts of the picture.
        good: no further line is tried once every loss is at most this.
        **call: further arguments of the pipeline's call. Without a generator every line has
            noise of its own.

    Raises:
        OptionError: without a line, with several pictures per prompt, where the objects are
            denoiser inputs, not phrases, or for layout "fit" with `part`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not lines or call.get("num_images_per_prompt", 1) != 1:
        raise OptionError("fit_weights needs at least one line, and draws one picture per prompt")
    if part and control.layout == "fit":
        raise OptionError(
            "fit_weights cuts out the regions of a layout, and layout='fit' is known only when a "
            "picture is drawn: take part=0, or another layout"
        )
    places = [_phrases(control, pipe, text, i, len(prompts)) for i, text in enumerate(prompts)]
    controls = [dataclasses.replace(control, lam=lam, slope=slope) for lam, slope in lines]
    begin = _states(call.get("generator"))
    losses: list[Tensor] = []
    best: list[tuple[float, Tensor, SpaceTime]] = []
    for one in controls:
        for generator, state in begin:
            generator.set_state(state)
        with patch(pipe, one):
            drawn = pipe(prompt=prompts, output_type="pt", **call).images
        losses.append(picture_losses(drawn, prompts, places, score, part).detach().cpu())
        found = [(v, x, one) for v, x in zip(losses[-1].tolist(), drawn, strict=True)]
        best = [min(pair, key=lambda f: f[0]) for pair in zip(best or found, found, strict=True)]
        if max(loss for loss, _, _ in best) <= good:
            break
    images = torch.stack([x for _, x, _ in best])
    return Fitted(images, tuple(c for _, _, c in best), torch.stack(losses))


def picture_losses(
    pictures: Tensor,
    prompts: Sequence[str],
    places: Sequence[Places],
    score: Score,
    part: float = 5.0,
) -> Tensor:
    """Return the loss of the module docstring [n].

    Args:
        pictures: [n, 3, H, W], 0 to 1.
        prompts: n prompts.
        places: (phrase, region) of the objects of each.
        score: as in `fit_weights`.
        part: weight of the objects.
    """
    losses = 1 - score(pictures, prompts)
    if not part:
        return losses
    rest = []
    for picture, mine in zip(pictures, places, strict=True):
        each = [
            1 - score(cropped(picture, region)[None], [f"A photo of {_noun(phrase)}"])[0]
            for phrase, region in mine
        ]
        rest.append(torch.stack(each).sum())
    return losses + part * torch.stack(rest)


def cropped(picture: Tensor, region: Any) -> Tensor:
    """Return the part of a picture [3, H, W] around a region: of a disc the square around it."""
    height, width = picture.shape[-2:]
    if isinstance(region, Tensor):
        rows, columns = (region.amax(d).nonzero().flatten() for d in (1, 0))
        if not len(rows):
            raise OptionError("a mask of the layout is empty: nothing can be cut out around it")
        h, w = region.shape
        left, right = int(columns[0]) / w, (int(columns[-1]) + 1) / w
        top, bottom = int(rows[0]) / h, (int(rows[-1]) + 1) / h
    elif len(region) == 4:
        left, top, right, bottom = region
    else:
        x, y, radius = (*region, RADIUS)[:3]
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    ys, xs = _pixels(top, bottom, height), _pixels(left, right, width)
    return picture[:, ys, xs]


def _pixels(low: float, high: float, size: int) -> slice:
    start = min(max(0, math.floor(low * size + 1e-6)), size - 1)
    return slice(start, max(start + 1, min(size, math.ceil(high * size - 1e-6))))


def _phrases(control: SpaceTime, pipe: Any, text: str, i: int, prompts: int) -> Places:
    found = control.places(Prompt(pipe, text), i, prompts)
    if not all(isinstance(phrase, str) for phrase, _ in found):
        raise OptionError("fit_weights needs phrases: a score compares pictures with texts")
    return found


def _noun(phrase: str) -> str:
    return phrase.partition("#")[0].removeprefix("the ")


def _states(generator: Any) -> list[tuple[torch.Generator, Tensor]]:
    given = generator if isinstance(generator, (list, tuple)) else [generator]
    return [(one, one.get_state()) for one in given if one is not None]


class ClipScore:
    """Similarity of pictures and texts by a CLIP model of transformers.

    Args:
        model: a `CLIPModel`.
        tokenizer: its tokenizer.
    """

    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, pictures: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the cosine [n] of pictures [n, 3, h, w] (0 to 1) and n texts."""
        size, like = self.model.config.vision_config.image_size, next(self.model.parameters())
        small = interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
        mean, std = (small.new_tensor(v).view(3, 1, 1) for v in (self.MEAN, self.STD))
        words = self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt"
        ).to(like.device)
        pixels = ((small.clamp(0, 1) - mean) / std).to(like)
        out = self.model(**words, pixel_values=pixels)
        cosines: Tensor = (out.image_embeds * out.text_embeds).sum(-1).float()
        return cosines
