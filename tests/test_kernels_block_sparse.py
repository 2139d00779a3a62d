"""Block masks and block-sparse attention, against explicit float64 maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnctl.kernels import BlockMask, block_sparse_attention, block_sparse_backend
from attnctl.kernels.block_sparse import api, reference
from attnctl.kernels.block_sparse.lists import RowLists
from attnctl.testing.blocks import exact, poisoned, random_blocks, random_map
from attnctl.testing.calls import tensors

torch.set_num_threads(1)


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 20 + 10 * h


# -- the mask --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("nq,nk", [(1, 1), (64, 128), (65, 127), (150, 90)])
def test_dense_maps_come_back(nq, nk, lead, block):
    want = random_map(nq, nk, *lead)
    mask = BlockMask.from_dense(want, block)
    assert torch.equal(mask.dense(), want[(None,) * (4 - want.ndim)])
    grid = mask.blocks()
    assert mask.num_blocks == int(grid.sum()) and mask.density == float(grid.double().mean())
    assert (mask.batch, mask.heads) == ((1,) * (2 - len(lead)) + lead)
    again = BlockMask.from_flex(mask.to_flex())
    assert torch.equal(again.dense(), mask.dense())
    assert all(
        torch.equal(getattr(again.lists, n), getattr(mask.lists, n)) for n in ("ptr", "idx")
    )


def test_a_rule_is_evaluated_per_head_and_equals_flex():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = BlockMask.from_rule(window, 150, 130, 32, heads=2)
    q, k = torch.arange(150)[:, None], torch.arange(130)
    want = torch.stack([(q - k).abs() <= 20 + 10 * h for h in range(2)])[None]
    assert torch.equal(mask.dense(), want)
    theirs = create_block_mask(window, 1, 2, 150, 130, device="cpu", BLOCK_SIZE=32)
    assert torch.equal(BlockMask.from_flex(theirs).dense(), want)
    with pytest.raises(ValueError, match=r"rule returned torch\.int64"):
        BlockMask.from_rule(lambda b, h, q, k: q - k, 64, 64, 32)


def test_equal_partial_blocks_share_a_bitmap():
    mask = BlockMask.from_rule(lambda b, h, q, k: (q - k).abs() <= 40, 640, 640, 32)
    assert len(mask.parts.idx) > 60 and len(mask.bits) == 4


def test_blocks_without_partial_ones_and_rows_ordered_by_length():
    keep = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]]).bool()
    mask = BlockMask.of_blocks(keep, 100, 70, 32)
    assert mask.lists.ptr.tolist() == [[[0, 1, 4, 4, 6]]]
    assert mask.lists.idx.tolist() == [0, 0, 1, 2, 1, 2]
    assert mask.order.tolist() == [1, 3, 0, 2]
    assert torch.equal(mask.blocks()[0, 0], keep) and mask.num_blocks == 6
    assert str(mask) == (
        "100 x 70 tokens in 4 x 3 blocks of 32, 6 kept (0 partial), density 0.5000"
    )
    assert BlockMask.full(100, 70).density == 1


@pytest.mark.parametrize(
    "ptr,idx,message",
    [
        ([0, 2, 1], [0], "rise from 0"),
        ([0, 1, 3], [0, 1], "rise from 0 to the 2 entries"),
        ([1, 1, 2], [0, 1], "rise from 0"),
        ([0, 1], [0], "2 entries a head, expected one more than the 2 rows"),
        ([0, 1, 2], [0, 2], "runs from 0 to 2, expected 0 to 1"),
        ([0, 0, 2], [1, 0], "rise within each row"),
        ([0, 0, 2], [1, 1], "rise within each row"),
    ],
)
def test_wrong_lists_are_refused(ptr, idx, message):
    lists = RowLists(torch.tensor([[ptr]]).int(), torch.tensor(idx).int())
    with pytest.raises(ValueError, match=message):
        BlockMask.of_lists(lists, 64, 64, 32)


def test_other_wrong_masks_are_refused():
    with pytest.raises(ValueError, match=r"torch\.float32 with 2 dimensions"):
        BlockMask.of_blocks(torch.ones(2, 2), 64, 64, 32)
    with pytest.raises(ValueError, match="make 3 x 2"):
        BlockMask.of_blocks(torch.ones(2, 2).bool(), 65, 64, 32)
    with pytest.raises(ValueError, match="block=48"):
        BlockMask.full(64, 64, 48)
    whole = BlockMask.full(64, 64, 32)
    partial = BlockMask.from_dense(torch.eye(64).bool(), 32)
    twice = BlockMask(64, 64, 32, whole.lists, partial.parts, partial.part_bits, partial.bits)
    with pytest.raises(ValueError, match=r"\[0, 0, 0, 0\] is both full and partial"):
        twice.check()
    lacking = BlockMask(
        64, 64, 32, partial.lists, partial.parts, partial.part_bits + 9, whole.bits
    )
    with pytest.raises(ValueError, match="bitmap that is not among"):
        lacking.check()
    for order in (torch.tensor([0, 0]).int(), torch.tensor([1, 0]), torch.tensor([0]).int()):
        with pytest.raises(ValueError, match="each of the 2 rows once"):
            BlockMask.of_lists(whole.lists, 64, 64, 32, order=order)


def test_the_order_of_rows_goes_with_the_mask():
    keep = torch.ones(1, 2, 3, 3).bool()
    order = torch.tensor([1, 2, 0]).int()
    mask = BlockMask.of_lists(RowLists.of(keep), 96, 96, 32, order=order)
    assert torch.equal(mask.take_heads(slice(0, 1)).order, order)
    assert mask.to("meta").order.shape == (3,)


def test_the_picture_shows_every_block():
    pytest.importorskip("PIL")
    mask = BlockMask.from_rule(window, 96, 96, 32, heads=2)
    image = mask.picture(cell=5)
    assert image.size == (2 * 15 + 5, 15)
    colours = {image.getpixel((5 * c + 2, 2)) for c in range(3)}
    assert len(colours) == 2  # partial and empty
    assert BlockMask.full(64 * 512, 64 * 512, 64).picture().size == (512, 512)


# -- attention -------------------------------------------------------------------------------


CASES = {
    "square": (64, 64, 2, 2),
    "odd": (75, 131, 4, 2),
    "short": (5, 97, 3, 1),
    "one": (1, 1, 1, 1),
}


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["blocks", "partial", "heads", "all"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_lse_match_the_explicit_map(case, kind, dtype, backend):
    nq, nk, heads, kv_heads = CASES[case]
    mask = {
        "blocks": lambda: random_blocks(nq, nk, 32),
        "partial": lambda: BlockMask.from_dense(random_map(nq, nk), 32),
        "heads": lambda: BlockMask.from_dense(random_map(nq, nk, 2, heads), 32),
        "all": lambda: BlockMask.full(nq, nk, 32),
    }[kind]()
    q, k, v = tensors(2, heads, nq, 16, keys=nk, kv_heads=kv_heads, dtype=dtype)
    with poisoned():
        got = block_sparse_attention(q, k, v, mask, scale=0.3, return_lse=True, backend=backend)
    atol = 1e-12 if dtype == torch.float64 else 5e-6
    for mine, theirs in zip(got, exact(q, k, v, mask, 0.3), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=atol, rtol=0)
    empty = ~mask.dense().any(-1).expand(2, heads, nq)
    assert (got[0][empty] == 0).all() and (got[1][empty] == -torch.inf).all()
    assert got[0].dtype == dtype and got[1].dtype == dtype


def test_layouts_strides_and_other_value_widths():
    q, k, v = tensors(2, 4, 70, 16, kv_heads=2, keys=90)
    mask = BlockMask.from_dense(random_map(70, 90), 32)
    want = block_sparse_attention(q, k, v, mask)
    last = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    got = block_sparse_attention(*last, mask, layout="bnhd")
    assert got.shape == (2, 70, 4, 16) and got.is_contiguous()
    torch.testing.assert_close(got.transpose(1, 2), want, atol=1e-12, rtol=0)
    narrow = block_sparse_attention(q, k, v[..., :5], mask)
    torch.testing.assert_close(narrow, want[..., :5], atol=1e-12, rtol=0)


@pytest.mark.parametrize("most", [1, 5000])
def test_chunks_do_not_change_the_result(most, monkeypatch):
    q, k, v = tensors(2, 2, 75, 8)
    mask = BlockMask.from_dense(random_map(75, 75), 32)
    want = block_sparse_attention(q, k, v, mask)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", most)
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask), want, atol=1e-14, rtol=0)


def test_gradients_are_those_of_the_explicit_map():
    mask = BlockMask.from_dense(random_map(40, 70), 32)
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 40, 4, keys=70, kv_heads=1))

    def run(*x: Tensor) -> Tensor:
        out, lse = block_sparse_attention(*x, mask, return_lse=True)
        return out.sum(-1) + lse.masked_fill(lse.isinf(), 0.0)

    def dense(*x: Tensor) -> Tensor:
        out, lse = exact(*x, mask)
        return out.sum(-1) + lse.masked_fill(lse.isinf(), 0.0)

    weights = torch.rand(1, 2, 40, dtype=torch.float64)
    got = torch.autograd.grad((run(q, k, v) * weights).sum(), (q, k, v))
    rows = ~mask.dense().any(-1)[0, 0]
    want = torch.autograd.grad((dense(q, k, v) * weights).masked_fill(rows, 0).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), atol=1e-10, rtol=0)


def test_the_operator_is_sound_and_compiles_without_a_break():
    mask = BlockMask.from_dense(random_map(40, 70), 32)
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 40, 4, keys=70))
    lists = (mask.lists.ptr, mask.lists.idx, mask.parts.ptr, mask.parts.idx)
    args = (q, k, v, *lists, mask.part_bits, mask.bits, mask.order, 32, 0.5, "reference")
    torch.library.opcheck(torch.ops.attnctl.block_sparse_attention.default, args)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q * 2, k, v, mask) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), step(q, k, v))


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(2, 4, 64, 16, kv_heads=2)
    mask = BlockMask.full(64, 64, 32)
    wrong = [
        ((q, k[:, :, :5], v, mask), {}, "expected q"),
        ((q[0], k, v, mask), {}, "four dimensions"),
        ((q, k.float(), v, mask), {}, "one dtype"),
        ((q, k, v, BlockMask.full(64, 96, 32)), {}, "64 queries and 96 keys, got 64 and 64"),
        ((q, k, v, random_blocks(64, 64, 32, 3)), {}, "3 heads, expected 1 or 2, and 1 or 4"),
        ((q, k, v, mask), {"layout": "nbhd"}, "expected 'bhnd' or 'bnhd'"),
        ((q, k, v, mask), {"backend": "fast"}, "expected auto, gluon, triton, flex, fa4, ref"),
        ((q, k, v, mask), {"backend": "triton"}, "'triton' cannot run here"),
        ((q, k, v, mask), {"backend": "gluon"}, "'gluon' cannot run here: it needs a CUDA"),
        ((q, k, v, mask), {"backend": "fa4"}, "'fa4' cannot run here: flash_attn.cute cannot"),
    ]
    for args, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*args, **options)


def test_auto_says_what_it_takes(monkeypatch):
    q, k, v = tensors(1, 2, 64, 16, dtype=torch.float32)
    mask = BlockMask.full(64, 64, 32)
    assert block_sparse_backend(q, k, v, mask) == "reference"
    assert block_sparse_backend(q, k, v, mask, "flex") == "flex"
    monkeypatch.setattr(api.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        block_sparse_backend(q, k, v, mask, "triton")
