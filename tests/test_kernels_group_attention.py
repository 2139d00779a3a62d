"""Groups of keys: masses, parts, factors and rows against explicit maps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnctl.kernels.group_attention import (
    group_attention,
    group_masses,
    merge_groups,
    regrouped_attention,
    row_probabilities,
)
from attnctl.testing import oracles
from attnctl.testing.calls import tensors

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def case(
    heads: int = 6, kv_heads: int = 2, keys: int = 23, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v, disjoint groups [2, 3, keys] that cover every key, and a bool mask."""
    q, k, v = tensors(2, heads, 7, 8, kv_heads=kv_heads, keys=keys, dtype=dtype)
    draw = torch.Generator().manual_seed(3)
    of = torch.randint(0, 3, (2, keys), generator=draw)
    groups = torch.stack([of == g for g in range(3)], dim=1)
    mask = torch.rand(2, 1, 7, keys, generator=draw) > 0.3
    mask[..., 0] = True
    return q, k, v, groups, mask


def member(groups: Tensor) -> Tensor:
    return groups.double()[:, None]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_masses_and_rows(kv_heads: int, masked: str) -> None:
    q, k, _, groups, seen = case(kv_heads=kv_heads)
    low = torch.where(seen, 0.3, -torch.inf).double()
    mask = {"none": None, "bool": seen, "float": low}[masked]
    a = oracles.softmax_map(q, k, mask, 0.4)
    torch.testing.assert_close(row_probabilities(q, k, mask, 0.4), a, **EXACT)
    masses = group_masses(q, k, groups, mask, 0.4)
    torch.testing.assert_close(masses, a @ member(groups).transpose(-1, -2), **EXACT)
    torch.testing.assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]), **EXACT)


def test_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, groups, mask = case()
    whole = group_masses(q, k, groups, mask), *group_attention(q, k, v, groups, mask)
    small = lambda q, keys: (slice(i, i + 2) for i in range(0, q.shape[2], 2))  # noqa: E731
    monkeypatch.setattr("attnctl.kernels.group_attention.reference.query_chunks", small)
    parts = group_masses(q, k, groups, mask), *group_attention(q, k, v, groups, mask)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_parts_factors_and_the_bias_form_are_one(kv_heads: int) -> None:
    """sum_g c_g m_g o_g == explicit weights == a bias log c_g on the logits of a closed sum."""
    q, k, v, groups, mask = case(kv_heads=kv_heads)
    a = oracles.softmax_map(q, k, mask)
    m = a @ member(groups).transpose(-1, -2)
    p = 0.6
    factors = torch.stack([torch.full_like(m[..., 0], 1 - p), 1 + p * m[..., 0] / m[..., 1],
                           torch.ones_like(m[..., 0])], dim=-1)  # fmt: skip
    wanted = oracles.apply_map(a * (factors @ member(groups)), v)
    outs, lses = group_attention(q, k, v, groups, mask)
    merged = merge_groups(outs, lses, factors.permute(3, 0, 1, 2))
    torch.testing.assert_close(merged, wanted, **EXACT)
    found, masses = regrouped_attention(q, k, v, groups.double(), lambda _: factors, mask)
    torch.testing.assert_close(found, wanted, **EXACT)
    torch.testing.assert_close(masses, m, **EXACT)
    z = oracles.logits(q, k, mask) + (factors @ member(groups)).log()
    torch.testing.assert_close(oracles.apply_map(oracles.softmax(z), v), wanted, **EXACT)


def test_merged_without_factors_it_is_attention() -> None:
    q, k, v, groups, mask = case()
    outs, lses = group_attention(q, k, v, groups, mask)
    wanted = oracles.apply_map(oracles.softmax_map(q, k, mask), v)
    torch.testing.assert_close(merge_groups(outs, lses), wanted, **EXACT)


def test_groups_of_the_first_keys_leave_the_others_alone() -> None:
    q, k, v, groups, mask = case()
    few = groups[..., :11].double()
    half = torch.tensor([0.5, 2.0, 0.0]).double()
    a = oracles.softmax_map(q, k, mask)
    change = torch.ones_like(a)
    change[..., :11] = (half @ few)[:, None, None]
    found, _ = regrouped_attention(q, k, v, few, lambda m: half.expand_as(m), mask)
    torch.testing.assert_close(found, oracles.apply_map(a * change, v), **EXACT)


def test_an_empty_group_and_a_row_without_keys() -> None:
    q, k, v, groups, _ = case()
    groups[:, 0] |= groups[:, 2]
    groups[:, 2] = False
    outs, lses = group_attention(q, k, v, groups)
    assert (outs[2] == 0).all() and (lses[2] == -torch.inf).all()
    wanted = oracles.apply_map(oracles.softmax_map(q, k), v)
    torch.testing.assert_close(merge_groups(outs, lses), wanted, **EXACT)
    assert (group_masses(q, k, groups)[..., 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_attention_itself(dtype: torch.dtype) -> None:
    q, k, v, groups, mask = case(dtype=dtype)
    a = oracles.softmax_map(q, k, mask)
    wanted = oracles.apply_map(a * 1.5, v)
    found, _ = regrouped_attention(q, k, v, groups.float(), lambda m: 1.5 + 0 * m, mask)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    error = (stock.double() - oracles.apply_map(a, v)).abs().max()
    assert found.dtype == dtype
    bound = 3 * error + torch.finfo(dtype).eps * wanted.abs().max()
    assert (found.double() - wanted).abs().max() < bound
