"""Rows of attention with two edits of their weights, each in one pass over the keys.

Keys carry codes: for `RAISE` 1 where they are meant; for `MOVE` 1 text sink, 2 image sink,
3 other image token. With a the logits of a row and A its softmax weights,

    RAISE:  a_j <- a_j + alpha |a_j|    where the code of j is 1,
    MOVE:   A_j <- (1 - p) A_j          at sinks (1, 2),
            A_j <- A_j (1 + p sum_{1,2} A / sum_3 A)  at 3,

the second only where the row reads the image: sum_{2,3} A >= least, sum_3 A >= rho sum_{2,3} A,
and both groups of image tokens are seen. Factors on groups need no second pass: attention
within the groups is kept beside the whole, and put together at the end.

One program takes BM rows of one key head: a row of each query head of the group in turn. A few
rows of long sequences are split over the keys; the program that is done last puts the parts
together, so that an edit is one launch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .again import RowsAgain
from .edit import DTYPES, Edit, Rows
from .launch import MOST_KNOWN, Launch, mask_fits, mask_steps, stream_of
from .spikes import CodesCall

__all__ = ["INTERPRETED", "CodesCall", "RowsCall", "rows_call", "tensors_fit"]

MOST_PROGRAMS, FEWEST_KEYS = 256, 128
"""For rows that fill one program of a key head, as a written token's do: programs are split over
the keys up to so many (about two for each multiprocessor), while each has so many keys."""

MOST_IN_PROMPT, FEWEST_IN_PROMPT = 512, 512
"""The same for more rows of a prompt, where long ones wait for the GPU."""

MOST_SPLITS = 32
"""Most parts of a row's keys: one program puts them together, one after another."""

MOST_ROWS, KEYS, WARPS = 16, 64, 4
"""Rows of a program, keys that it takes at once, and its warps."""

FEW_PROGRAMS, FEW_WARPS = 132, 8
"""To move attention, programs that are not split have more warps if there are few of them: one
for each multiprocessor."""

UNROLL = 4
"""Parts that are read at once."""


@triton.jit
def _finished(total, acc, sinks, others, text, image, rest, p, rho, least, free):
    """Return rows [BM, DP] from attention within groups, and where weights were moved [BM]."""
    whole = tl.where(total > 0.0, total, 1.0)
    seen = image + rest
    chosen = (seen >= least * whole) & (rest >= rho * seen) & (image > 0.0) & (rest > 0.0) & free
    gain = p * (text + image) / tl.where(chosen, rest, 1.0)
    moved = acc - p * sinks + gain[:, None] * others
    return tl.where(chosen[:, None], moved, acc) / whole[:, None], chosen


@triton.jit
def _sum(p_part, at, mine):
    """Return one number of a part [BM]."""
    return tl.load(p_part + at, mask=mine, other=0.0, cache_modifier=".cg")


@triton.jit
def _row(p_part, at, o_d, mine):
    """Return one row of a part [BM, DP]."""
    p_row = p_part[:, None] + at + o_d[None, :]
    return tl.load(p_row, mask=mine[:, None], other=0.0, cache_modifier=".cg")


@triton.jit(
    do_not_specialize=[
        "first", "sm_b", "sm_h", "sm_n", "sc_b", "n_rows", "n_k", "n_codes", "per_split",
        "n_splits",
    ],
    do_not_specialize_on_alignment=["Table", "Codes", "Heads", "Mask"],
)  # fmt: skip
def edited_rows_kernel(
    Q, K, V, Out, Parts, Counts, Table, Codes, Heads, Mask, first, strength, rho, least,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
    sm_b, sm_h, sm_n, sc_b, n_rows, n_k, n_codes, per_split, n_splits, scale,
    MOVE: tl.constexpr, ALONE: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, SOME: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Compute BM rows of a key head; if SPLIT from a part of their keys, and the last merges."""
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
        column = tl.load(Table + row, mask=valid, other=0)
        wanted = valid & (tl.load(Table + (1 + i_b) * n_rows + row, mask=valid, other=0) != 0)
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
    # sums over keys stay one for each place of a block of keys until the end: to add up a row is
    # to wait for the other warps
    total = tl.zeros([BM, BN], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    text, image, rest = total, total, total
    sinks, others = acc, acc
    for start in range(begin, end, BN):
        at = start + o_n
        inside = at < end
        code = tl.load(
            Codes + i_b * sc_b + first + at, mask=inside & (first + at < n_codes), other=0
        )
        m_n = inside[:, None] & (o_d[None, :] < D)
        p_k = base_k + at[:, None].to(tl.int64) * sk_n + o_d[None, :]
        b_k = tl.load(p_k, mask=m_n, other=0.0)  # [BN, DP]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # in units of log 2
        if not MOVE:
            raised = (code == 1)[None, :] & free[:, None]
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
        total = total * shrink[:, None] + b_p
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
        if MOVE:
            is_rest = (code == 3)[None, :]
            is_sink = (code == 1)[None, :] | (code == 2)[None, :]
            p_s, p_r = tl.where(is_sink, b_p, 0.0), tl.where(is_rest, b_p, 0.0)
            p_t = tl.where((code == 1)[None, :], b_p, 0.0)
            p_i = tl.where((code == 2)[None, :], b_p, 0.0)
            text = text * shrink[:, None] + p_t
            image = image * shrink[:, None] + p_i
            rest = rest * shrink[:, None] + p_r
            sinks = tl.dot(p_s.to(b_v.dtype), b_v, sinks * shrink[:, None], input_precision="ieee")
            others = tl.dot(
                p_r.to(b_v.dtype), b_v, others * shrink[:, None], input_precision="ieee"
            )

    total, text, image, rest = tl.sum(total, 1), tl.sum(text, 1), tl.sum(image, 1), tl.sum(rest, 1)
    if SPLIT:
        n_heads = tl.num_programs(1) * GROUP
        part = ((i_b * n_rows + row) * n_heads + head) * n_splits
        p_part = Parts + part.to(tl.int64) * (3 * DP + 8)  # of the first split
        p_mine = p_part + i_s * (3 * DP + 8)
        p_acc = p_mine[:, None] + o_d[None, :]
        tl.store(p_acc, acc, mask=valid[:, None])
        tl.store(p_mine + 3 * DP, m, mask=valid)
        tl.store(p_mine + 3 * DP + 1, total, mask=valid)
        if MOVE:
            tl.store(p_acc + DP, sinks, mask=valid[:, None])
            tl.store(p_acc + 2 * DP, others, mask=valid[:, None])
            tl.store(p_mine + 3 * DP + 2, text, mask=valid)
            tl.store(p_mine + 3 * DP + 3, image, mask=valid)
            tl.store(p_mine + 3 * DP + 4, rest, mask=valid)
        tl.debug_barrier()  # all threads have written before the program says so
        n_blocks = tl.num_programs(0) // n_splits
        p_count = Counts + (i_b * tl.num_programs(1) + i_kv) * n_blocks + i_m
        missing = n_splits - 1 - tl.atomic_add(p_count, 1, sem="acq_rel")
        tl.store(p_count, 0, mask=missing == 0)  # for the next launch
        last = row * 0 + missing == 0  # the same for all rows
        wanted, free, mine = wanted & last, free & last, valid & last
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DP], tl.float32)
        text, image, rest = total, total, total
        sinks, others = acc, acc
        # in the order of the keys, so that the sums do not depend on who came last; past L1,
        # which knows nothing of what other multiprocessors wrote
        for _ in tl.range(0, tl.where(missing == 0, n_splits, 0), loop_unroll_factor=UNROLL):
            m_p = tl.load(p_part + 3 * DP, mask=mine, other=float("-inf"), cache_modifier=".cg")
            m_new = tl.maximum(m, m_p)
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            kept, new = tl.exp2(m - m_safe), tl.exp2(m_p - m_safe)
            m = m_new
            total = total * kept + new * _sum(p_part, 3 * DP + 1, mine)
            acc = acc * kept[:, None] + new[:, None] * _row(p_part, 0, o_d, mine)
            if MOVE:
                text = text * kept + new * _sum(p_part, 3 * DP + 2, mine)
                image = image * kept + new * _sum(p_part, 3 * DP + 3, mine)
                rest = rest * kept + new * _sum(p_part, 3 * DP + 4, mine)
                sinks = sinks * kept[:, None] + new[:, None] * _row(p_part, DP, o_d, mine)
                others = others * kept[:, None] + new[:, None] * _row(p_part, 2 * DP, o_d, mine)
            p_part += 3 * DP + 8

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


INTERPRETED = not isinstance(edited_rows_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported, so that it runs on a CPU."""


def rows_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
        edit: the edit.
        rows: the queries, None for a single one.
        mask: as of scaled_dot_product_attention.
        scale: factor on the logits, None for 1/sqrt(D).
        causal: whether query i sees the keys up to i only.
    """
    codes = edit.codes
    kind = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, codes.shape, codes.stride(), edit.move, edit.heads is None, scale, causal,
        None if rows is None else rows.table.shape,
        None if mask is None else (mask.dtype, mask.shape, mask.stride()),
    )  # fmt: skip
    found = _KNOWN.get(kind)
    if found is None and tensors_fit(q, k, v, mask):
        if len(_KNOWN) >= MOST_KNOWN:  # one more kind at each token
            _KNOWN.clear()
        found = _KNOWN[kind] = RowsCall(q, k, v, edit, rows, mask, scale, causal)
    return found


_KNOWN: dict[Any, RowsCall] = {}


def tensors_fit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel can take tensors of such types and layouts."""
    if q.dtype not in DTYPES or q.shape[3] > 256 or v.shape[3] != q.shape[3]:
        return False
    if not q.dtype == k.dtype == v.dtype or q.stride(3) + k.stride(3) + v.stride(3) != 3:
        return False
    return mask_fits(mask, k.shape[2])


class RowsCall:
    """The launch for tensors of certain shapes: made once for all layers of a model."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, edit: Edit, rows: Rows | None,
        mask: Tensor | None, scale: float | None, causal: bool,
    ) -> None:  # fmt: skip
        batch, heads, n_q, width = q.shape
        steps = n_q * heads * width, width, heads * width
        scale = width**-0.5 if scale is None else scale
        n_kv, n_k = k.shape[1], k.shape[2]
        group, codes = heads // n_kv, edit.codes
        n_rows = 1 if rows is None else rows.table.shape[1]
        padded = max(16, 1 << (width - 1).bit_length())
        block = 16 if n_rows * group <= 16 else MOST_ROWS
        blocks = _parts(n_rows * group, block)
        splits = _splits(blocks * n_kv * batch, n_k, rows is not None and blocks > 1)
        per_split = 64 * _parts(n_k, 64 * splits) if splits > 1 else n_k
        splits = _parts(n_k, per_split)
        size = batch * n_rows * heads * splits * (3 * padded + 8)
        self.parts, self.device = size if splits > 1 else 0, q.device
        few = edit.move and splits == 1 < blocks and blocks * n_kv * batch <= FEW_PROGRAMS
        warps = FEW_WARPS if few else WARPS
        kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
        types = (q.dtype, None if mask is None else mask.dtype)
        sizes = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps)
        step = 0 if codes.shape[0] == 1 else codes.stride(0)
        self.attend = Launch(
            edited_rows_kernel,
            (blocks * splits, n_kv, batch),
            q.device, types, 4, sizes,
            (
                *mask_steps(mask), step, n_rows, n_k, codes.shape[1], per_split, splits,
                scale * math.log2(math.e),
            ),
            {
                "MOVE": edit.move, "ALONE": rows is None, "CAUSAL": causal and n_q > 1,
                "MASK": kind, "SPLIT": splits > 1, "GROUP": group,
                "SOME": edit.heads is not None, "D": width, "DP": padded,
                "BM": block, "BN": KEYS if padded <= 128 else 32, "UNROLL": UNROLL,
            },
            {"num_warps": warps},
        )  # fmt: skip

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, edit: Edit, rows: Rows | None,
        mask: Tensor | None, counts: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the rows into `out` [B, Nq, H, D], contiguous.

        Parts are counted in `counts`; where a CUDA graph is made, nothing that outlives it may
        be made here.
        """
        codes = edit.codes
        table = codes if rows is None else rows.table
        heads = codes if edit.heads is None else edit.heads
        if not self.parts:
            parts, counts = out, out
        elif counts is None:
            parts, counts = _room(self.device, self.parts)
        else:
            parts = out.new_empty(self.parts, dtype=torch.float32)
        self.attend(
            (
                q, k, v, out, parts, counts, table, codes, heads,
                codes if mask is None else mask,
            ),
            *_numbers(edit),
        )  # fmt: skip

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, edit: Edit, rows: Rows | None,
        mask: Tensor | None, scale: float | None, causal: bool, total: int,
    ) -> RowsAgain | None:  # fmt: skip
        """Return what edits the rows of the layers after one that this has edited."""
        table = edit.codes if rows is None else rows.table
        room = (edit.codes, edit.codes)  # not read
        if self.parts:
            room = _room(self.device, self.parts)
        launch = self.attend.again((*room, table), *_numbers(edit))
        if launch is None:
            return None
        return RowsAgain(launch, q, k, v, edit, mask, scale, causal, total)


def _numbers(edit: Edit) -> tuple[float, ...]:
    """Return the numbers of a launch; whole ones would be constants of the compiled kernel."""
    return edit.first, float(edit.strength), float(edit.rho), float(edit.least)


_ROOM: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def _room(device: torch.device, size: int) -> tuple[Tensor, Tensor]:
    """Return room for the parts of a launch, and its programs' counts of those done, all 0.

    Launches of one stream run one after another and leave the counts at 0, so they share it.
    """
    at = device, stream_of(device)
    found = _ROOM.get(at)
    if found is None or found[0].shape[0] < size:
        parts = torch.empty(size, dtype=torch.float32, device=device)
        counts = torch.zeros(MOST_IN_PROMPT, dtype=torch.int32, device=device)
        found = _ROOM[at] = parts, counts
    return found


def _parts(total: int, most: int) -> int:
    """Return into how many parts a total goes; Triton's own takes longer than all else here."""
    return -(-total // most)


def _splits(programs: int, n_k: int, many: bool) -> int:
    """Return into how many parts the keys are split."""
    most, fewest = MOST_PROGRAMS, FEWEST_KEYS
    if many:
        most, fewest = MOST_IN_PROMPT, FEWEST_IN_PROMPT
    return max(1, min(most // programs, n_k // fewest, MOST_SPLITS))
