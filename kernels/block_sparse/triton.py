"""Block-sparse attention forward as a plain Triton kernel, for NVIDIA GPUs from sm80 on.

One program computes BM queries of one head. It walks along the list of its row of blocks: full
blocks without any mask, then the block that reaches past the sequence, then partial blocks
with their bitmaps. Rows start in the order that the mask gives. Every output is written by one
program in a fixed order, so that results are the same bit for bit from run to run.

Within a program the tensor cores wait for the weights, and the other units for the products;
two programs on a multiprocessor fill each other's gaps. Tiles are cut so that two fit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .mask import BlockMask
from .tiles import Tiles, gpu_name, tiles_for

__all__ = ["INTERPRETED", "block_sparse_triton"]


@triton.jit
def _load_tile(
    X, b, h, start, stride_b, stride_h, stride_n, n_tokens,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return keys or values [BN, DP]; zeros past the head dim, and past the tokens if MASKED."""
    if DESCRIPTORS:
        x = X.load([b, h, start, 0]).reshape(BN, DP)
    else:
        o_n = start + tl.arange(0, BN)
        o_d = tl.arange(0, DP)
        base = X + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
        p_x = base + o_n[:, None].to(tl.int64) * stride_n + o_d[None, :]
        if MASKED:
            x = tl.load(p_x, mask=(o_n[:, None] < n_tokens) & (o_d[None, :] < D), other=0.0)
        elif D == DP:
            x = tl.load(p_x)
        else:
            x = tl.load(p_x, mask=o_d[None, :] < D, other=0.0)
    return x


@triton.jit
def _update(b_s, b_v, acc, m, total, scale, MASKED: tl.constexpr):
    """Take products [BM, BN] of queries and keys, and values, into the running softmax.

    The maximum is that of the products, before the scale: scale and difference are then one
    instruction.
    """
    m_new = tl.maximum(m, tl.max(b_s, 1))
    if MASKED:  # a row may have no key so far: keep -inf - (-inf) out
        m_scaled = tl.where(m_new == float("-inf"), 0.0, m_new) * scale
    else:
        m_scaled = m_new * scale
    b_p = tl.exp2(b_s * scale - m_scaled[:, None])
    shrink = tl.exp2(m * scale - m_scaled)
    total = total * shrink + tl.sum(b_p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc, input_precision="ieee")
    return acc, m_new, total


_SIZES = ["list_b", "list_h", "n_heads", "group", "n_q", "n_k"]
"""Arguments of any value: compiled once for all shapes."""


@triton.jit(do_not_specialize=_SIZES)
def block_sparse_fwd_kernel(
    Q, K, V, Out, Lse, ListPtr, ListIdx, PartPtr, PartIdx, PartBits, Bits, Order,
    sq_b, sq_h, sq_n, sk_b, sk_h, sk_n, sv_b, sv_h, sv_n, so_b, so_h, so_n,
    list_b, list_h, n_heads, group, n_q, n_k, scale,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of BM queries of one head; scale is in units of log 2."""
    SUB: tl.constexpr = BLOCK // BN
    i_m, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_kv = i_h // group
    row = tl.load(Order + i_m // (BLOCK // BM))
    within = (i_m % (BLOCK // BM)) * BM
    o_m = row * BLOCK + within + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, DP)

    head = i_b.to(tl.int64) * sq_b + i_h.to(tl.int64) * sq_h
    m_q = (o_m[:, None] < n_q) & (o_d[None, :] < D)
    p_q = Q + head + o_m[:, None].to(tl.int64) * sq_n + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [BM, DP]

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)

    at = i_b * list_b + i_h * list_h + row
    begin, end = tl.load(ListPtr + at), tl.load(ListPtr + at + 1)
    # the block that reaches past the sequence, if kept, is the last of its sorted list
    last = tl.load(ListIdx + end - 1, mask=end > begin, other=-1)
    ragged = (n_k % BLOCK != 0) & (last == n_k // BLOCK)
    whole = end - ragged.to(tl.int32)

    for i in tl.range(0, (whole - begin) * SUB, num_stages=STAGES):
        start = tl.load(ListIdx + begin + i // SUB) * BLOCK + (i % SUB) * BN
        b_k = _load_tile(K, i_b, i_kv, start, sk_b, sk_h, sk_n, n_k, BN, D, DP, DESCRIPTORS, False)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_v = _load_tile(V, i_b, i_kv, start, sv_b, sv_h, sv_n, n_k, BN, D, DP, DESCRIPTORS, False)
        acc, m, total = _update(b_s, b_v, acc, m, total, scale, False)

    for i in range(0, (end - whole) * SUB):
        start = last * BLOCK + i * BN
        b_k = _load_tile(K, i_b, i_kv, start, sk_b, sk_h, sk_n, n_k, BN, D, DP, DESCRIPTORS, True)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = tl.where((start + o_n < n_k)[None, :], b_s, float("-inf"))
        b_v = _load_tile(V, i_b, i_kv, start, sv_b, sv_h, sv_n, n_k, BN, D, DP, DESCRIPTORS, True)
        acc, m, total = _update(b_s, b_v, acc, m, total, scale, True)

    if PARTS:
        begin, end = tl.load(PartPtr + at), tl.load(PartPtr + at + 1)
        for i in range(0, (end - begin) * SUB):
            entry = begin + i // SUB
            column = (i % SUB) * BN
            start = tl.load(PartIdx + entry) * BLOCK + column
            b_k = _load_tile(
                K, i_b, i_kv, start, sk_b, sk_h, sk_n, n_k, BN, D, DP, DESCRIPTORS, True
            )
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            tile = tl.load(PartBits + entry).to(tl.int64) * (BLOCK * BLOCK // 32)
            o_row = within + tl.arange(0, BM)
            o_word = column // 32 + tl.arange(0, BN // 32)
            words = tl.load(Bits + tile + o_row[:, None] * (BLOCK // 32) + o_word[None, :])
            words = tl.broadcast_to(words[:, :, None], BM, BN // 32, 32).reshape(BM, BN)
            allowed = ((words >> (o_n % 32)[None, :]) & 1) != 0
            b_s = tl.where(allowed & (start + o_n < n_k)[None, :], b_s, float("-inf"))
            b_v = _load_tile(
                V, i_b, i_kv, start, sv_b, sv_h, sv_n, n_k, BN, D, DP, DESCRIPTORS, True
            )
            acc, m, total = _update(b_s, b_v, acc, m, total, scale, True)

    kept = total > 0.0
    norm = tl.where(kept, total, 1.0)
    b_o = acc / norm[:, None]
    lse = tl.where(kept, (m * scale + tl.log2(norm)) * 0.6931471805599453, float("-inf"))
    head_out = i_b.to(tl.int64) * so_b + i_h.to(tl.int64) * so_h
    p_o = Out + head_out + o_m[:, None].to(tl.int64) * so_n + o_d[None, :]
    tl.store(p_o, b_o.to(Out.dtype.element_ty), mask=m_q)
    p_lse = Lse + (i_b.to(tl.int64) * n_heads + i_h) * n_q + o_m
    tl.store(p_lse, lse, mask=o_m < n_q)


INTERPRETED = not isinstance(block_sparse_fwd_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set when this file was imported, so that it runs on a CPU."""


def block_sparse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and LSE; arguments and results as in `block_sparse_reference`.

    Args:
        q: [B, H, Nq, D], any strides.
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, D].
        mask: kept blocks, on the device of q.
        scale: factor on the logits.
        tiles: how to cut the work, None for what suits the GPU.
    """
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    batch, heads, n_q, width = q.shape
    padded = max(16, triton.next_power_of_2(width))
    tiles = tiles or tiles_for(padded, mask.block, q.dtype, gpu_name(q.device))
    if not (_describable(k) and _describable(v)):
        tiles = tiles._replace(descriptors=False)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n_q, dtype=torch.float32, device=q.device)
    ptr = mask.lists.ptr
    list_b = 0 if ptr.shape[0] == 1 else ptr.stride(0)
    list_h = 0 if ptr.shape[1] == 1 else ptr.stride(1)
    block_sparse_fwd_kernel[(mask.rows * (mask.block // tiles.m), heads, batch)](
        q, *_tiled(k, v, tiles, padded), out, lse,
        ptr, mask.lists.idx, mask.parts.ptr, mask.parts.idx, mask.part_bits, mask.bits,
        mask.order,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        list_b, list_h, heads, heads // k.shape[1], n_q, k.shape[2], scale * math.log2(math.e),
        BLOCK=mask.block, BM=tiles.m, BN=tiles.n, D=width, DP=padded,
        DESCRIPTORS=tiles.descriptors, PARTS=len(mask.parts.idx) > 0, STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    return out, lse


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can be made: addresses in steps of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in x.stride()[:3])


def _tiled(k: Tensor, v: Tensor, tiles: Tiles, padded: int) -> tuple[Any, Any]:
    """Return keys and values as the kernel loads them."""
    if not tiles.descriptors:
        return k, v
    shape = [1, 1, tiles.n, padded]
    one, two = (TensorDescriptor(x, list(x.shape), list(x.stride()), shape) for x in (k, v))
    return one, two
