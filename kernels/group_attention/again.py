"""Edited rows at one layer after another: what they share is looked up at the first.

A prompt of some hundred tokens is read as fast as the host can tell the GPU what to do. While the
model's own code runs between two layers, the processor forgets ours, so that each function called
here counts: an edit is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .edit import Edit
from .launch import UNIT, Again

__all__ = ["RowsAgain"]


class RowsAgain:
    """Edits the rows of a layer whose tensors are laid out like those of one before it.

    Args:
        launch: that of the layer before.
        q: of that layer, as all others.
        k: as of scaled_dot_product_attention.
        v: as of scaled_dot_product_attention.
        edit: the edit; its codes and heads are a layer's own.
        mask: as of scaled_dot_product_attention.
        scale: factor on the logits, None for 1/sqrt(D).
        causal: whether query i sees the keys up to i only.
        total: tokens so far; with the number of keys it says which of them come first.
    """

    def __init__(
        self, launch: Again, q: Tensor, k: Tensor, v: Tensor, edit: Edit,
        mask: Tensor | None, scale: float | None, causal: bool, total: int,
    ) -> None:  # fmt: skip
        self.launch, self.device, self.dtype = launch, q.device, q.dtype
        self.shapes = q.shape, k.shape, v.shape
        self.steps = q.stride(), k.stride(), v.stride()
        self.single = q.shape[0], 1, q.shape[1], q.shape[3]
        self.codes, self.code = edit.codes, (edit.codes.shape, edit.codes.stride())
        self.every, self.mask, self.total = edit.heads is None, mask, total
        self.scale, self.causal = scale, causal

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, codes: Tensor,
        heads: Tensor | None, mask: Tensor | None, scale: float | None, causal: bool, total: int,
    ) -> Tensor | None:  # fmt: skip
        """Write a layer's rows into `out`, made here for a single query, and return it.

        None, with nothing done, where the layer is of another kind, a gradient is wanted, or
        another stream is the current one.
        """
        shapes, steps, launch = self.shapes, self.steps, self.launch
        if (
            q.shape != shapes[0] or k.shape != shapes[1] or v.shape != shapes[2]
            or q.stride() != steps[0] or k.stride() != steps[1] or v.stride() != steps[2]
            or not q.dtype is k.dtype is v.dtype is self.dtype or q.device != self.device
            or (codes is not self.codes and (codes.shape, codes.stride()) != self.code)
            or (heads is None) is not self.every
            or mask is not self.mask or total != self.total
            or scale != self.scale or causal is not self.causal
            or torch.is_grad_enabled() or launch.stream_now() != launch.stream
        ):  # fmt: skip
            return None
        if out is None:
            out = q.new_empty(self.single)
        at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        if (at[0] | at[1] | at[2] | at[3]) % UNIT:
            return None
        code = codes.data_ptr()
        launch.run(
            *launch.front, *at, *launch.fixed, code,
            code if heads is None else heads.data_ptr(),
            code if mask is None else mask.data_ptr(), *launch.rest,
        )  # fmt: skip
        return out
