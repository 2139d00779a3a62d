"""Calls made by hand, so that a control can be tested without any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..control import Control
from ..records import AttentionCall, Rows, Site, Spans, Step

__all__ = ["Record", "attention_call", "joint_spans", "sdpa", "sdpa_inputs", "tensors"]


@dataclass(frozen=True)
class Record(Control):
    """Keeps the calls of language models and what the controls further in made of them."""

    calls: list[tuple[AttentionCall, Tensor]] = field(default_factory=list)

    name: ClassVar[str] = "record"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def attend(self, call: AttentionCall) -> Tensor:
        """Keep the call."""
        self.calls.append((call, call.proceed()))
        return self.calls[-1][1]


def sdpa_inputs(model: Any, inputs: dict[str, Any], monkeypatch: Any) -> list[tuple[Tensor, ...]]:
    """Return q and k of every attention call of a forward of an unpatched model, in order."""
    calls: list[tuple[Tensor, ...]] = []
    stock = functional.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> Tensor:
        calls.append((q, k))
        return stock(q, k, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", note)
        model(**inputs)
    return calls


def tensors(
    batch: int = 1,
    heads: int = 2,
    tokens: int = 5,
    dim: int = 8,
    *,
    kv_heads: int | None = None,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    sharp: float = 1.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return seeded q [B, H, N, D], k and v [B, Hkv, Nk, D]; `sharp` scales the queries."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads or heads, keys or tokens, dim)
    q = sharp * torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: Any, causal: bool, gqa: bool
) -> Tensor:
    """The stock primitive in the signature that a call's `base` has."""
    return functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa
    )


def joint_spans(
    image: int, text: int, *, text_first: bool = False, grid: Any = None, refs: int = 0
) -> Spans:
    """Return the spans of a joint sequence: image tokens, reference tokens, text tokens."""
    parts = [("image", image), ("ref", refs), ("text", text)]
    if text_first:
        parts = [parts[-1], *parts[:-1]]
    spans, start = [], 0
    for role, n in parts:
        if n:
            spans.append((role, start, start + n))
        start += n
    return Spans(tuple(spans), tuple(spans), grid)


def attention_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: Any = "self",
    groups: Sequence[str] = ("perturbed/0",),
    role: str = "perturbed/0",
    heads: Sequence[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    spans: Spans | None = None,
    step: int = 0,
    site: int = 0,
    index: int = 0,
    state: Any = None,
) -> AttentionCall:
    """Return a call as a control's `attend` gets it.

    Args:
        q: [B, H, N, D], B a multiple of the number of groups.
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        kind: kind of the site.
        groups: roles of the rows.
        role: role of the control's own rows.
        heads: selected heads, None for all.
        mask: as in `AttentionCall`.
        scale: as in `AttentionCall`.
        is_causal: as in `AttentionCall`.
        spans: token spans; all tokens are "image" by default.
        step: index of the step.
        site: index of the site.
        index: which primitive of the site.
        state: the control's state.
    """
    count, nq, nk = q.shape[1], q.shape[2], k.shape[2]
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[list(range(count) if heads is None else heads)] = True
    spans = spans or Spans((("image", 0, nq),), (("image", 0, nk),), None)
    return AttentionCall(
        q, k, v, mask, scale, is_causal, k.shape[1] < count,
        site=Site(site, f"blocks.{site}.attn", kind, site, count, q.shape[-1], k.shape[1]),
        rows=Rows(tuple(groups), max(1, q.shape[0] // len(groups))),
        step=Step(step, 10),
        index=index,
        spans_of=lambda call: spans,
        base=sdpa,
        heads=chosen,
        state=state,
        role=role,
    )  # fmt: skip
