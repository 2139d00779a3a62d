"""The Triton kernel, run by Triton's interpreter on the CPU, against explicit float64 maps.

The interpreter must be asked for before triton is imported, so these tests run in a process of
their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnctl.kernels import BlockMask, block_sparse_attention
from attnctl.kernels.block_sparse import ops
from attnctl.kernels.block_sparse.tiles import Tiles
from attnctl.testing.alone import INTERPRETED as INSIDE
from attnctl.testing.alone import run_alone, set_up_interpreter
from attnctl.testing.blocks import exact, poisoned, random_blocks, random_map
from attnctl.testing.calls import tensors

pytest.importorskip("triton")
torch.set_num_threads(1)
inside = pytest.mark.skipif(not INSIDE, reason="run by test_in_the_interpreter")

if INSIDE:
    from attnctl.kernels.block_sparse import triton as kernel

    set_up_interpreter()


@pytest.mark.skipif(INSIDE, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_alone(__file__, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    atol = {torch.float32: 5e-6, torch.float16: 2e-3}[dtype]
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=atol, rtol=0)


@inside
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "nq,nk,width,block,heads,kv_heads",
    [(64, 64, 64, 32, 2, 2), (75, 131, 128, 64, 2, 1), (33, 97, 96, 32, 3, 1),
     (1, 65, 32, 32, 1, 1), (40, 70, 256, 64, 1, 1), (130, 257, 64, 128, 1, 1)],
)  # fmt: skip
def test_equals_the_explicit_map(nq, nk, width, block, heads, kv_heads, dtype, descriptors):
    q, k, v = tensors(2, heads, nq, width, keys=nk, kv_heads=kv_heads, dtype=dtype, sharp=1.0)
    tiles = Tiles(min(64, block), 32, 4, 2, descriptors)
    for mask in (random_blocks(nq, nk, block), BlockMask.from_dense(random_map(nq, nk), block)):
        with poisoned():
            got = kernel.block_sparse_triton(q, k, v, mask, width**-0.5, tiles)
        close(got, exact(q, k, v, mask), dtype)
        empty = ~mask.dense().any(-1).expand(2, heads, nq)
        assert (got[0][empty] == 0).all() and (got[1][empty] == -torch.inf).all()


@inside
def test_own_lists_for_each_head_and_both_layouts():
    q, k, v = tensors(2, 2, 70, 32, keys=100, kv_heads=1, dtype=torch.float32)
    mask = BlockMask.from_dense(random_map(70, 100, 2, 2), 32)
    last = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    with poisoned():
        out, lse = block_sparse_attention(
            *last, mask, layout="bnhd", return_lse=True, backend="triton"
        )
    assert out.is_contiguous()
    close((out.transpose(1, 2), lse), exact(q, k, v, mask), torch.float32)
    assert torch.equal(out, block_sparse_attention(*last, mask, layout="bnhd", backend="triton"))


@inside
@pytest.mark.parametrize("scale", [0.0, -0.2, 0.7])
def test_any_scale(scale):
    q, k, v = tensors(1, 2, 70, 32, keys=100, kv_heads=1, dtype=torch.float32)
    mask = BlockMask.from_dense(random_map(70, 100), 32)
    close(
        kernel.block_sparse_triton(q, k, v, mask, scale),
        exact(q, k, v, mask, scale),
        torch.float32,
    )


@inside
def test_odd_strides_are_loaded_without_descriptors():
    wide = tensors(1, 1, 64, 35, dtype=torch.float32)
    q, k, v = (x[..., 1:33] for x in wide)
    mask = random_blocks(64, 64, 32)
    tiles = Tiles(32, 32, 4, 2, True)
    got = kernel.block_sparse_triton(q, k, v, mask, 32**-0.5, tiles)
    close(got, exact(q, k, v, mask), torch.float32)


@inside
def test_the_gradient_is_that_of_the_reference():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 40, 16, dtype=torch.float32))
    mask = BlockMask.from_dense(random_map(40, 40), 32)
    grads = [
        torch.autograd.grad(ops.call(q, k, v, mask, 0.25, name)[0].square().sum(), (q, k, v))
        for name in ("triton", "reference")
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@inside
def test_what_it_cannot_do_is_refused():
    mask = BlockMask.full(64, 64, 32)
    q, k, v = tensors(1, 1, 64, 16)
    with pytest.raises(ValueError, match=r"float16, bfloat16 or float32, got torch\.float64"):
        block_sparse_attention(q, k, v, mask, backend="triton")
    q, k, v = (x.float() for x in (q, k, v))
    with pytest.raises(ValueError, match="got 16 and 8"):
        block_sparse_attention(q, k, v[..., :8], mask, backend="triton")
