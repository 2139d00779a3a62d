"""A stand-in for the flash-attn package in plain torch, for tests where it cannot be installed.

Everything of transformers in front of it stays the real one: the masks that a model makes for
FlashAttention, the removal of padding, windows, and the choice by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NAMES",
    "choose_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_stand_in",
]

NAMES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
"""What transformers calls the FlashAttentions; not every release has all."""

_LOADED = (
    "_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn",
    "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn",
)  # fmt: skip

Window = tuple[int, int]


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return the attention [B, Nq, H, D] of q [B, Nq, H, D], k and v [B, Nk, Hkv, D]."""
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    at = torch.arange(len(q) + 1)
    out = flash_attn_varlen_func(flat_q, flat_k, flat_v, at * n, at * m, n, m, **options)
    return out.view_as(q)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """Return the attention [Tq, H, D] of sequences laid end to end, q [Tq, H, D] and so on."""
    assert not dropout_p
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_one(*part, softmax_scale, causal, window_size) for part in parts])


def _one(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: Window
) -> Tensor:
    """One sequence: queries [n, H, D] are the last of the keys' [m, Hkv, D] tokens."""
    n, m, times = len(q), len(k), q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(times, dim=1).float() for x in (k, v))
    logits = scale * torch.einsum("nhd,mhd->hnm", q.float(), k)
    ahead = torch.arange(m) - torch.arange(m - n, m)[:, None]  # of each query, in tokens
    left, right = window[0], 0 if causal else window[1]
    hidden = (ahead > right if right >= 0 else ahead > m) | ((ahead < -left) & (left >= 0))
    weights = logits.masked_fill(hidden.to(logits.device), -torch.inf).softmax(dim=-1)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


@contextmanager
def flash_stand_in() -> Iterator[None]:
    """Let transformers load the stand-in when a model's attention is a FlashAttention."""
    from transformers import modeling_flash_attention_utils as utils

    functions: list[Callable[..., Any] | None] = [flash_attn_func, flash_attn_varlen_func]
    if hasattr(utils, "_flash_with_kvcache_fn"):
        functions.append(None)
    held = {name: value for name, value in vars(utils).items() if name in _LOADED}
    load = utils._lazy_imports

    def loaded(name: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        assert name in (None, *NAMES), f"transformers was asked for {name!r}"
        return *functions, utils._pad_input, utils._unpad_input

    try:
        vars(utils).update({**dict.fromkeys(held), "_lazy_imports": loaded})
        yield
    finally:
        vars(utils).update({**held, "_lazy_imports": load})


def choose_attention(model: Any, name: str) -> None:
    """Set the attention of a model's decoder, past the checks for the package and a GPU."""
    model.config.get_text_config()._attn_implementation = name
