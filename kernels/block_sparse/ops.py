"""The operator behind block-sparse attention: opaque to torch.compile, with a gradient.

Its schema needs torch alone, so that the first call may happen while torch.compile traces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gradient import block_sparse_gradient
from .lists import RowLists
from .mask import BlockMask
from .reference import block_sparse_reference

__all__ = ["call"]


@torch.library.custom_op("attnctl::block_sparse_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    part_ptr: Tensor,
    part_idx: Tensor,
    part_bits: Tensor,
    bits: Tensor,
    order: Tensor,
    block: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = BlockMask(
        q.shape[2], k.shape[2], block,
        RowLists(list_ptr, list_idx), RowLists(part_ptr, part_idx), part_bits, bits, order,
    )  # fmt: skip
    with torch.cuda.device_of(q):  # a kernel starts on the current GPU, wherever its tensors are
        return _run(q, k, v, mask, scale, backend)


def _run(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "gluon":
        from .gluon import block_sparse_gluon

        return block_sparse_gluon(q, k, v, mask, scale)
    if backend == "triton":
        from .triton import block_sparse_triton

        return block_sparse_triton(q, k, v, mask, scale)
    if backend == "fa4":
        from .fa4 import block_sparse_fa4

        return block_sparse_fa4(q, k, v, mask, scale)
    out, lse = _out(q, v), _lse(q)
    result = block_sparse_reference(q, k, v, mask, scale)
    out.copy_(result[0])
    lse.copy_(result[1])
    return out, lse


def _out(q: Tensor, v: Tensor) -> Tensor:
    """Return an output in the layout of q, as the model's own attention would have it."""
    same = v.shape[-1] == q.shape[-1]
    return torch.empty_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))


def _lse(q: Tensor) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty(q.shape[:-1], dtype=wide, device=q.device)


@_operator.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _out(q, v), _lse(q)


@torch.library.custom_op("attnctl::block_sparse_attention_backward", mutates_args=())
def _gradient(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    list_ptr: Tensor,
    list_idx: Tensor,
    part_ptr: Tensor,
    part_idx: Tensor,
    part_bits: Tensor,
    bits: Tensor,
    order: Tensor,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = BlockMask(
        q.shape[2], k.shape[2], block,
        RowLists(list_ptr, list_idx), RowLists(part_ptr, part_idx), part_bits, bits, order,
    )  # fmt: skip
    return block_sparse_gradient(grad_out, grad_lse, q, k, v, mask, scale)


@_gradient.register_fake
def _fake_gradient(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.block, ctx.scale = inputs[10], inputs[11]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    gradient = torch.ops.attnctl.block_sparse_attention_backward
    grads = gradient(grad_out, grad_lse, *ctx.saved_tensors, ctx.block, ctx.scale)
    return (*grads, *[None] * 10)


_operator.register_autograd(_backward, setup_context=_setup)


def call(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Run a backend (any but "flex") as one operator; layout [B, H, N, D]."""
    assert mask.order is not None
    out, lse = torch.ops.attnctl.block_sparse_attention(
        q, k, v,
        mask.lists.ptr, mask.lists.idx, mask.parts.ptr, mask.parts.idx, mask.part_bits, mask.bits,
        mask.order, mask.block, scale, backend,
    )  # fmt: skip
    return out, lse
