"""Asking a vision-language model about a picture: its inputs, its grid, the words it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnctl.processors.vlm.prompts import begun

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["asked", "image_grid", "picture_seen", "usual_tau", "words_of"]

_SIDE = 1024
"""Largest side, in pixels, of a picture that maps are laid over."""


def asked(model: Any, processor: Any, image: Image, question: str) -> dict[str, Any]:
    """Return the inputs of a model that is asked about a picture, where the model is.

    Args:
        model: of transformers.
        processor: its processor, with a chat template.
        image: the picture.
        question: the words that follow it.
    """
    said = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": said}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    how = begun(processor, [prompt])
    made = processor(text=[prompt], images=[image], return_tensors="pt", **how)
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for key, value in made.items()
        if isinstance(value, Tensor)
    }


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
    """Return the words of a text and the places of their tokens; special tokens are left out.

    Args:
        tokenizer: of the model.
        ids: the text's tokens.
    """
    found: list[tuple[str, list[int]]] = []
    special, said = set(tokenizer.all_special_ids), ""
    for i, one in enumerate(ids):
        if one in special:
            continue
        text = tokenizer.decode(ids[: i + 1], skip_special_tokens=True)
        piece, begins = text[len(said) :], said[-1:].isspace() or not said
        if found and not piece[:1].isspace() and not begins:
            word, places = found.pop()
            found.append((word + piece.rstrip(), [*places, i]))
        else:
            found.append((piece.strip(), [i]))
        said = text
    return [(word, tuple(places)) for word, places in found if word]


def usual_tau(model: Any) -> float:
    """Return 20, or for decoders narrower than 4096, where phi cannot get as large, less."""
    text = model.config.get_text_config()
    return min(20.0, 20.0 * math.sqrt(text.hidden_size / 4096))


def image_grid(model: Any, inputs: dict[str, Any], tokens: int) -> tuple[int, int] | None:
    """Return rows and columns of the image tokens, None if they lie in no one grid."""
    shape = inputs.get("image_grid_thw")
    if shape is not None:
        merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
        _, high, wide = (int(n) for n in shape[0])
        found = high // merge, wide // merge
    elif _pixels(inputs) is None:  # several parts of the picture, each with a grid of its own
        return None
    else:
        side = math.isqrt(tokens)
        found = side, side
    return found if found[0] * found[1] == tokens else None


def _pixels(inputs: dict[str, Any]) -> Tensor | None:
    """Return the one picture [3, H, W] that a model is given; None if it is no one picture."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 4 or pixels.shape[-3] != 3:
        return None
    parts: Tensor = pixels.flatten(0, -4)
    return parts[0] if len(parts) == 1 else None


def picture_seen(processor: Any, inputs: dict[str, Any], image: Image) -> Image:
    """Return the picture out of the model's input, where that is one picture.

    Else it is as it was, or smaller if it is large.
    """
    from PIL import Image as Pictures

    pixels, about = _pixels(inputs), getattr(processor, "image_processor", None)
    mean, std = getattr(about, "image_mean", None), getattr(about, "image_std", None)
    if pixels is None or mean is None or std is None:
        small = image.convert("RGB")
        small.thumbnail((_SIDE, _SIDE))
        return small
    colours = pixels.float().cpu().permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    return Pictures.fromarray((colours.clamp(0, 1) * 255).round().byte().numpy())
