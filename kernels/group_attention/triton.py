"""Rows of attention with two edits of their weights, each in one pass over the keys.

Keys carry codes: 0 none, and for `RAISE` anything else; for `MOVE` 1 text sink, 2 image sink,
3 other image token. With a the logits of a row and A its softmax weights,

    RAISE:  a_j <- a_j + alpha |a_j|    where the code of j is not 0,
    MOVE:   A_j <- (1 - p) A_j          at sinks (1, 2),
            A_j <- A_j (1 + p sum_{1,2} A / sum_3 A)  at 3,

the second only where the row reads the image: sum_{2,3} A >= least, sum_3 A >= rho sum_{2,3} A,
and both groups of image tokens are seen. Factors on groups need no second pass: attention
within the groups is kept beside the whole, and put together at the end.

One program takes BM rows of one key head: a row of each query head of the group in turn. A few
rows of long sequences are split over the keys; the parts are put together by a second kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .edit import DTYPES, Edit, Rows
from .launch import MOST_KNOWN, Launch
from .spikes import sink_codes_triton

__all__ = ["INTERPRETED", "RowsCall", "rows_call", "sink_codes_triton", "tensors_fit"]

MOST_PROGRAMS, FEWEST_KEYS = 128, 1024
"""For written tokens: programs are split over the keys up to so many (about one for each
multiprocessor), while each has so many keys. The host is what is waited for there, and putting
parts together is another launch."""

MOST_IN_PROMPT, FEWEST_IN_PROMPT = 512, 512
"""The same for rows of a prompt, where long ones wait for the GPU."""

MOST_ROWS, KEYS, WARPS = 16, 64, 4
"""Rows of a program, keys that it takes at once, and its warps."""


@triton.jit
def _finished(total, acc, sinks, others, text, image, rest, p, rho, least, free):
    """Return rows [BM, DP] from attention within groups, and where weights were moved [BM]."""
    whole = tl.where(total > 0.0, total, 1.0)
    seen = image + rest
    chosen = (seen >= least * whole) & (rest >= rho * seen) & (image > 0.0) & (rest > 0.0) & free
    gain = p * (text + image) / tl.where(chosen, rest, 1.0)
    moved = acc - p * sinks + gain[:, None] * others
    return tl.where(chosen[:, None], moved, acc) / whole[:, None], chosen


@triton.jit(
    do_not_specialize=[
        "first", "sm_b", "sm_h", "sm_n", "sc_b", "n_rows", "n_k", "n_codes", "per_split",
        "n_splits",
    ],
    do_not_specialize_on_alignment=["Columns", "Flags", "Codes", "Heads", "Mask"],
)  # fmt: skip
def edited_rows_kernel(
    Q, K, V, Out, Parts, Columns, Flags, Codes, Heads, Mask, first, strength, rho, least,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
    sm_b, sm_h, sm_n, sc_b, n_rows, n_k, n_codes, per_split, n_splits, scale,
    MOVE: tl.constexpr, ALONE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute BM rows of a key head: into Out, or if SPLIT a part of their keys into Parts."""
    i_m, i_kv, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_s = 0
    if SPLIT:
        i_s, i_m = i_m % n_splits, i_m // n_splits
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DP)
    row, head = o_m // GROUP, i_kv * GROUP + o_m % GROUP
    valid = row < n_rows
    if ALONE:  # a single query, of which all heads are written
        column = row
        wanted = valid
    else:
        column = tl.load(Columns + row, mask=valid, other=0)
        wanted = valid & (tl.load(Flags + i_b * n_rows + row, mask=valid, other=0) != 0)
    free = wanted
    if SOME:
        free = free & (tl.load(Heads + head, mask=valid, other=0) != 0)

    head_q = i_b.to(tl.int64) * sq_b + head.to(tl.int64) * sq_h + column.to(tl.int64) * sq_n
    m_d = valid[:, None] & (o_d[None, :] < D)
    b_q = tl.load(Q + head_q[:, None] + o_d[None, :], mask=m_d, other=0.0)  # [BM, DP]
    base_k = K + i_b.to(tl.int64) * sk_b + i_kv.to(tl.int64) * sk_h
    base_v = V + i_b.to(tl.int64) * sv_b + i_kv.to(tl.int64) * sv_h
    if MASK > 0:
        p_mask = Mask + i_b.to(tl.int64) * sm_b + head.to(tl.int64) * sm_h
        p_mask += column.to(tl.int64) * sm_n

    begin, end = 0, n_k
    if CAUSAL:
        end = tl.minimum(n_k, tl.max(tl.where(valid, column, 0)) + 1)
    if SPLIT:
        begin = i_s * per_split
        end = tl.minimum(end, begin + per_split)

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    text, image, rest = total, total, total
    sinks, others = acc, acc
    for start in range(begin, end, BN):
        at = start + o_n
        inside = at < end
        m_n = inside[:, None] & (o_d[None, :] < D)
        p_k = base_k + at[:, None].to(tl.int64) * sk_n + o_d[None, :]
        b_k = tl.load(p_k, mask=m_n, other=0.0)  # [BN, DP]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # in units of log 2
        code = tl.load(
            Codes + i_b * sc_b + first + at, mask=inside & (first + at < n_codes), other=0
        )
        if not MOVE:
            raised = (code != 0)[None, :] & free[:, None]
            b_s += tl.where(raised, strength * tl.abs(b_s), 0.0)
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (at[None, :] <= column[:, None])
        if MASK > 0:
            m_m = valid[:, None] & inside[None, :]
            b_m = tl.load(p_mask[:, None] + at[None, :], mask=m_m, other=0)
            if MASK == 1:
                seen = seen & (b_m != 0)
            else:
                b_s += b_m.to(tl.float32) * 1.4426950408889634
        b_s = tl.where(seen, b_s, float("-inf"))
        m_new = tl.maximum(m, tl.max(b_s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key so far
        b_p = tl.exp2(b_s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        m = m_new
        p_v = base_v + at[:, None].to(tl.int64) * sv_n + o_d[None, :]
        b_v = tl.load(p_v, mask=m_n, other=0.0)
        total = total * shrink + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
        if MOVE:
            is_rest = (code == 3)[None, :]
            is_sink = (code == 1)[None, :] | (code == 2)[None, :]
            p_s, p_r = tl.where(is_sink, b_p, 0.0), tl.where(is_rest, b_p, 0.0)
            of_image = tl.sum(tl.where((code == 2)[None, :], b_p, 0.0), 1)
            text = text * shrink + tl.sum(p_s, 1) - of_image
            image = image * shrink + of_image
            rest = rest * shrink + tl.sum(p_r, 1)
            sinks = tl.dot(p_s.to(b_v.dtype), b_v, sinks * shrink[:, None], input_precision="ieee")
            others = tl.dot(
                p_r.to(b_v.dtype), b_v, others * shrink[:, None], input_precision="ieee"
            )

    if SPLIT:
        n_heads = tl.num_programs(1) * GROUP
        part = ((i_b * n_rows + row) * n_heads + head) * n_splits + i_s
        p_part = Parts + part.to(tl.int64) * (3 * DP + 8)
        p_acc = p_part[:, None] + o_d[None, :]
        tl.store(p_acc, acc, mask=valid[:, None])
        tl.store(p_part + 3 * DP, m, mask=valid)
        tl.store(p_part + 3 * DP + 1, total, mask=valid)
        if MOVE:
            tl.store(p_acc + DP, sinks, mask=valid[:, None])
            tl.store(p_acc + 2 * DP, others, mask=valid[:, None])
            tl.store(p_part + 3 * DP + 2, text, mask=valid)
            tl.store(p_part + 3 * DP + 3, image, mask=valid)
            tl.store(p_part + 3 * DP + 4, rest, mask=valid)
    else:
        stored = wanted
        if MOVE:
            b_o, chosen = _finished(
                total, acc, sinks, others, text, image, rest, strength, rho, least, free
            )
            if not ALONE:  # the other rows and heads keep what is there, to the bit
                stored = chosen
        else:
            b_o = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            if not ALONE:
                stored = free
        head_o = i_b.to(tl.int64) * so_b + head.to(tl.int64) * so_h + column.to(tl.int64) * so_n
        p_o = Out + head_o[:, None] + o_d[None, :]
        tl.store(p_o, b_o.to(Out.dtype.element_ty), mask=stored[:, None] & (o_d[None, :] < D))


@triton.jit(
    do_not_specialize=["n_splits"],
    do_not_specialize_on_alignment=["Columns", "Flags", "Heads"],
)
def merge_parts_kernel(
    Parts, Out, Columns, Flags, Heads, strength, rho, least, so_b, so_h, so_n, n_splits,
    MOVE: tl.constexpr, ALONE: tl.constexpr, SOME: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Put the parts of one head's row together."""
    i_h, i_r, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_rows = tl.num_programs(1)
    o_s, o_d = tl.arange(0, BS), tl.arange(0, DP)
    valid = o_s < n_splits
    free = i_h >= 0
    if SOME:
        free = tl.load(Heads + i_h) != 0
    if not ALONE:
        free = free & (tl.load(Flags + i_b * n_rows + i_r) != 0)
    part = ((i_b * n_rows + i_r) * tl.num_programs(0) + i_h) * n_splits + o_s
    p_part = Parts + part.to(tl.int64) * (3 * DP + 8)
    p_acc = p_part[:, None] + o_d[None, :]
    m = tl.load(p_part + 3 * DP, mask=valid, other=float("-inf"))
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight * tl.load(p_part + 3 * DP + 1, mask=valid, other=0.0), 0)
    acc = tl.sum(weight[:, None] * tl.load(p_acc, mask=valid[:, None], other=0.0), 0)
    if MOVE:
        sinks = tl.sum(weight[:, None] * tl.load(p_acc + DP, mask=valid[:, None], other=0.0), 0)
        others = tl.sum(
            weight[:, None] * tl.load(p_acc + 2 * DP, mask=valid[:, None], other=0.0), 0
        )
        text = tl.sum(weight * tl.load(p_part + 3 * DP + 2, mask=valid, other=0.0), 0)
        image = tl.sum(weight * tl.load(p_part + 3 * DP + 3, mask=valid, other=0.0), 0)
        rest = tl.sum(weight * tl.load(p_part + 3 * DP + 4, mask=valid, other=0.0), 0)
        one = tl.zeros([1], tl.float32)
        b_o, chosen = _finished(
            one + total, acc[None, :], sinks[None, :], others[None, :],
            one + text, one + image, one + rest, strength, rho, least, free,
        )  # fmt: skip
        b_o = tl.sum(b_o, 0)
        stored = tl.max(chosen.to(tl.int32), 0) != 0
    else:
        stored = free
        b_o = acc / tl.where(total > 0.0, total, 1.0)
    p_o = Out + i_b.to(tl.int64) * so_b + i_h.to(tl.int64) * so_h + o_d
    end = D
    if not ALONE:
        end = tl.where(stored, D, 0)
        p_o += tl.load(Columns + i_r).to(tl.int64) * so_n
    tl.store(p_o, b_o.to(Out.dtype.element_ty), mask=o_d < end)


INTERPRETED = not isinstance(edited_rows_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported, so that it runs on a CPU."""


def rows_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    steps: tuple[int, ...] | None,
    edit: Edit,
    rows: Rows | None,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
) -> RowsCall | None:
    """Return what computes edited rows of such tensors, None if they do not fit the kernel.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        steps: strides of the output's rows, heads and queries; None if it is contiguous in the
            layout [B, Nq, H, D].
        edit: the edit.
        rows: the queries, None for a single one.
        mask: as of scaled_dot_product_attention.
        scale: factor on the logits, None for 1/sqrt(D).
        causal: whether query i sees the keys up to i only.
    """
    codes = edit.codes
    kind = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), steps, q.dtype, k.dtype,
        v.dtype, q.device, codes.shape, codes.stride(), edit.move, edit.heads is None, scale,
        causal, None if rows is None else rows.columns.shape,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
    )  # fmt: skip
    found = _KNOWN.get(kind)
    if found is None and tensors_fit(q, k, v, mask):
        if len(_KNOWN) >= MOST_KNOWN:  # one more kind at each token
            _KNOWN.clear()
        found = _KNOWN[kind] = RowsCall(q, k, v, steps, edit, rows, mask, scale, causal)
    return found


_KNOWN: dict[Any, RowsCall] = {}


def tensors_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel can take tensors of such types and layouts."""
    if q.dtype not in DTYPES or q.shape[3] > 256 or v.shape[3] != q.shape[3]:
        return False
    if not q.dtype == k.dtype == v.dtype or q.stride(3) + k.stride(3) + v.stride(3) != 3:
        return False
    if mask is None:
        return True
    return mask.ndim == 4 and mask.stride(3) == 1 and mask.shape[3] == k.shape[2]


class RowsCall:
    """The launches for tensors of certain shapes: made once for all layers of a model."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, steps: tuple[int, ...] | None, edit: Edit,
        rows: Rows | None, mask: Tensor | None, scale: float | None, causal: bool,
    ) -> None:  # fmt: skip
        batch, heads, n_q, width = q.shape
        steps = (n_q * heads * width, width, heads * width) if steps is None else steps
        scale = width**-0.5 if scale is None else scale
        n_kv, n_k = k.shape[1], k.shape[2]
        group, codes = heads // n_kv, edit.codes
        n_rows = 1 if rows is None else rows.columns.shape[0]
        padded = max(16, triton.next_power_of_2(width))
        block = 16 if n_rows * group <= 16 else MOST_ROWS
        blocks = triton.cdiv(n_rows * group, block)
        splits = _splits(blocks * n_kv * batch, n_k, rows is not None)
        per_split = 64 * triton.cdiv(n_k, 64 * splits) if splits > 1 else n_k
        splits = triton.cdiv(n_k, per_split)
        shape = (batch, n_rows, heads, splits, 3 * padded + 8)
        self.parts = shape if splits > 1 else None
        which = {"MOVE": edit.move, "ALONE": rows is None}
        alike = {"SOME": edit.heads is not None, "D": width, "DP": padded}
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        types = (q.device, q.dtype, None if mask is None else mask.dtype)
        sizes = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps)
        step = 0 if codes.shape[0] == 1 else codes.stride(0)
        seen = (0, 0, 0) if mask is None else _steps(mask)
        self.attend = Launch(
            edited_rows_kernel,
            (blocks * splits, n_kv, batch),
            types, 5, sizes,
            (
                *seen, step, n_rows, n_k, codes.shape[1], per_split, splits,
                scale * math.log2(math.e),
            ),
            {
                **which, "CAUSAL": causal and n_q > 1, "MASK": kind, "SPLIT": splits > 1,
                "GROUP": group, **alike, "BM": block, "BN": KEYS if padded <= 128 else 32,
            },
            {"num_warps": WARPS},
        )  # fmt: skip
        if splits > 1:
            self.merge = Launch(
                merge_parts_kernel, (heads, n_rows, batch), types, 2, steps, (splits,),
                {**which, **alike, "BS": triton.next_power_of_2(splits)},
            )  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, edit: Edit, rows: Rows | None,
        mask: Tensor | None,
    ) -> None:  # fmt: skip
        """Write the rows into `out`, of the layout that was said."""
        codes, columns, flags = edit.codes, edit.codes, edit.codes
        if rows is not None:
            columns, flags = rows
        # whole numbers would be constants of the compiled kernel
        numbers = edit.first, float(edit.strength), float(edit.rho), float(edit.least)
        heads = codes if edit.heads is None else edit.heads
        last = (columns, flags, codes, heads, codes if mask is None else mask)
        if self.parts is None:
            self.attend((q, k, v, out, out, *last), *numbers)
            return
        parts = torch.empty(self.parts, dtype=torch.float32, device=q.device)
        self.attend((q, k, v, out, parts, *last), *numbers)
        self.merge((parts, out, columns, flags, heads), *numbers[1:])


def _splits(programs: int, n_k: int, prompt: bool) -> int:
    """Return into how many parts the keys are split."""
    most, fewest = MOST_PROGRAMS, FEWEST_KEYS
    if prompt:
        most, fewest = MOST_IN_PROMPT, FEWEST_IN_PROMPT
    return max(1, min(most // programs, n_k // fewest))


def _steps(mask: Tensor) -> list[int]:
    """Return the strides of a mask's rows, heads and queries, 0 where it is broadcast."""
    sizes, steps = mask.shape[:3], mask.stride()[:3]
    return [0 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]
