"""Block-sparse attention forward for Hopper in Gluon: warps with different tasks.

One warp (the producer) walks along the list of a row of blocks and has the copy engine bring
queries, keys and values to shared memory, in a ring of a few blocks. Two groups of four warps
(the consumers) take 64 queries each: while the tensor cores multiply the weights of one block
with its values, the other units make the weights of the next (Shah et al. 2024,
FlashAttention-3, section 3.2). Its ping-pong between the consumers is left out: by barriers in
shared memory it cost more than it gave.

Sequence of the blocks of a row: partial ones, the one that reaches past the sequence, full
ones. Only the full ones are taken without a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 calls it so; before, it was named after where the copy goes
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

__all__ = ["block_sparse_gluon_kernel"]


class _Lists(NamedTuple):
    """The mask: pointers, and strides of the lists' starts."""

    order: Any
    ptr: Any
    idx: Any
    part_ptr: Any
    part_idx: Any
    part_bits: Any
    bits: Any
    stride_b: Any
    stride_h: Any


class _Row(NamedTuple):
    """Where the lists of a row are, and whether a full block reaches past the sequence."""

    begin: Any
    n_full: Any
    ragged: Any
    part_begin: Any
    n_part: Any


class _Sizes(NamedTuple):
    """Heads, query heads of a key head, rows of blocks, queries, keys."""

    heads: Any
    group: Any
    rows: Any
    n_q: Any
    n_k: Any


class _Shared(NamedTuple):
    """Shared memory: queries, the rings of keys and values, the barriers of each."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class _Output(NamedTuple):
    """Pointers to output and log-sum-exp, and strides of the output."""

    out: Any
    lse: Any
    stride_b: Any
    stride_h: Any
    stride_n: Any


class _State(NamedTuple):
    """Of 64 queries so far: weights of the last block, maximum, sum, output."""

    p: Any
    m: Any
    total: Any
    acc: Any


@gluon.jit
def _item(lists, sizes, PARTS: gl.constexpr, BLOCK: gl.constexpr):
    """Return batch entry, head and row of blocks of this program, and where its lists are."""
    item = gl.program_id(0)
    row = gl.load(lists.order + item % sizes.rows)
    b, h = item // sizes.rows // sizes.heads, item // sizes.rows % sizes.heads
    at = b * lists.stride_b + h * lists.stride_h + row
    begin = gl.load(lists.ptr + at)
    n_full = gl.load(lists.ptr + at + 1) - begin
    # the block that reaches past the sequence, if kept, is the last of its sorted list
    last = gl.load(lists.idx + begin + n_full - 1, mask=n_full > 0, other=-1)
    ragged = ((sizes.n_k % BLOCK != 0) & (last == sizes.n_k // BLOCK)).to(gl.int32)
    part_begin, n_part = 0, 0
    if PARTS:
        part_begin = gl.load(lists.part_ptr + at)
        n_part = gl.load(lists.part_ptr + at + 1) - part_begin
    return b, h, row, _Row(begin, n_full, ragged, part_begin, n_part)


@gluon.jit
def _column(i, found, lists, PARTS: gl.constexpr):
    """Return the column of the i-th block of a row, 0 past the last."""
    j = i - found.n_part
    j = gl.where(found.ragged > 0, gl.where(j == 0, found.n_full - 1, j - 1), j)
    column = gl.load(lists.idx + found.begin + j, mask=(j >= 0) & (j < found.n_full), other=0)
    if PARTS:
        own = gl.load(lists.part_idx + found.part_begin + i, mask=i < found.n_part, other=0)
        column = gl.where(i < found.n_part, own, column)
    return column


@gluon.jit
def _copy(desc, b, h, start, full, empty, ring, at, STAGES: gl.constexpr):
    """Bring keys or values to their place in the ring once it is free."""
    stage = at % STAGES
    mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    _load(desc, [b, h, start, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, shared, lists, sizes,
    BLOCK: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries of this program, then keys and values block by block."""
    b, h, row, found = _item(lists, sizes, PARTS, BLOCK)
    mbarrier.expect(shared.q_full.index(0), q_desc.block_type.nbytes * 2)
    for half in gl.static_range(2):
        start = row * BLOCK + half * (BLOCK // 2)
        _load(q_desc, [b, h, start, 0], shared.q_full.index(0), shared.q.index(half))
    kv = h // sizes.group
    # each column is loaded one block ahead: its latency would hold the copies up
    column = _column(0, found, lists, PARTS)
    for i in range(gl.maximum(found.n_full + found.n_part, 1)):  # a row without any takes one
        after = _column(i + 1, found, lists, PARTS)
        start = column * BLOCK
        _copy(k_desc, b, kv, start, shared.k_full, shared.k_empty, shared.k, i, STAGES)
        _copy(v_desc, b, kv, start, shared.v_full, shared.v_empty, shared.v, i, STAGES)
        column = after


@gluon.jit
def _scores(q, shared, at, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the product of queries [64, D] with the keys of a block."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    stage = at % STAGES
    mbarrier.wait(shared.k_full.index(stage), (at // STAGES) & 1)
    keys = shared.k.index(stage).reshape([BLOCK, D]).permute((1, 0))
    zero = gl.zeros([64, BLOCK], gl.float32, layout)
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _values(p, shared, at, acc, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start adding the product of weights [64, BLOCK] with the values of a block."""
    stage = at % STAGES
    mbarrier.wait(shared.v_full.index(stage), (at // STAGES) & 1)
    return warpgroup_mma(p, shared.v.index(stage).reshape([BLOCK, D]), acc, is_async=True)


@gluon.jit
def _mask(s, i, within, found, lists, sizes, PARTS: gl.constexpr, BLOCK: gl.constexpr):
    """Return logits [64, BLOCK] of the i-th block, -inf where the mask keeps nothing."""
    # a row without blocks takes one, and nothing in it
    limit = gl.where(found.n_full + found.n_part > 0, sizes.n_k, 0)
    o_n = gl.arange(0, BLOCK, gl.SliceLayout(0, s.type.layout))
    start = _column(i, found, lists, PARTS) * BLOCK
    allowed = (start + o_n < limit)[None, :]
    if PARTS:
        part = i < found.n_part
        o_m = within + gl.arange(0, 64, gl.SliceLayout(1, s.type.layout))
        tile = gl.load(lists.part_bits + found.part_begin + i, mask=part, other=0).to(gl.int64)
        inside = o_m[:, None] * (BLOCK // 32) + (o_n // 32)[None, :]
        p_word = lists.bits + tile * (BLOCK * BLOCK // 32) + inside
        word = gl.load(p_word, mask=(inside >= 0) & part, other=-1)
        allowed = allowed & (((word >> (o_n % 32)[None, :]) & 1) != 0)
    return gl.where(allowed, s, float("-inf"))


@gluon.jit
def _softmax(s, m, total, c, MASKED: gl.constexpr):
    """Take logits into the running maximum and sum; return weights and the factor on the past."""
    m_new = gl.maximum(m, gl.max(s, 1))
    if MASKED:  # a row may have no key so far: keep -inf - (-inf) out
        m_c = gl.where(m_new == float("-inf"), 0.0, m_new) * c
    else:
        m_c = m_new * c
    weights = gl.exp2(s * c - m_c[:, None])
    shrink = gl.exp2(m * c - m_c)
    return weights, m_new, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _first(
    q, found, c, shared, lists, sizes,
    WG: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Return the state after the weights of the first block are made."""
    layout_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    layout_p: gl.constexpr = gl.DotOperandLayout(0, layout_o, 2)
    m = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout_s))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout_s))
    s = _scores(q, shared, 0, BLOCK, D, STAGES)
    s = warpgroup_mma_wait(0, (s,))
    mbarrier.arrive(shared.k_empty.index(0))
    s = _mask(s, 0, WG * 64, found, lists, sizes, PARTS, BLOCK)
    weights, m, total, _ = _softmax(s, m, total, c, True)
    p = gl.convert_layout(weights.to(q.dtype), layout_p)
    return _State(p, m, total, gl.zeros([64, D], gl.float32, layout_o))


@gluon.jit
def _next(
    q, state, found, i, c, shared, lists, sizes,
    WG: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Multiply the weights of the block before with its values while those of block i are made."""
    now, before = i % STAGES, (i - 1) % STAGES
    s = _scores(q, shared, i, BLOCK, D, STAGES)
    acc_later = _values(state.p, shared, i - 1, state.acc, BLOCK, D, STAGES)
    s = warpgroup_mma_wait(1, (s,))
    mbarrier.arrive(shared.k_empty.index(now))
    if MASKED:
        s = _mask(s, i, WG * 64, found, lists, sizes, PARTS, BLOCK)
    weights, m, total, shrink = _softmax(s, state.m, state.total, c, MASKED)
    # Long since complete. The branch in it keeps the assembler from moving the softmax behind
    # the wait for the values, where nothing would overlap.
    mbarrier.wait(shared.v_full.index(before), ((i - 1) // STAGES) & 1)
    acc, weights = warpgroup_mma_wait(0, (acc_later, weights))
    mbarrier.arrive(shared.v_empty.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    p = gl.convert_layout(weights.to(q.dtype), state.p.type.layout)
    return _State(p, m, total, acc)


@gluon.jit
def _consumer(
    output, shared, lists, sizes, c,
    WG: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute 64 queries of this program."""
    b, h, row, found = _item(lists, sizes, PARTS, BLOCK)
    n = gl.maximum(found.n_full + found.n_part, 1)
    n_masked = gl.maximum(found.n_part + found.ragged, 1)
    mbarrier.wait(shared.q_full.index(0), 0)
    q = shared.q.index(WG).reshape([64, D])
    state = _first(q, found, c, shared, lists, sizes, WG, BLOCK, D, PARTS, STAGES)
    if PARTS:
        for i in range(1, n_masked):
            state = _next(
                q, state, found, i, c, shared, lists, sizes,
                WG, BLOCK, D, PARTS, STAGES, True,
            )  # fmt: skip
    for i in range(n_masked, n):
        state = _next(
            q, state, found, i, c, shared, lists, sizes, WG, BLOCK, D, PARTS, STAGES, False
        )
    acc_later = _values(state.p, shared, n - 1, state.acc, BLOCK, D, STAGES)
    acc = warpgroup_mma_wait(0, (acc_later,))
    _store(output, acc, state.m, state.total, c, b, h, row * BLOCK + WG * 64, sizes, D)


@gluon.jit
def _store(output, acc, m, total, c, b, h, start, sizes, D: gl.constexpr):
    """Write output and log-sum-exp of 64 queries."""
    kept = total > 0.0
    norm = gl.where(kept, total, 1.0)
    lse = gl.where(kept, (m * c + gl.log2(norm)) * 0.6931471805599453, float("-inf"))
    o_lse = start + gl.arange(0, 64, m.type.layout)
    head = (b * sizes.heads + h).to(gl.int64) * sizes.n_q
    gl.store(output.lse + head + o_lse, lse, mask=o_lse < sizes.n_q)
    o_m = start + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    o_d = gl.arange(0, D, gl.SliceLayout(0, acc.type.layout))
    out = acc * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, acc.type.layout))[:, None]
    base = output.out + b.to(gl.int64) * output.stride_b + h.to(gl.int64) * output.stride_h
    p_o = base + o_m[:, None].to(gl.int64) * output.stride_n + o_d[None, :]
    gl.store(p_o, out.to(output.out.dtype.element_ty), mask=o_m[:, None] < sizes.n_q)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """Return one barrier for each stage, complete after COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


_SIZES = ["list_b", "list_h", "n_heads", "group", "rows", "n_q", "n_k"]
"""Arguments of any value: compiled once for all shapes."""


@gluon.jit(do_not_specialize=_SIZES)
def block_sparse_gluon_kernel(
    q_desc, k_desc, v_desc, Out, Lse,
    ListPtr, ListIdx, PartPtr, PartIdx, PartBits, Bits, Order,
    so_b, so_h, so_n, list_b, list_h, n_heads, group, rows, n_q, n_k, c,
    BLOCK: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of one row of blocks of one head."""
    dtype: gl.constexpr = q_desc.dtype
    shared = _Shared(
        gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK // 2, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, D], v_desc.layout),
        _barriers(1, 1),
        _barriers(STAGES, 1), _barriers(STAGES, 2),
        _barriers(STAGES, 1), _barriers(STAGES, 2),
    )  # fmt: skip
    lists = _Lists(Order, ListPtr, ListIdx, PartPtr, PartIdx, PartBits, Bits, list_b, list_h)
    sizes = _Sizes(n_heads, group, rows, n_q, n_k)
    output = _Output(Out, Lse, so_b, so_h, so_n)
    gl.warp_specialize(
        [
            (_consumer, (output, shared, lists, sizes, c, 0, BLOCK, D, PARTS, STAGES)),
            (_consumer, (output, shared, lists, sizes, c, 1, BLOCK, D, PARTS, STAGES)),
            (
                _producer,
                (q_desc, k_desc, v_desc, shared, lists, sizes, BLOCK, PARTS, STAGES),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
