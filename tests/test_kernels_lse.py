"""Attention with log-sum-exp, and merging it, against explicit float64 maps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnctl.kernels import attention_with_lse, merge_attention
from attnctl.kernels.lse.reference import logit_chunks, query_chunks
from attnctl.testing import oracles
from attnctl.testing.calls import tensors

torch.set_num_threads(1)
SIZES = [(1, 1), (5, 7), (63, 111), (111, 63), (1, 35), (35, 1)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def masks(nq: int, nk: int, batch: int, heads: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    dense = torch.rand(batch, heads, nq, nk, generator=generator) < 0.6
    keys = torch.rand(batch, 1, 1, nk, generator=generator) < 0.7
    added = torch.randn(batch, heads, nq, nk, generator=generator, dtype=torch.float64)
    return {
        "none": None,
        "keys": keys,
        "dense": dense,
        "square": dense[0, 0],
        "row": keys[0, 0, 0],
        "float": torch.where(dense[:, :1], added[:, :1].float(), -torch.inf),
        "double": added,
    }


KINDS = list(masks(1, 1, 1, 1))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("nq,nk", SIZES)
def test_output_and_lse_match_the_explicit_map(nq, nk, dtype, kind):
    q, k, v = tensors(2, 3, nq, 8, keys=nk, dtype=dtype)
    mask = masks(nq, nk, 2, 3)[kind]
    if mask is not None and kind == "double" and dtype == torch.float32:
        mask = mask.float().double()
    out, lse = attention_with_lse(q, k, v, mask)
    z = oracles.logits(q, k, mask)
    assert out.dtype == dtype and lse.dtype == dtype
    close(out, oracles.apply_map(oracles.softmax(z), v), dtype)
    finite = oracles.lse(z).isfinite()
    assert torch.equal(lse.isfinite(), finite)
    torch.testing.assert_close(
        lse.double()[finite], oracles.lse(z)[finite], atol=10 * TOLERANCE[dtype], rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nq,nk", SIZES)
def test_half_precision_inputs_are_computed_in_float32(nq, nk, dtype):
    q, k, v = tensors(1, 2, nq, 8, keys=nk, dtype=dtype)
    out, lse = attention_with_lse(q, k, v)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, oracles.apply_map(oracles.softmax_map(q, k), v), dtype)
    torch.testing.assert_close(lse.double(), oracles.lse(oracles.logits(q, k)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("most", [1, 40, 1 << 24])
def test_chunks_cover_the_queries_once(most):
    q, k, _ = tensors(2, 3, 63, 8, keys=7)
    slices = list(query_chunks(q, 7, most))
    assert torch.cat([torch.arange(63)[s] for s in slices]).tolist() == list(range(63))
    assert all((s.stop - s.start) * 2 * 3 * 7 <= max(most, 42) for s in slices)
    mask = torch.rand(2, 1, 63, 7) < 0.5
    whole = torch.cat(list(logit_chunks(q, k, mask, 0.3, most)), dim=2)
    torch.testing.assert_close(whole, oracles.logits(q, k, mask, 0.3), atol=1e-12, rtol=0)


def test_chunked_attention_equals_the_whole(monkeypatch):
    from attnctl.kernels.lse import reference

    q, k, v = tensors(2, 3, 63, 8, keys=21, dtype=torch.float32)
    mask = torch.rand(2, 1, 63, 21) < 0.8
    whole = attention_with_lse(q, k, v, mask)
    monkeypatch.setattr(
        reference.logit_chunks, "__defaults__", (None, None, 2 * 3 * 21 * 5), raising=True
    )
    for a, b in zip(whole, attention_with_lse(q, k, v, mask), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_scale_replaces_the_default():
    q, k, v = tensors(1, 2, 9, 8)
    out, _ = attention_with_lse(q, k, v, scale=0.05)
    close(out, oracles.apply_map(oracles.softmax_map(q, k, scale=0.05), v), torch.float64)


def test_no_queries_and_no_keys():
    q, k, v = tensors(1, 2, 4, 8, keys=3)
    out, lse = attention_with_lse(q[:, :, :0], k, v)
    assert out.shape == (1, 2, 0, 8) and lse.shape == (1, 2, 0)
    out, lse = attention_with_lse(q, k[:, :, :0], v[:, :, :0])
    assert torch.equal(out, torch.zeros(1, 2, 4, 8).double()) and (lse == -torch.inf).all()


@pytest.mark.parametrize("mask", ["bool", "float", "lowest"])
def test_a_row_without_keys_gives_zero_and_minus_infinity(mask):
    q, k, v = tensors(1, 1, 3, 8, keys=4, dtype=torch.float32)
    allowed = torch.ones(3, 4, dtype=torch.bool)
    allowed[1] = False
    blocked = -torch.inf if mask == "float" else torch.finfo(torch.float64).min
    given = (
        allowed if mask == "bool" else torch.zeros(3, 4).double().masked_fill(~allowed, blocked)
    )
    out, lse = attention_with_lse(q, k, v, given)
    assert (out[0, 0, 1] == 0).all() and lse[0, 0, 1] == -torch.inf
    assert out.isfinite().all() and lse[0, 0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e5])
def test_huge_logits_do_not_overflow(scale):
    q, k, v = tensors(1, 2, 7, 8, keys=9, dtype=torch.float32)
    out, lse = attention_with_lse(q, k, v, scale=scale)
    assert out.isfinite().all() and lse.isfinite().all()
    z = oracles.logits(q, k, scale=scale)
    assert (lse.double() - oracles.lse(z)).abs().max() < 1e-6 * z.abs().max()


# -- merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(0, 4, 21), (0, 1, 2, 21), (0, 21, 21), (0, 0, 10, 20, 21)])
def test_merging_groups_equals_attention_over_the_union(cuts, dtype):
    q, k, v = tensors(2, 3, 9, 8, keys=21, dtype=dtype)
    parts = [attention_with_lse(q, k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise(cuts)]
    out, lse = merge_attention(*zip(*parts, strict=True))
    z = oracles.logits(q, k)
    close(out, oracles.apply_map(oracles.softmax(z), v), dtype)
    torch.testing.assert_close(
        lse.double(), oracles.lse(z), atol=1e-12 if dtype is torch.float64 else 1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_with_masks_and_rows_empty_in_some_or_all_groups(dtype):
    q, k, v = tensors(1, 2, 4, 8, keys=6, dtype=dtype)
    mask = torch.tensor(
        [[1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    ).bool()
    parts = [
        attention_with_lse(q, k[:, :, s], v[:, :, s], mask[:, s])
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert (parts[0][1][:, :, 1] == -torch.inf).all() and (parts[1][0][:, :, 2] == 0).all()
    out, lse = merge_attention(*zip(*parts, strict=True))
    close(out, oracles.apply_map(oracles.softmax_map(q, k, mask), v), dtype)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()


def test_merging_one_group_changes_nothing():
    q, k, v = tensors(1, 2, 5, 8, dtype=torch.float32)
    out, lse = attention_with_lse(q, k, v)
    again = merge_attention([out], [lse])
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_merging_does_not_depend_on_the_order():
    q, k, v = tensors(1, 2, 5, 8, keys=12)
    parts = [attention_with_lse(q, k[:, :, i::3], v[:, :, i::3]) for i in range(3)]
    there = merge_attention(*zip(*parts, strict=True))[0]
    back = merge_attention(*zip(*parts[::-1], strict=True))[0]
    torch.testing.assert_close(there, back, atol=1e-12, rtol=0)


def test_merging_needs_a_log_sum_exp_for_each_output():
    q, k, v = tensors(1, 1, 3, 8)
    out, lse = attention_with_lse(q, k, v)
    with pytest.raises(ValueError):
        merge_attention([out], [lse, lse])


def test_half_precision_outputs_keep_their_type():
    q, k, v = tensors(1, 2, 5, 8, dtype=torch.bfloat16)
    out, lse = attention_with_lse(q, k, v)
    merged, total = merge_attention([out, out], [lse, lse])
    assert merged.dtype == torch.bfloat16 and total.dtype == torch.float32
    torch.testing.assert_close(merged, out)
