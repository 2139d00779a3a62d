"""Where each tokenizer's tokens stand in a denoiser's text sequence, as data."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import HostError
from ..hosts.adopt import original_class

__all__ = ["Part", "Placed", "placed_tokenizers", "tokenizers"]

NAMES = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Part:
    """A stretch of a denoiser's text sequence.

    Args:
        tokenizers: attributes of the pipeline whose tokens share these positions (their
            embeddings are joined in the channels).
        length: tokens; None for the `max_sequence_length` of the call, 0 for the tokenizer's
            `model_max_length`.
    """

    tokenizers: tuple[str, ...]
    length: int | None = None


_CLIP = Part(("tokenizer", "tokenizer_2"), 0)
_T5 = (Part(("tokenizer",)),)
LAYOUTS: dict[str, tuple[Part, ...]] = {
    "UNet2DConditionModel": (_CLIP,),
    "SD3Transformer2DModel": (_CLIP, Part(("tokenizer_3",))),
    "FluxTransformer2DModel": (Part(("tokenizer_2",)),),
    "HunyuanDiT2DModel": (Part(("tokenizer",), 77), Part(("tokenizer_2",), 256)),
    "ChromaTransformer2DModel": _T5,
    "PixArtTransformer2DModel": _T5,
    "WanTransformer3DModel": _T5,
    "WanVACETransformer3DModel": _T5,
    "LTXVideoTransformer3DModel": _T5,
    "CogVideoXTransformer3DModel": _T5,
    "MochiTransformer3DModel": _T5,
    "AllegroTransformer3DModel": _T5,
}
"""By class of the denoiser. Models that wrap the prompt into a template are not among them."""


@dataclass(frozen=True)
class Placed:
    """One tokenizer of a pipeline.

    Args:
        name: attribute of the pipeline.
        tokenizer: the tokenizer.
        offset: where its first token stands in the denoiser's text sequence; None if its
            tokens are not part of it (FLUX's CLIP gives a pooled vector only).
        length: tokens after which the pipeline cuts a prompt off, None for never.
        text: the prompt as this tokenizer gets it.
    """

    name: str
    tokenizer: Any
    offset: int | None
    length: int | None
    text: str


def tokenizers(pipe: Any) -> dict[str, Any]:
    """Return the tokenizers of a pipeline by attribute."""
    found = {name: getattr(pipe, name, None) for name in NAMES}
    return {name: value for name, value in found.items() if value is not None}


def placed_tokenizers(pipe: Any, prompt: str, call: Mapping[str, Any]) -> list[Placed]:
    """Return a pipeline's tokenizers with their place in the denoiser's text sequence.

    Args:
        pipe: the pipeline.
        prompt: the prompt.
        call: further arguments of the pipeline's call (`max_sequence_length`, `prompt_2`...).

    Raises:
        HostError: if it has no tokenizer, or how it lays out its text is not known.
    """
    known = tokenizers(pipe)
    layout = _layout(pipe)
    if not known or layout is None:
        raise HostError(
            f"{original_class(pipe).__name__} "
            + ("has no tokenizer" if not known else "has a text layout that is not known here")
            + ", so words cannot be turned into token positions: give the positions themselves, "
            "such as words={'circle': [5, 6]}"
        )
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for part in layout:
        own = [name for name in part.tokenizers if name in known]
        length = _length(pipe, part, known[own[0]] if own else None, call)
        places.update({name: (offset, length) for name in own})
        offset += length
    return [_placed(pipe, n, t, places.get(n), prompt, call) for n, t in known.items()]


def _layout(pipe: Any) -> tuple[Part, ...] | None:
    for name in ("unet", "transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        module = getattr(module, "_orig_mod", module)
        if module is not None:
            classes = original_class(module).__mro__
            return next((LAYOUTS[c.__name__] for c in classes if c.__name__ in LAYOUTS), None)
    return None


def _length(pipe: Any, part: Part, tokenizer: Any, call: Mapping[str, Any]) -> int:
    if part.length:
        return part.length
    if part.length == 0:
        own = getattr(tokenizer, "model_max_length", None)
        return int(own if own is not None else pipe.tokenizer_max_length)
    given = call.get("max_sequence_length")
    if given is None:
        known = inspect.signature(original_class(pipe).__call__).parameters
        given = known["max_sequence_length"].default
    return int(given)


def _placed(
    pipe: Any,
    name: str,
    tokenizer: Any,
    place: tuple[int, int] | None,
    prompt: str,
    call: Mapping[str, Any],
) -> Placed:
    if getattr(tokenizer, "padding_side", "right") != "right":
        raise HostError(
            f"pipe.{name} fills up on the left, so positions depend on the length of the text: "
            "give the token positions themselves"
        )
    own = call.get(name.replace("tokenizer", "prompt")) or prompt
    # the pipeline's own cleaning, such as Wan's
    clean = getattr(sys.modules[original_class(pipe).__module__], "prompt_clean", str)
    offset, length = (None, None) if place is None else place
    return Placed(name, tokenizer, offset, length, clean(own))
