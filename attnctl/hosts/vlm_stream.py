"""A second pass of a language model beside the first, with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import LogitsCall

__all__ = ["Stream", "words"]


class Stream:
    """A second pass of a language model beside the first, with a cache of its own.

    It reads another prompt and the same answer; it begins anew with every prompt.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self.mask: Tensor | None = None  # [B, N] of all that it has read
        self.aligned = True
        self.seen = 0  # tokens of the first pass that it has followed

    def follow(
        self,
        call: LogitsCall,
        rewrite: Callable[[LogitsCall], dict[str, Any]],
        controlled: bool = False,
    ) -> Tensor:
        """Read what the first pass has just read; return the logits [B, V] of the last token.

        Args:
            call: the first pass's call.
            rewrite: returns the inputs of the second pass from the first's. Where it leaves
                the prompt's token ids as they are (the same tensor) it is asked at every token,
                else at prompts only, since what follows is text.
            controlled: whether attention controls act in this pass too.

        Raises:
            HostError: if the first pass has read something that this one has not.
        """
        if call.past == 0:
            inputs = rewrite(call)
            self.cache = None
            self.aligned = inputs["input_ids"] is call.inputs["input_ids"]
            mask = inputs["attention_mask"]
            self.mask = mask.repeat_interleave(call.base().shape[0] // mask.shape[0], dim=0)
        else:
            self._check(call)
            inputs = rewrite(call) if self.aligned else self._words(call)
        logits, self.cache = call.again(inputs, self.cache, controlled)
        self.seen = call.past + call.inputs["input_ids"].shape[1]
        return logits

    def reorder(self, beam_idx: Tensor) -> None:
        """Take the rows of a beam search's new beams; beams of one prompt share its mask."""
        if self.cache is not None:
            self.cache.reorder_cache(beam_idx)

    def _check(self, call: LogitsCall) -> None:
        ids = call.inputs["input_ids"]
        if ids.shape[1] > 1 and any(bool((ids == one).any()) for one in call.images):
            raise HostError(
                "images in a later turn, in a cache that goes on, cannot be changed for the "
                "second pass: give the whole conversation as one prompt"
            )
        if self.mask is None or call.past != self.seen:
            raise HostError(
                f"the second pass has followed {self.seen} tokens and the model's cache held "
                f"{call.past}: it was cut, or filled while the control was not installed; patch "
                "before the prompt is read"
            )

    def _words(self, call: LogitsCall) -> dict[str, Any]:
        """Return the inputs of a pass whose prompt differs: the new tokens as text."""
        assert self.mask is not None
        ids = call.inputs["input_ids"]
        new = call.inputs["attention_mask"][:, -ids.shape[1] :]
        self.mask = torch.cat([self.mask, new.to(self.mask)], dim=1)
        return words(ids, self.mask)


def words(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Return the inputs of a forward on text alone.

    Args:
        ids: [B, n] token ids.
        mask: [B, past + n], 0 at padding.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
