"""Chosen keys of an attention call apart from all others, so that their logits can be changed.

    out = sum over chosen j of p'_j v_j + p'_rest o_rest,   p' = softmax(z_j + S_j, lse_rest)

is attention with S added to the chosen columns, from the output and log-sum-exp of the other
keys: no map over all keys is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnctl.kernels import attention_with_lse
from attnctl.records import AttentionCall

__all__ = ["Groups", "Parts", "columns", "keys_removed", "split", "taken"]


@dataclass(frozen=True)
class Groups:
    """Groups of keys for each sample of a batch, padded to equal numbers.

    Args:
        keys: [b, t], indices of all keys in groups.
        of: [b, t], the group of each.
        real: bool [b, t], False for padding.
        number: groups of the sample that has most, n.
    """

    keys: Tensor
    of: Tensor
    real: Tensor
    number: int

    @classmethod
    def make(cls, samples: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Groups:
        """Return the groups of samples, each a list of lists of key indices."""
        flat = [[(k, g) for g, ks in enumerate(one) for k in ks] for one in samples]
        wide = max(1, *map(len, flat))
        padded = [[*one, *[(0, 0)] * (wide - len(one))] for one in flat]
        real = [[i < len(one) for i in range(wide)] for one in flat]
        with torch.inference_mode(False):  # kept over steps, in whatever mode they run
            both = torch.tensor(padded, device=device)
            return cls(
                both[..., 0], both[..., 1], torch.tensor(real, device=device),
                max(map(len, samples)),
            )  # fmt: skip

    @property
    def empty(self) -> bool:
        """Whether no sample has a group."""
        return self.number == 0

    @property
    def valid(self) -> Tensor:
        """Bool [b, n]: the groups that a sample has."""
        return self.members.any(-1)

    @property
    def members(self) -> Tensor:
        """Bool [b, n, t]: which keys a group has."""
        each = torch.arange(self.number, device=self.of.device)[:, None]
        return (self.of[:, None] == each) & self.real[:, None]

    def gathered(self, logits: Tensor) -> Tensor:
        """Return the log-sum-exp of every group, [b, h, t, m] to [b, h, n, m]."""
        inside = self.members[:, None, ..., None]  # [b, 1, n, t, 1]
        each = [
            logits.masked_fill(~inside[:, :, g], -torch.inf).logsumexp(2)
            for g in range(self.number)
        ]
        return torch.stack(each, dim=2)

    def spread(self, values: Tensor) -> Tensor:
        """Return every key's value of its group, [b, h, n, m] to [b, h, t, m]."""
        index = self.of[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return values.gather(2, index)


@dataclass(frozen=True)
class Parts:
    """Attention taken apart: chosen keys, and all others.

    Args:
        out: [b, h, m, d], attention over the other keys.
        rest: [b, h, m], their log-sum-exp.
        logits: [b, h, t, m] of the chosen keys, -inf for padding.
        values: [b, h, t, d] of the chosen keys.
    """

    out: Tensor
    rest: Tensor
    logits: Tensor
    values: Tensor

    def total(self, bias: Tensor | None = None) -> Tensor:
        """Return the log-sum-exp over all keys [b, h, m], with a bias on the chosen."""
        logits = self.logits if bias is None else self.logits + bias
        return torch.logaddexp(self.rest, logits.logsumexp(2))

    def merged(self, bias: Tensor) -> Tensor:
        """Return attention [b, h, m, d] with a bias [b, h, t, m] on the chosen keys' logits."""
        total = self.total(bias).clamp_min(torch.finfo(bias.dtype).min)
        chosen = torch.exp(self.logits + bias - total[:, :, None])
        rest = torch.exp(self.rest - total)
        return rest[..., None] * self.out + chosen.transpose(-1, -2) @ self.values


def split(part: AttentionCall, queries: slice, groups: Groups) -> Parts:
    """Take the attention of some queries apart, in float32 or wider.

    Args:
        part: the rows and heads, as `AttentionCall.take` returns them.
        queries: which queries.
        groups: the chosen keys.
    """
    wide = torch.promote_types(part.q.dtype, torch.float32)
    q, k, v = part.q[:, :, queries].to(wide), part.repeat_kv(part.k), part.repeat_kv(part.v)
    others = keys_removed(part.mask, groups, k.shape[2], queries)
    out, rest = attention_with_lse(q, k, v, others, part.scale)
    logits = columns(part, queries, groups.keys).masked_fill(
        ~groups.real[:, None, :, None], -torch.inf
    )
    return Parts(out, rest, logits, taken(v, groups.keys).to(wide))


def columns(part: AttentionCall, queries: slice, keys: Tensor) -> Tensor:
    """Return the logits of some keys, mask included, [b, h, t, m] in float32 or wider.

    Args:
        part: the rows and heads.
        queries: which queries.
        keys: [b, t] indices.
    """
    wide = torch.promote_types(part.q.dtype, torch.float32)
    scale = part.q.shape[-1] ** -0.5 if part.scale is None else part.scale
    q, k = part.q[:, :, queries].to(wide), taken(part.repeat_kv(part.k), keys).to(wide)
    logits = (k * scale) @ q.transpose(-1, -2)
    if part.mask is None:
        return logits
    mask = _rows_and_columns(part.mask, queries, keys, part.k.shape[2])
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask.to(wide)


def taken(x: Tensor, keys: Tensor) -> Tensor:
    """Return some keys or values of each sample, [b, h, N, d] and [b, t] to [b, h, t, d]."""
    return x.gather(2, keys[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _rows_and_columns(mask: Tensor, queries: slice, keys: Tensor, count: int) -> Tensor:
    """Return a mask's entries for some queries and keys, keys before queries."""
    whole = _queries_of(mask, queries)
    whole = whole.expand(len(keys), *whole.shape[1:-1], count)
    index = keys[:, None, None].expand(-1, *whole.shape[1:3], -1)
    return whole.gather(-1, index).transpose(-1, -2)


def _queries_of(mask: Tensor, queries: slice) -> Tensor:
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    return mask if mask.shape[-2] == 1 else mask[..., queries, :]


def keys_removed(mask: Tensor | None, groups: Groups, count: int, queries: slice) -> Tensor:
    """Return a call's mask for some queries with the groups' keys masked out."""
    kept = groups.real.new_ones(len(groups.keys), count + 1)
    # padding points to a column past the end
    kept.scatter_(1, torch.where(groups.real, groups.keys, count), False)
    seen = kept[:, None, None, :count]
    if mask is None:
        return seen
    mask = _queries_of(mask, queries)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
