"""Token ids as a call of the whole model, or of `generate`, is given them.

A GPU that is asked for ids answers when all else is done that it has been told to do. So it is
asked before a model begins, and nobody waits until the decoder wants to know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .vlm_tokens import Sequence, fit_rows, image_ids, label

__all__ = ["Given"]


@dataclass(eq=False)
class Given:
    """Token ids [B, N], padding mask [B, N] and inputs of a call of the whole model."""

    ids: Tensor | None
    mask: Tensor | None
    inputs: dict[str, Any]
    model: Any = None
    sequence: Sequence | None = None  # of a generation without a cache
    copied: Tensor | None = None  # what a generation hands on as its prompt: the same ids
    under_way: _UnderWay | None = None

    @classmethod
    def to(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        """Return what a call of a model is given."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        mask = kwargs.get("attention_mask")
        flat = isinstance(mask, Tensor) and mask.ndim == 2
        return cls(ids if _are_ids(ids) else None, mask if flat else None, kwargs, model)

    def labels(self, rows: int, n: int) -> Tensor | None:
        """Return the labels of the last n tokens, None if these are not all ids."""
        if self.ids is None or self.ids.shape[1] != n or rows % self.ids.shape[0]:
            return None
        ids, mask = self.here
        images = () if self.model is None else image_ids(self.model.config)
        return fit_rows(label(ids, None if mask is None else mask[:, -n:], images), rows)

    def begins_like(self, other: Given, n: int) -> bool:
        """Whether the first n ids are those that another call's begin with, row by row."""
        assert self.ids is not None and other.ids is not None
        rows, most = other.ids.shape[0], min(n, other.ids.shape[1])
        if self.ids.shape[0] % rows:
            return False
        whole = np.repeat(other.here[0], self.ids.shape[0] // rows, axis=0)
        return np.array_equal(self.here[0][:, :most], whole[:, :most])

    def fetch(self) -> None:
        """Let the ids of a prompt come here, before a model begins with it.

        Later this would wait for all that a GPU has been told to do, such as the vision tower,
        and the decoder's first layers would come too late.
        """
        ids, mask = self.ids, self.mask
        if ids is None or ids.shape[1] == 1 or ids.device.type == "cpu":
            return
        if ids.is_cuda and (mask is None or mask.is_cuda):
            self.under_way = _UnderWay(ids, mask)
        else:
            self.here  # noqa: B018

    @functools.cached_property
    def here(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Ids and mask on the CPU: a GPU would be told to do a dozen tiny things, one by one."""
        ids, mask = self.ids, self.mask
        assert ids is not None
        if self.under_way is not None:
            return self.under_way.arrived()
        if mask is None:
            return ids.cpu().numpy(), None
        if _alike(ids, mask) and ids.device.type != "cpu":  # one wait, not two
            both = torch.stack((ids, mask)).cpu().numpy()
            return both[0], both[1]
        return ids.cpu().numpy(), mask.cpu().numpy()


class _UnderWay:
    """Ids and mask on their way from a GPU into memory that it writes to by itself."""

    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        self.both = mask is not None and _alike(ids, mask)
        there = [ids] if mask is None else [ids, mask]
        if mask is not None and self.both:
            there = [torch.stack((ids, mask))]
        self.copies = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            for x in there
        ]
        self.done = torch.cuda.current_stream(ids.device).record_event()

    def arrived(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return ids and mask."""
        self.done.synchronize()
        first, *others = (copy.numpy() for copy in self.copies)
        if self.both:
            return first[0], first[1]
        return first, others[0] if others else None


def _alike(ids: Tensor, mask: Tensor) -> bool:
    return ids.shape == mask.shape and ids.dtype == mask.dtype and ids.device == mask.device


def _are_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
