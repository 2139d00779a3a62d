"""Explicit attention maps in float64: what every control must agree with, written the long way.

Nothing here shares code with the controls. Maps are formed in full, kernels are looped over,
thresholds are found by bisection; tensors are [B, H, N, D], maps [B, H, Nq, Nk].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "apply_map",
    "blurred_queries",
    "causal_mask",
    "entmax15",
    "gaussian_kernel",
    "identity_map",
    "image_identity_map",
    "image_logit_map",
    "logits",
    "lse",
    "mean_query",
    "mix_maps",
    "normalized_guidance",
    "one_hot_map",
    "permutation_map",
    "softmax_map",
    "uniform_map",
]


def logits(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return scale q k^T + mask; keys [B, Hkv, Nk, D] are repeated for grouped queries."""
    q, k = q.double(), _per_head(k.double(), q.shape[1])
    z = torch.einsum("bhid,bhjd->bhij", q, k)
    z = z * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is None:
        return z
    if mask.dtype == torch.bool:
        return torch.where(mask, z, torch.full_like(z, -torch.inf))
    return z + mask.double()


def _per_head(x: Tensor, heads: int) -> Tensor:
    return torch.stack([x[:, h * x.shape[1] // heads] for h in range(heads)], dim=1)


def causal_mask(nq: int, nk: int) -> Tensor:
    """Return the bool mask [Nq, Nk] of query i on keys 0 to i."""
    return torch.tensor([[j <= i for j in range(nk)] for i in range(nq)])


def lse(z: Tensor) -> Tensor:
    """Return log sum exp of the last dimension, -inf for rows of -inf."""
    top = z.double().amax(-1, keepdim=True)
    top = torch.where(top.isinf(), torch.zeros_like(top), top)
    return torch.log(torch.exp(z.double() - top).sum(-1)) + top[..., 0]


def softmax(z: Tensor) -> Tensor:
    """Return the softmax of the last dimension, zeros for rows of -inf."""
    total = lse(z)[..., None]
    return torch.where(total.isinf(), 0.0, torch.exp(z.double() - total))


def softmax_map(
    q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return A = softmax(scale q k^T + mask)."""
    return softmax(logits(q, k, mask, scale))


def apply_map(attention: Tensor, v: Tensor) -> Tensor:
    """Return A V; values [B, Hkv, Nk, D] are repeated for grouped queries."""
    return torch.einsum("bhij,bhjd->bhid", attention, _per_head(v.double(), attention.shape[1]))


def mix_maps(attention: Tensor, perturbed: Tensor, u: float | Tensor) -> Tensor:
    """Return (1 - u) A + u A' for one u or one per head [H]."""
    u = torch.as_tensor(u, dtype=torch.float64).reshape(-1, 1, 1)
    return (1 - u) * attention + u * perturbed


def identity_map(attention: Tensor) -> Tensor:
    """Return I in the shape of a map."""
    return torch.eye(attention.shape[-1], dtype=torch.float64).expand_as(attention)


def image_identity_map(attention: Tensor, image: slice) -> Tensor:
    """Return A with the identity in the image rows (over all columns)."""
    result = attention.clone()
    result[:, :, image] = identity_map(attention)[:, :, image]
    return result


def image_logit_map(
    q: Tensor,
    k: Tensor,
    image: slice,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the softmax of logits whose image-image block is -inf off the diagonal."""
    z = logits(q, k, mask, scale)
    for i in range(*image.indices(z.shape[-2])):
        for j in range(*image.indices(z.shape[-1])):
            if i != j:
                z[..., i, j] = -torch.inf
    return softmax(z)


def uniform_map(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return 1 / n at the n keys each row may see (all without a mask; bool or 0/-inf)."""
    seen = torch.ones_like(attention)
    if mask is not None:
        allowed = mask if mask.dtype == torch.bool else mask > -1e4
        seen = seen * allowed
    return seen / seen.sum(-1, keepdim=True)


def one_hot_map(z: Tensor) -> Tensor:
    """Return 1 at the largest logit of each row."""
    return torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).double()


def permutation_map(attention: Tensor, order: Tensor) -> Tensor:
    """Return P A, row i of which is row order[i] of A."""
    permutation = torch.zeros(len(order), len(order), dtype=torch.float64)
    for i, j in enumerate(order.tolist()):
        permutation[i, j] = 1
    return torch.einsum("ij,bhjk->bhik", permutation, attention)


def gaussian_kernel(sigma: float, size: int) -> list[float]:
    """Return the normalised 1-D kernel of odd length, at most `size` (made odd upwards)."""
    wanted = math.ceil(6 * sigma)
    length = min(wanted if wanted % 2 else wanted + 1, size if size % 2 else size + 1)
    half = length // 2
    weights = [math.exp(-0.5 * ((i - half) / sigma) ** 2) for i in range(length)]
    return [w / sum(weights) for w in weights]


def blurred_queries(q: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """Return queries [B, H, N, D] blurred frame by frame, one 2-D kernel tap at a time."""
    frames, high, wide = grid
    rows, columns = gaussian_kernel(sigma, high), gaussian_kernel(sigma, wide)
    result = torch.zeros_like(q, dtype=torch.float64)
    for f in range(frames):
        for y in range(high):
            for x in range(wide):
                for dy, wy in enumerate(rows, -(len(rows) // 2)):
                    for dx, wx in enumerate(columns, -(len(columns) // 2)):
                        at = (f * high + _reflect(y + dy, high)) * wide + _reflect(x + dx, wide)
                        result[:, :, (f * high + y) * wide + x] += wy * wx * q[:, :, at].double()
    return result


def _reflect(i: int, size: int) -> int:
    """Return where an index outside 0..size-1 falls when the border is a mirror."""
    if i < 0:
        return -i
    return 2 * (size - 1) - i if i >= size else i


def mean_query(q: Tensor) -> Tensor:
    """Return every query replaced by the mean of all."""
    return (q.double().sum(2, keepdim=True) / q.shape[2]).expand(q.shape)


def normalized_guidance(
    positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float
) -> Tensor:
    """Return NAG's output, token by token, norms over heads and head dim."""
    result = torch.zeros_like(positive, dtype=torch.float64)
    for b in range(positive.shape[0]):
        for n in range(positive.shape[2]):
            plus, minus = positive[b, :, n].double(), negative[b, :, n].double()
            guided = scale * plus - (scale - 1) * minus
            before, after = plus.square().sum().sqrt(), guided.square().sum().sqrt()
            if after > tau * before:
                guided = guided * (tau * before / after)
            result[b, :, n] = alpha * guided + (1 - alpha) * plus
    return result


def entmax15(z: Tensor, rounds: int = 80) -> Tensor:
    """Return entmax with alpha 1.5 over the last dimension, threshold by bisection."""
    half = z.double() / 2
    top = half.amax(-1, keepdim=True)
    half = torch.where(top.isinf(), half, half - top)
    low, high = torch.full_like(top, -1.0), torch.zeros_like(top)
    for _ in range(rounds):
        middle = (low + high) / 2
        too_much = (half - middle).clamp_min(0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (half - (low + high) / 2).clamp_min(0).square()
