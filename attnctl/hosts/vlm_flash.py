"""FlashAttention as transformers calls it, in the terms of scaled_dot_product_attention.

On `flash_attention_2`, _3 or _4 a model gives its attention function no mask of queries by keys:
padding is a mask [B, tokens], None where there is none, and that queries are causal, counted from
the last key, and have a sliding window is said beside it (`flash_attention_forward` in
integrations/flash_attention.py, `_flash_attention_forward` in modeling_flash_attention_utils.py).
The model's own function goes on computing all rows with these. What a control reads and computes
again has a mask as sdpa would have it, made only where a control asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..errors import HostError

__all__ = ["Flash", "Seen", "flash_of", "flash_primitive", "seen_by_sdpa"]

_EAGER = "call model.set_attn_implementation('eager')"
_REFUSED = {
    "softcap": f"capped logits: {_EAGER}",
    "s_aux": f"learned attention sinks: {_EAGER}",
    "cache": "paged caches: use generate, without continuous batching",
    "block_table": "paged caches: use generate, without continuous batching",
    "cu_seq_lens_q": "packed sequences: read them padded, as rows of a batch",
    "cu_seq_lens_k": "packed sequences: read them padded, as rows of a batch",
}
"""Arguments of FlashAttention that a row computed again would not have."""


class Seen(NamedTuple):
    """An attention call as scaled_dot_product_attention would have it.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        causal: whether query i sees the keys up to i only, beside the mask.
        whole: returns the one mask that says both, the same at each call; None where it is
            enough to say one of them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    whole: Callable[[], Tensor] | None = None


class Flash:
    """A FlashAttention function of transformers on modules whose config may be seen as ours.

    It asks the module's config which FlashAttention to load, where a controlled module has our
    name.

    Args:
        function: as transformers registered it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: Any, *call: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the attention [B, N, H, Dv] and None."""
        out: tuple[Tensor, Tensor | None] = self.function(_AsLoaded(module), *call, **kwargs)
        return out


class _AsLoaded:
    """A module with the config that it was loaded with."""

    def __init__(self, module: Any) -> None:
        self._module, self.config = module, module.__dict__["config"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def flash_of(function: Any) -> Flash | None:
    """Return an attention function of transformers as FlashAttention, None if it is another.

    The hub's FlashAttention kernels are registered as the same function, or a partial of it.
    """
    from transformers.integrations.flash_attention import flash_attention_forward

    plain = getattr(function, "func", function)
    return Flash(function) if plain is flash_attention_forward else None


def seen_by_sdpa(
    module: Any, call: tuple[Any, ...], kwargs: dict[str, Any], known: dict[Any, Any]
) -> Seen:
    """Return a call of FlashAttention as scaled_dot_product_attention would have it.

    Args:
        module: the attention module.
        call: q [B, H, Nq, D], k and v [B, Hkv, Nk, D], and the padding, bool [B, T <= Nk] or
            None.
        kwargs: what else the model gave.
        known: what the layers of this forward share; filled.

    Raises:
        HostError: if the model asks for what a row computed again would not have.
    """
    q, k, v, padding = call
    _check(q, padding, kwargs, known)
    q, k, v = _halves(module, q, k, v)
    asked = kwargs.get("is_causal")
    causal = bool(module.is_causal if asked is None else asked)
    if padding is not None and padding.shape[1] < k.shape[2]:  # a static cache, not yet full
        k, v = k[:, :, : padding.shape[1]], v[:, :, : padding.shape[1]]
    n, keys, window = q.shape[2], k.shape[2], kwargs.get("sliding_window")
    window = window if window is not None and window < keys else None
    kind = n, keys, causal, window, q.device

    def whole() -> Tensor:
        return _once(
            known, kind, padding, lambda: _mask(padding, n, keys, causal, window, q.device)
        )

    if window is not None or (causal and 1 < n < keys):
        return Seen(q, k, v, whole(), False)
    causal = causal and n > 1
    if padding is None:
        return Seen(q, k, v, None, causal)
    mask = _once(known, (keys, q.device), padding, lambda: padding.bool()[:, None, None])
    return Seen(q, k, v, mask, causal, functools.cache(whole) if causal else None)


def _once(
    known: dict[Any, Any], kind: Any, padding: Tensor | None, make: Callable[[], Tensor]
) -> Tensor:
    """Return what layers with the same padding share: of each kind the latest."""
    found = known.get(kind)
    if found is None or found[0] is not padding:
        found = known[kind] = padding, make()
    mask: Tensor = found[1]
    return mask


def _mask(
    padding: Tensor | None, n: int, keys: int, causal: bool, window: int | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return which keys each query sees, bool [B or 1, 1, n, keys].

    Padding is taken out before FlashAttention counts tokens, for the window.
    """
    if padding is None:
        at = torch.arange(keys, device=device)[None]
    else:
        at = padding.cumsum(1) - 1
    query, key = at[:, -n:, None], at[:, None]  # the queries are the last tokens
    seen = key <= query if causal else torch.ones_like(key <= query)
    if window is not None:
        seen &= key > query - window
    if window is not None and not causal:
        seen &= key < query + window
    if padding is not None:
        seen &= padding.bool()[:, None]
    return seen[:, None]


def _check(
    q: Tensor, padding: Tensor | None, kwargs: dict[str, Any], known: dict[Any, Any]
) -> None:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise HostError(
                f"this decoder asks FlashAttention for {name}; a control cannot act on {what}"
            )
    positions = kwargs.get("position_ids")
    if positions is None or padding is not None or q.shape[0] != 1 or q.shape[2] == 1:
        return
    if known.get("positions") is not positions:  # asks the device; FlashAttention does, always
        if bool((positions[..., 1:] <= positions[..., :1]).any()):
            raise HostError(
                "position_ids of this call start again, where FlashAttention begins another "
                f"sequence; a control cannot act on {_REFUSED['cu_seq_lens_q']}"
            )
        known["positions"] = positions


def _halves(module: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values in the type that FlashAttention computes in."""
    if q.dtype != torch.float32:
        return q, k, v
    from transformers.integrations import flash_attention

    target = getattr(flash_attention, "get_target_dtype", None)
    dtype = v.dtype if target is None else target(query=q, module=_AsLoaded(module))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def flash_primitive(
    flash: Callable[..., Any], module: Any, call: tuple[Any, ...], seen: Seen,
    kwargs: dict[str, Any],
) -> Callable[..., Tensor]:  # fmt: skip
    """Return FlashAttention as the `base` of a call.

    It runs where all queries meet all keys under the model's own mask. Some of the queries or
    heads, other keys and other masks go to scaled_dot_product_attention.

    Args:
        flash: the model's own function.
        module: the attention module.
        call: what the model gave.
        seen: the same, as controls see it.
        kwargs: what else the model gave.
    """

    def base(q: Tensor, k: Tensor, v: Tensor, m: Any, s: Any, c: bool, gqa: bool) -> Tensor:
        own = seen.mask if seen.whole is None or m is None else seen.whole()
        same = m is own and c == (seen.causal and seen.whole is None)
        if same and q.shape == seen.q.shape and k.shape == seen.k.shape:
            out: Tensor = flash(module, q, k, v, call[3], **{**kwargs, "scaling": s})[0]
            return out.transpose(1, 2)
        dropped = kwargs.get("dropout") or 0.0
        return functional.scaled_dot_product_attention(
            q, k, v, m, dropped, c, scale=s, enable_gqa=gqa
        )

    return base
