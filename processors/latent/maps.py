"""Differentiable maps of text tokens: where the picture looks for each token, head mean only.

For image queries i and text keys j of one site with H heads,

    A_ij = 1/H sum_h softmax_j(scale q_hi k_hj)

over the text keys alone. In cross-attention that is the attention map; in joint attention it is
the image-to-text block, each row divided by its sum: the log-sum-exp over the image keys
cancels, so that no image key is ever touched. One chunk of heads is held at a time, and the
backward pass makes its logits again instead of keeping them. Maps between image tokens are made
for chosen rows only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from attnctl.errors import HostError
from attnctl.processors.guidance.heads import head_indices
from attnctl.records import AttentionCall

__all__ = [
    "Seen",
    "image_rows",
    "mean_map",
    "of_sample",
    "seen",
    "sharpened",
    "smoothed",
    "text_maps",
]

_CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits held at once: 64 MB."""

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """Queries and keys of one attention call, from which maps are made later if needed.

    Args:
        q: image queries [B, H, Nq, D], selected heads.
        k: text or image keys [B, H, Nk, D].
        mask: broadcastable to [B, H, Nq, Nk], or None.
        scale: factor on the logits.
        grid: (frames, height, width) of the queries.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    grid: Grid


def seen(call: AttentionCall, keys: Literal["text", "image"] = "text") -> Seen | None:
    """Return the image queries and the keys of a role of a call, None if it has no such keys.

    Args:
        call: a call whose rows are all of interest.
        keys: which keys.

    Raises:
        HostError: if the model's tokens cannot be told apart or have no grid.
    """
    spans = call.spans
    if spans.k and spans.keys(keys) is None:
        return None  # a text refiner, or the image branch of an adapter
    image, columns = spans.queries("image"), spans.keys(keys)
    if image is None or columns is None or spans.grid is None:
        raise HostError(
            f"{call.site}: which tokens are text, and where on the grid the image tokens lie, is "
            "not known here; select other sites"
        )
    part = call.take(slice(None), head_indices(call))
    scale = part.q.shape[-1] ** -0.5 if part.scale is None else part.scale
    mask = _part_of(part.mask, image, columns)
    return Seen(
        part.q[:, :, image], part.repeat_kv(part.k)[:, :, columns], mask, scale, spans.grid
    )


def _part_of(mask: Tensor | None, queries: slice | Tensor, keys: slice) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape[-1] > 1:
        mask = mask[..., keys]
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., queries, :]


def text_maps(sites: list[list[Seen]], samples: int) -> Tensor:
    """Return the mean over all heads of all sites, [samples, Nt, frames, height, width].

    Args:
        sites: the calls of each site; several of one site are one sample each (Mochi).
        samples: number of samples.

    Raises:
        HostError: if a site's rows are no samples.
    """
    groups = _together(sites)
    heads = [calls[0].q.shape[1] for calls in groups]
    total: Any = 0.0
    for calls, count in zip(groups, heads, strict=True):
        maps = _of_site(calls)
        _check_rows(len(maps), samples)
        # one group is the common case, and every operation a launch
        total = maps if len(groups) == 1 else total + maps * (count / sum(heads))
    result: Tensor = total.transpose(1, 2).unflatten(-1, sites[0][0].grid)
    return result


def _of_site(calls: list[Seen]) -> Tensor:
    """Return the mean over the heads of one site [B, Nq, Nt]."""
    each = [mean_map(one.q, one.k, one.mask, one.scale) for one in calls]
    if len(each) == 1:
        return each[0]
    width = max(one.shape[-1] for one in each)  # Mochi leaves out each row's own padding
    return torch.cat([pad(one, (0, width - one.shape[-1])) for one in each])


def _together(sites: list[list[Seen]]) -> list[list[Seen]]:
    """Return the sites with those of one shape as one, their heads side by side.

    A deep model has dozens, with maps so small that launching the work takes longer than it does.
    """
    alike: dict[Any, list[Seen]] = {}
    others = []
    for calls in sites:
        one = calls[0]
        if len(calls) > 1 or one.mask is not None:
            others.append(calls)
            continue
        key = (len(one.q), one.q.shape[2:], one.k.shape[2:], one.scale)
        alike.setdefault(key, []).append(one)
    for group in alike.values():
        if len(group) > 1:
            q, k = (torch.cat([getattr(one, name) for one in group], 1) for name in ("q", "k"))
            group = [replace(group[0], q=q, k=k)]
        others.append(group)
    return others


def _check_rows(rows: int, samples: int) -> None:
    if rows != samples:
        raise HostError(
            f"{rows} attention rows for {samples} samples (frames folded into the "
            "batch, perhaps), whose order is not known: select other sites"
        )


def of_sample(calls: list[Seen], sample: int, samples: int) -> Seen:
    """Return what the calls of one site saw of one sample, as a batch of one.

    Args:
        calls: as in `text_maps`.
        sample: its number.
        samples: number of samples.

    Raises:
        HostError: if the site's rows are no samples.
    """
    rows = [(call, row) for call in calls for row in range(len(call.q))]
    _check_rows(len(rows), samples)
    call, row = rows[sample]
    one = slice(row, row + 1)
    mask = call.mask
    if mask is not None and mask.ndim == 4 and len(mask) > 1:
        mask = mask[one]
    return replace(call, q=call.q[one], k=call.k[one], mask=mask)


def image_rows(sites: Sequence[Seen], places: Tensor) -> Tensor:
    """Return what some image tokens attend to in the image [K, frames, height, width].

    The mean over all heads of all sites. No other row is computed.

    Args:
        sites: image queries and image keys of one sample at each site, all of one grid.
        places: numbers [K] of the tokens on the flattened grid.
    """
    total: Any = 0.0
    for one in sites:
        mask = _part_of(one.mask, places, slice(None))
        total = total + mean_map(one.q[:, :, places], one.k, mask, one.scale)[0] * one.q.shape[1]
    rows: Tensor = total / sum(one.q.shape[1] for one in sites)
    return rows.unflatten(-1, sites[0].grid)


def mean_map(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the mean over heads of softmax(scale q k^T + mask), gradients to q and k.

    Args:
        q: [B, H, Nq, D].
        k: [B, H, Nk, D].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits.

    Returns:
        [B, Nq, Nk] in float32 (float64 for float64 inputs).
    """
    result: Tensor = _MeanMap.apply(q, k, mask, scale)
    return result


class _MeanMap(torch.autograd.Function):
    """With G the gradient of the mean: dz = A (G - sum_j A G) / H for each head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, mask)
        ctx.scale = scale
        wide = torch.promote_types(q.dtype, torch.float32)
        total = q.new_zeros((), dtype=wide)
        for heads in _chunks(q, k):
            total = total + _softmax(q, k, mask, scale, heads).sum(1)
        return total / q.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        q, k, mask = ctx.saved_tensors
        grad = grads[0][:, None] / q.shape[1]
        # keys of cross-attention hang on the prompt alone, so that nobody asks for theirs
        dq, dk = torch.empty_like(q), torch.empty_like(k) if ctx.needs_input_grad[1] else None
        for heads in _chunks(q, k):
            maps = _softmax(q, k, mask, ctx.scale, heads)
            dz = maps * (grad - (maps * grad).sum(-1, keepdim=True)) * ctx.scale
            dq[:, heads] = (dz @ k[:, heads].to(dz.dtype)).to(q.dtype)
            if dk is not None:
                dk[:, heads] = (dz.transpose(-1, -2) @ q[:, heads].to(dz.dtype)).to(k.dtype)
        return dq, dk, None, None


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    count = max(1, _CHUNK_ELEMENTS // max(1, q.shape[0] * q.shape[2] * k.shape[2]))
    for start in range(0, q.shape[1], count):
        yield slice(start, min(start + count, q.shape[1]))


def _softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, heads: slice) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    z = (q[:, heads].to(wide) * scale) @ k[:, heads].to(wide).transpose(-1, -2)
    if mask is not None:
        if mask.ndim >= 3 and mask.shape[-3] > 1:
            mask = mask[..., heads, :, :]
        blocked = torch.finfo(wide).min
        z = z.masked_fill(~mask, blocked) if mask.dtype == torch.bool else z + mask.to(wide)
    return z.softmax(-1)


def sharpened(maps: Tensor, factor: float = 100.0) -> Tensor:
    """Return softmax over the tokens of `factor` times the maps, as Attend-and-Excite does.

    Args:
        maps: [tokens, ...].
        factor: inverse temperature.
    """
    return (factor * maps).softmax(0)


def smoothed(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Return maps blurred by the 3x3 kernel of Attend-and-Excite, the border a mirror.

    Its kernel is exp(-(x / (2 sigma))^2), a Gaussian of standard deviation sqrt(2) sigma.

    Args:
        maps: [..., height, width].
        sigma: as in Attend-and-Excite.
    """
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    kernel = _kernel(sigma, maps.dtype, maps.device)
    return conv2d(pad(flat, (1, 1, 1, 1), mode=mode), kernel).reshape(maps.shape)


@functools.lru_cache(maxsize=16)
def _kernel(sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the kernel [1, 1, 3, 3], made once: a copy to the device waits for the device."""
    with torch.inference_mode(False), torch.no_grad():
        x = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype, device=device)
        side = torch.exp(-((x / (2 * sigma)) ** 2))
        kernel = side[:, None] * side
        return (kernel / kernel.sum())[None, None]
