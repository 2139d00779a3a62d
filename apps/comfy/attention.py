"""One attention call of ComfyUI, read as an `AttentionCall` and answered in ComfyUI's layout.

ComfyUI calls `override(attention, q, k, v, heads, mask, ..., transformer_options=...)`, with
tensors [B, N, H D] or, with `skip_reshape`, [B, H, N, D], and an output of [B, N, H D] or, with
`skip_output_reshape`, [B, H, N, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from attnctl.records import AttentionCall, Rows, Site, Step
from attnctl.stack import Entry

from .places import spans_in

__all__ = ["Attention", "Given"]

Attention = Callable[..., Tensor]
"""Attention of ComfyUI: (q, k, v, heads, mask=..., ...) -> output."""

_POSITIONAL = (
    "q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape",
)  # fmt: skip
ROLE = "perturbed"
"""Role of all rows of a pass that a control was given to itself."""


@dataclass(frozen=True)
class _Earlier:
    """The override that was there before ours, as the next entry of the stack."""

    run: Callable[[AttentionCall], Tensor]

    def attend(self, call: AttentionCall) -> Tensor:
        """Run it."""
        return self.run(call)


class Given:
    """The arguments of one attention call of ComfyUI.

    Args:
        attention: the backend's function.
        args: positional arguments after it.
        options: the others.
    """

    def __init__(
        self, attention: Attention, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        named = dict(zip(_POSITIONAL, args, strict=False)) | options
        self.attention = attention
        self.heads: int = named.pop("heads")
        self._mask: Tensor | None = named.pop("mask", None)
        self.mask = _four_dimensional(self._mask)
        self.scale: float | None = named.get("scale")
        self._flat = not named.pop("skip_reshape", False)
        self._flat_out = not named.pop("skip_output_reshape", False)
        self.q, self.k, self.v = (named.pop(name) for name in "qkv")
        self.options: dict[str, Any] = named.get("transformer_options") or {}
        self._others = named
        if self._flat:
            dim = self.q.shape[-1] // self.heads
            shared = self.k.shape[-1] // dim  # key heads: fewer under grouped-query attention
            self.q = _split(self.q, self.heads)
            self.k, self.v = _split(self.k, shared), _split(self.v, shared)

    def call(
        self, site: Site, step: Step, heads: Tensor, earlier: Attention | None
    ) -> AttentionCall:
        """Return this call as a control sees it.

        Args:
            site: where it happens.
            step: where the run stands.
            heads: bool [H], the heads that the control may touch.
            earlier: an override that was installed before, to be run by `proceed`.
        """
        rest: tuple[Any, ...] = ()
        if earlier is not None:
            rest = (_Earlier(partial(self._run, partial(earlier, self.attention))),)
        options, kind = self.options, site.kind
        return AttentionCall(
            self.q, self.k, self.v, self.mask, self.scale, False,
            self.k.shape[1] < self.heads,
            site=site,
            rows=Rows((ROLE,), self.q.shape[0]),
            step=step,
            index=0,
            spans_of=lambda call: spans_in(options, kind, call.q.shape[2], call.k.shape[2]),
            base=lambda q, k, v, mask, scale, causal, gqa: self._attend(
                self.attention, q, k, v, mask, scale
            ),
            rest=cast("tuple[Entry, ...]", rest),
            heads=heads,
            role=ROLE,
        )  # fmt: skip

    def answer(self, out: Tensor) -> Tensor:
        """Return an output [B, H, N, D] in the layout that ComfyUI asked for."""
        return out.transpose(1, 2).flatten(2) if self._flat_out else out

    def _run(self, function: Attention, call: AttentionCall) -> Tensor:
        return self._attend(function, call.q, call.k, call.v, call.mask, call.scale)

    def _attend(
        self,
        function: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """Run an attention of ComfyUI on tensors [B, H, N, D]."""
        if scale != self.scale and scale is not None:
            # not every backend takes a scale; its root on both sides keeps float16 in range
            stock = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            root = math.sqrt(scale / stock)
            q, k = q * root, k * root
        if mask is self.mask:  # as it came: backends differ in what they take
            mask = self._mask
        return function(
            q, k, v, q.shape[1],
            mask=mask, skip_reshape=True, skip_output_reshape=True, **self._others,
        )  # fmt: skip


def _split(x: Tensor, heads: int) -> Tensor:
    """Return [B, N, H D] as [B, H, N, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _four_dimensional(mask: Tensor | None) -> Tensor | None:
    """Return a mask [Nq, Nk] or [B, Nq, Nk] as [B or 1, 1, Nq, Nk]."""
    if mask is None or mask.ndim > 3:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]
