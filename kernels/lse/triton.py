"""The kernel of `column_sums`: two products per head, with all keys and with the chosen ones.

One program takes BM queries of one row, and one part of the heads. Per head the log-sum-exp over
all keys is made block by block, then the chosen columns from a second, small product. What the
heads give is added up in registers, so that words and memory come only once, at the end.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnctl.kernels.group_attention.launch import Launch, mask_fits, mask_steps

from .columns import Columns

__all__ = ["INTERPRETED", "ColumnsCall", "columns_fit"]

MOST_KEYS = 1024
"""Longer sequences, of joint attention, are left to torch: not measured here."""
MOST_COLUMNS = 128
"""Chosen keys that a program holds."""
MOST_WIDTH = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 64}
"""Largest head dim: registers do not hold more of float32."""


@triton.jit(
    do_not_specialize=[
        "row", "query", "sample", "n_q", "n_k", "n_heads", "group", "n_words", "n_chosen",
        "sm_b", "sm_h", "sm_n",
    ],
    do_not_specialize_on_alignment=["Sums", "Chosen", "Members", "Heads", "Mask"],
)  # fmt: skip
def columns_kernel(
    Q, K, Sums, Chosen, Members, Heads, Mask,
    sq_b, sq_n, sk_b, sk_n,
    row, query, sample, n_q, n_k, n_heads, group, n_words, n_chosen, sm_b, sm_h, sm_n, scale,
    SQH: tl.constexpr, SKH: tl.constexpr, MASK: tl.constexpr, SOME: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    """Add the columns of BM queries, over a part of the heads."""
    i_m, i_p, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_parts = tl.num_programs(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n, o_d, o_t = tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, TP)
    m_m, m_d, m_t = o_m < n_q, o_d < D, o_t < n_chosen
    at_row = (row + i_b).to(tl.int64)
    at_q = (query + o_m).to(tl.int64)
    chosen = tl.load(Chosen + o_t, mask=m_t, other=0).to(tl.int64)
    p_q = Q + at_row * sq_b + at_q[:, None] * sq_n + o_d[None, :]
    base_k = K + at_row * sk_b
    p_c = base_k + chosen[:, None] * sk_n + o_d[None, :]
    p_mask = Mask + at_row * sm_b + at_q * sm_n  # [BM]

    acc = tl.zeros([BM, TP], tl.float32)
    for i_h in range(i_p, n_heads, n_parts):
        head = i_h
        if SOME:
            head = tl.load(Heads + i_h).to(tl.int32)
        at_h = (head // group).to(tl.int64) * SKH
        b_q = tl.load(p_q + head * SQH, mask=m_m[:, None] & m_d[None, :], other=0.0)
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for start in range(0, n_k, BN):
            at = start + o_n
            inside = at < n_k
            p_k = base_k + at_h + at[:, None].to(tl.int64) * sk_n + o_d[None, :]
            b_k = tl.load(p_k, mask=inside[:, None] & m_d[None, :], other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # in units of log 2
            seen = m_m[:, None] & inside[None, :]
            if MASK > 0:
                b_m = tl.load((p_mask + head * sm_h)[:, None] + at[None, :], mask=seen, other=0)
                if MASK == 1:
                    seen = seen & (b_m != 0)
                else:
                    b_s += b_m.to(tl.float32) * 1.4426950408889634
            b_s = tl.where(seen, b_s, float("-inf"))
            m_new = tl.maximum(m, tl.max(b_s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far
            total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(b_s - m_safe[:, None]), 1)
            m = m_new
        b_c = tl.load(p_c + at_h, mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_c), input_precision="ieee") * scale
        seen = (m_m & (total > 0.0))[:, None] & m_t[None, :]
        if MASK > 0:
            p_t = (p_mask + head * sm_h)[:, None] + chosen[None, :]
            b_m = tl.load(p_t, mask=m_m[:, None] & m_t[None, :], other=0)
            if MASK == 1:
                seen = seen & (b_m != 0)
            else:
                b_s += b_m.to(tl.float32) * 1.4426950408889634
        lse = m + tl.log2(tl.where(total > 0.0, total, 1.0))
        lse = tl.where(total > 0.0, lse, 0.0)
        acc += tl.exp2(tl.where(seen, b_s - lse[:, None], float("-inf")))

    p_sums = Sums + ((sample + i_b) * n_parts + i_p).to(tl.int64) * n_words * n_q + o_m
    for i_w in range(0, n_words):
        counts = tl.load(Members + o_t * n_words + i_w, mask=m_t, other=0.0)
        old = tl.load(p_sums, mask=m_m, other=0.0)
        tl.store(p_sums, old + tl.sum(acc * counts[None, :], 1), mask=m_m)
        p_sums += n_q


INTERPRETED = not isinstance(columns_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported, so that it runs on a CPU."""


def columns_fit(q: Tensor, k: Tensor, wanted: Columns, mask: Tensor | None) -> bool:
    """Whether the kernel can take a call of such types, layouts and lengths."""
    if k.dtype != q.dtype or q.shape[3] > MOST_WIDTH.get(q.dtype, 0):
        return False
    if not 0 < wanted.keys.shape[0] <= MOST_COLUMNS or k.shape[2] > MOST_KEYS:
        return False
    if q.stride(3) != 1 or k.stride(3) != 1 or wanted.sums.device != q.device:
        return False
    return mask_fits(mask, k.shape[2])


class ColumnsCall:
    """The launch for calls of one kind."""

    def __init__(
        self, q: Tensor, k: Tensor, wanted: Columns, mask: Tensor | None, scale: float | None
    ) -> None:
        heads, width = q.shape[1], q.shape[3]
        scale = width**-0.5 if scale is None else scale
        _, parts, words, queries = wanted.sums.shape
        rows = wanted.rows.stop - wanted.rows.start
        padded = max(16, triton.next_power_of_2(width))
        wide = padded > 128 or q.dtype == torch.float32  # what shared memory holds
        block = 32 if wide else 64
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        chosen = wanted.keys.shape[0]
        count = heads if wanted.heads is None else wanted.heads.shape[0]
        self.fixed = (
            wanted.sums, wanted.keys, wanted.members,
            wanted.keys if wanted.heads is None else wanted.heads,
        )  # fmt: skip
        self.launch = Launch(
            columns_kernel,
            (triton.cdiv(queries, block), parts, rows),
            q.device,
            (q.dtype, wanted.keys.dtype, None if mask is None else mask.dtype),
            2,
            (q.stride(0), q.stride(2), k.stride(0), k.stride(2)),
            (
                wanted.rows.start, wanted.queries.start, wanted.first, queries, k.shape[2], count,
                heads // k.shape[1], words, chosen, *mask_steps(mask), scale * math.log2(math.e),
            ),
            {
                "SQH": q.stride(1), "SKH": k.stride(1), "MASK": kind,
                "SOME": wanted.heads is not None, "D": width, "DP": padded, "BM": block,
                "BN": 64 if wide else 128, "TP": max(16, triton.next_power_of_2(chosen)),
            },
            {"num_warps": 4, "num_stages": 1 if k.shape[2] <= 128 else 2},
        )  # fmt: skip

    def __call__(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Add the columns of one call."""
        self.launch((q, k, *self.fixed, self.fixed[1] if mask is None else mask))
