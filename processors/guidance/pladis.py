"""PLADIS: cross-attention of the main pass extrapolated towards its sparse form.

    A = softmax(z) + lambda (entmax_1.5(z) - softmax(z))
    O = (1 - lambda) softmax(z) V + lambda entmax_1.5(z) V

No extra pass. Rows still sum to one; single entries may be negative. lambda = 0 is stock,
lambda = 1 sparse attention, beyond it extrapolates.

References:
    Kim and Sim, "PLADIS: Pushing the Limits of Attention in Diffusion Models at Inference Time
    by Leveraging Sparsity", 2025 (arXiv 2503.07677); Peters et al., "Sparse Sequence-to-Sequence
    Models", 2019 (arXiv 1905.05702), algorithm 2, for entmax_1.5.

Default: lambda 2; the official README "generally fixes" it to 1.5 or 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control, register
from attnctl.errors import OptionError
from attnctl.kernels.lse.reference import logit_chunks
from attnctl.records import AttentionCall
from attnctl.schedule import Schedule, Window

from .heads import head_indices, put

__all__ = ["PLADIS", "entmax15", "sparse_attention"]

_CHUNK_ELEMENTS = 1 << 22
"""Largest number of logits held at once: sorting them takes about 60 bytes each."""


def entmax15(logits: Tensor) -> Tensor:
    """Return entmax with alpha = 1.5 over the last dimension.

    Args:
        logits: [..., N]; -inf entries get probability 0.

    Returns:
        p_j = max(z_j / 2 - tau, 0)^2 with tau such that the entries sum to one, found from
        the sorted logits (exact), in the dtype of the logits. A row of -inf gives zeros.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = (wide - wide.amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).min)) / 2
    top = z.sort(dim=-1, descending=True).values
    # beyond a gap of 1 an entry cannot be in the support; the clamp keeps -inf out of the sums
    top = top.clamp_min(-4.0)
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = top.cumsum(-1) / count
    square = (top**2).cumsum(-1) / count
    delta = (1 - count * (square - mean**2)) / count
    tau = mean - delta.clamp_min(0).sqrt()
    support = (tau <= top).sum(-1, keepdim=True).clamp_min(1)
    return ((z - tau.gather(-1, support - 1)).clamp_min(0) ** 2).to(logits.dtype)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return entmax_1.5(scale q k^T + mask) v, in chunks of queries.

    Args:
        q: [B, H, Nq, D].
        k: [B, H, Nk, D].
        v: [B, H, Nk, Dv].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        [B, H, Nq, Dv] in the dtype of q; a row without any key gives 0.
    """
    values = v.to(torch.promote_types(q.dtype, torch.float32))
    chunks = logit_chunks(q, k, mask, scale, _CHUNK_ELEMENTS)
    return torch.cat([(entmax15(z) @ values).to(q.dtype) for z in chunks], dim=2)


@register
@dataclass(frozen=True)
class PLADIS(Control):
    """Sparse extrapolation of cross-attention, in the main pass.

    Args:
        heads: selector; cross-attention sites only.
        lam: lambda >= 0; 0 is off.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
    """

    heads: Any = "all"
    lam: float = 2.0
    start: float = 0.0
    stop: float = 1.0

    name: ClassVar[str] = "pladis"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)

    def __post_init__(self) -> None:
        if not 0 <= self.lam < math.inf:
            raise OptionError(f"{self.name}: lam={self.lam} must be finite, 0 or above")
        _ = self.schedule

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps at which it acts."""
        return Schedule((Window(self.start, self.stop),))

    @property
    def neutral(self) -> bool:
        """lambda = 0."""
        return self.lam == 0 or self.schedule.empty

    def attend(self, call: AttentionCall) -> Tensor:
        """Extrapolate from dense to sparse attention."""
        dense = call.proceed()
        if call.spans.keys("text") is None:
            return dense  # the image branch of an IP-Adapter or of Wan I2V
        rows, heads = slice(None), head_indices(call)
        part = call.take(rows, heads)
        k, v = part.repeat_kv(part.k), part.repeat_kv(part.v)
        sparse = sparse_attention(part.q, k, v, part.mask, part.scale)
        mine = dense if heads is None else dense[:, heads]
        if call.rest:  # only the softmax part is extrapolated, not what other controls did
            new = mine + self.lam * (sparse - part.primitive())
        else:
            new = torch.lerp(mine, sparse, self.lam)
        return put(dense, new, rows, heads, call)
