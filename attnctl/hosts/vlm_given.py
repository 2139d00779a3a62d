"""Token ids as a call of the whole model, or of `generate`, is given them.

A GPU that is asked for ids answers when all else is done that it has been told to do. So it is
asked before a model begins.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        """Bring the ids of a prompt here, before a model begins with it.

        Later this would wait for all that a GPU has been told to do, such as the vision tower,
        and the decoder's first layers would come too late.
        """
        ids = self.ids
        if ids is not None and ids.shape[1] > 1 and ids.device.type != "cpu":
            self.here  # noqa: B018

    @functools.cached_property
    def here(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Ids and mask on the CPU: a GPU would be told to do a dozen tiny things, one by one.

        Each by itself: to put them together first takes longer than to wait twice.
        """
        assert self.ids is not None
        mask = None if self.mask is None else self.mask.cpu().numpy()
        return self.ids.cpu().numpy(), mask


def _are_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()
