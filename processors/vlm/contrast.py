"""Contrastive decoding: the logits of the next token against those of a second pass.

A second pass reads a prompt from which something was taken (the image, or its details) and the
same answer. What both passes say alike comes from habit; the difference comes from the image.
With z and z- the logits of the two passes, a method gives

    out = fuse(z, z-)    where z >= log beta + max z,    -inf elsewhere

The cut-off keeps the contrast from raising tokens that the model holds impossible.

References:
    Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization", 2022
    (arXiv 2210.15097), equation 3: the cut-off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.hosts.run import Run
from attnctl.hosts.vlm_stream import Stream, words
from attnctl.records import LogitsCall
from attnctl.selectors import Selection

__all__ = ["Contrast", "plausible", "without_images"]


def plausible(z: Tensor, beta: float) -> Tensor:
    """Return where a token is plausible.

    Args:
        z: [..., V] logits or log-probabilities.
        beta: least share, in [0, 1], of the probability of the most likely token.

    Returns:
        z >= log beta + max z, bool [..., V].
    """
    if beta == 0:
        return z > -math.inf
    return z >= math.log(beta) + z.amax(dim=-1, keepdim=True)


def without_images(call: LogitsCall) -> dict[str, Any]:
    """Return the inputs of a forward on the text of a call's prompt, padded on the left.

    Image tokens are left out, and the tokens around them that the model's config names.
    """
    inputs = call.inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompt = torch.arange(ids.shape[1], device=ids.device) < ids.shape[1] - call.written
    kept = mask.bool()
    for one in call.images + call.marks:
        kept = kept & ~((ids == one) & prompt)
    n = int(kept.sum(dim=1).amax())
    order = kept.int().argsort(dim=1, stable=True)[:, -n:]  # what is kept comes last, in order
    text = words(ids.gather(1, order), kept.gather(1, order).to(mask.dtype))
    kinds = ("token_type_ids", "mm_token_type_ids")
    return text | {k: torch.zeros_like(text["input_ids"]) for k in kinds if k in inputs}


@dataclass(frozen=True)
class Contrast(Control):
    """Base of the methods that contrast the logits with those of a second pass.

    A subclass gives `rewrite`, the second pass's inputs, and `fuse`.
    """

    beta: float = 0.1
    both: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    extra: ClassVar[str] = "a second pass of the model, with a cache of its own, for each token"

    def __post_init__(self) -> None:
        self._at_least("beta", 0, 1)

    def _at_least(self, name: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not (low <= value <= high and math.isfinite(value)):
            top = "" if high == math.inf else f" and at most {high:g}"
            raise OptionError(f"{self.name}: {name}={value} must be finite, at least {low:g}{top}")

    @property
    def cuts_only(self) -> bool:
        """Whether the second pass has no weight, so that only the cut-off is left."""
        return False

    @property
    def neutral(self) -> bool:
        """No weight on the second pass, and no cut-off."""
        return self.cuts_only and self.beta == 0

    def begin(self, run: Run, selection: Selection) -> Stream:
        """Return the second pass of one generation."""
        return Stream()

    def decode(self, call: LogitsCall) -> Tensor:
        """Fuse the logits of both passes, and cut off what is implausible."""
        z = call.proceed()
        out = z
        if not self.cuts_only:
            weak = call.state.follow(call, self.rewrite, self.both)
            out = self.fuse(z, weak, call.written + 1)
        return out.masked_fill(~plausible(z, self.beta), -math.inf)

    def rewrite(self, call: LogitsCall) -> dict[str, Any]:
        """Return the inputs of the second pass from those of the first."""
        raise NotImplementedError

    def fuse(self, z: Tensor, weak: Tensor, t: int) -> Tensor:
        """Return the contrast.

        Args:
            z: [B, V] logits of the first pass, -inf where a control further in cut off.
            weak: [B, V] logits of the second pass.
            t: number of the answer's token that they predict, from 1.
        """
        raise NotImplementedError
