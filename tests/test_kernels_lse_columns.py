"""Sums of chosen columns against the explicit float64 map: the kernel in Triton's interpreter
and, on a GPU, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.kernels.lse import Columns, column_sums, parts_of
from attnctl.processors.analysis import HeatMap, TokenMaps
from attnctl.processors.analysis.reading import Reader
from attnctl.processors.analysis.token_mass import columns_of
from attnctl.testing import oracles
from attnctl.testing.alone import INTERPRETED as INSIDE
from attnctl.testing.alone import run_alone, set_up_interpreter
from attnctl.testing.calls import attention_call, tensors

pytest.importorskip("triton")
torch.set_num_threads(1)
inside = pytest.mark.skipif(not INSIDE, reason="run by test_in_the_interpreter")
DEVICES = [
    pytest.param("cpu", marks=inside),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INSIDE, reason="a CPU's")]),
]
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
GROUPS = ((3,), (0, 7, 76), (), (7,))

if INSIDE:
    set_up_interpreter()


@pytest.mark.skipif(INSIDE, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_alone(__file__, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def layouts(
    device: str, dtype: torch.dtype, keys: int = 77, **sizes: int
) -> tuple[Tensor, Tensor]:
    """Return q and k as models have them: heads inside tokens, so that strides are not usual."""
    q, k, _ = tensors(dtype=dtype, keys=keys, **sizes)
    return tuple(  # type: ignore[return-value]
        x.transpose(1, 2).contiguous().to(device).transpose(1, 2) for x in (q, k)
    )


def wanted(
    q: Tensor, rows: slice, queries: slice, heads: Tensor | None, parts: int,
    groups: tuple[tuple[int, ...], ...] = GROUPS, samples: int = 3,
) -> Columns:  # fmt: skip
    size = samples, parts, len(groups), queries.stop - queries.start
    sums = torch.full(size, 0.25, device=q.device)
    return Columns(rows, queries, heads, *columns_of(groups, q.device), sums, 1)


def explicit(
    q: Tensor, k: Tensor, to: Columns, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Return what the sums should grow by, from the whole map in float64."""
    repeated = k.cpu().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    whole = oracles.softmax_map(q.cpu(), repeated, mask, scale)[to.rows][:, :, to.queries]
    whole = whole if to.heads is None else whole[:, to.heads.cpu()]
    columns = whole[..., to.keys.cpu()] @ to.members.cpu().double()  # [b, h, N, W]
    growth = torch.zeros_like(to.sums.cpu().double())
    for head in range(columns.shape[1]):
        at = slice(to.first, to.first + columns.shape[0])
        growth[at, head % growth.shape[1]] += columns[:, head].transpose(-1, -2)
    return growth


def masks(kind: str | None, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    draw = torch.Generator().manual_seed(5)
    if kind is None:
        return None
    if kind == "keys":
        seen = torch.rand(batch, 1, 1, keys, generator=draw) > 0.3
        seen[0] = False  # a sample without any key
        return seen
    return torch.randn(batch, heads, queries, keys, generator=draw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tokens", "keys", "dim", "heads", "parts", "mask"),
    [
        (torch.float32, 36, 77, 40, 3, 1, None),
        (torch.float32, 9, 77, 8, 3, 3, "keys"),
        (torch.float32, 9, 145, 16, 3, 2, "dense"),
        (torch.float16, 68, 77, 40, 1, 2, None),
        (torch.float16, 9, 154, 160, 2, 2, None),
        (torch.bfloat16, 133, 154, 160, 2, 2, None),
    ],
)
def test_sums_grow_by_the_columns_of_the_map(
    device: str, dtype: torch.dtype, tokens: int, keys: int, dim: int, heads: int, parts: int,
    mask: str | None,
) -> None:  # fmt: skip
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as whole numbers")
    q, k = layouts(device, dtype, keys, batch=4, heads=heads, tokens=tokens, dim=dim)
    seen = masks(mask, 4, heads, tokens, keys)
    to = wanted(q, slice(2, 4), slice(3, tokens), None, parts)
    given = None if seen is None else seen.to(device)
    add = column_sums(q, k, to, given, 0.3)
    assert add is not None
    want = 0.25 + 2 * explicit(q, k, to, seen, 0.3)
    for _ in range(2):
        add(q, k, given)
    torch.testing.assert_close(to.sums.cpu().double(), want, rtol=CLOSE[dtype], atol=1e-5)
    assert (to.sums[0] == 0.25).all() and (to.sums[:, :, 2] == 0.25).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_late_block_of_keys_that_is_weak_or_all_padding(device: str) -> None:
    q, k = layouts(device, torch.float32, 300, batch=2, heads=2, tokens=9, dim=8)
    k[:, :, :128] *= 60  # later blocks of 128 lie too far below for a maximum of their own
    seen = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    seen[..., 200:] = False
    to = wanted(q, slice(0, 2), slice(0, 9), None, 1)
    add = column_sums(q, k, to, seen.to(device))
    assert add is not None
    want = 0.25 + explicit(q, k, to, seen, None)
    add(q, k, seen.to(device))
    torch.testing.assert_close(to.sums.cpu().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_chosen_heads_by_themselves_with_shared_keys(device: str) -> None:
    q, k = layouts(device, torch.float32, 9, batch=1, heads=6, kv_heads=2, tokens=11, dim=8)
    heads = torch.tensor([1, 4, 5], device=device)
    groups = ((2,), (8, 8))  # a key that counts twice
    to = wanted(q, slice(0, 1), slice(0, 11), heads, 3, groups, samples=2)
    add = column_sums(q, k, to)
    assert add is not None
    want = 0.25 + explicit(q, k, to, None, None)
    add(q, k, None)
    torch.testing.assert_close(to.sums.cpu().double(), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("each_head", [False, True])
def test_heat_maps_come_from_the_kernel(device: str, each_head: bool) -> None:
    """Two samples with words of their own, at a site read twice and at one with few heads."""
    words = (((1,), (0, 3)), ((2,), (5,)))
    maps = TokenMaps(("one", "two"), words, each_head)
    reader, control = Reader(maps), HeatMap(sink=lambda _: None)
    spans = attnctl.Spans((("image", 0, 15),), (("text", 0, 9),), (1, 3, 5))
    found = []
    for site, chosen in enumerate([[0, 1, 2], [0, 1, 2], [2]]):
        q, k = layouts(device, torch.float32, 9, batch=4, heads=3, tokens=15, dim=8, seed=site % 2)
        call = attention_call(
            q, k, k, kind="cross", groups=("uncond", "cond"), spans=spans, heads=chosen,
            state=reader,
        )  # fmt: skip
        assert torch.equal(control.attend(call), call.proceed())
        whole = oracles.softmax_map(q.cpu(), k.cpu())[2:, chosen]
        found.append(
            torch.stack(
                [
                    torch.stack([whole[i, ..., list(word)].sum(-1) for word in words[i]], 1)
                    for i in (0, 1)
                ]
            )
        )
        assert all(x.kernel for plan in reader.plans.values() for x in plan.portions)
    means = [mean.cpu().flatten(3).double() for mean in maps.means().values()]
    if each_head:
        want = [(found[0] + found[1]) / 2, found[2]]
    else:
        want = [torch.cat(found, 1).mean(1, keepdim=True)]
    for mean, right in zip(means, want, strict=True):
        torch.testing.assert_close(mean, right, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_does_not_take(device: str) -> None:
    q, k = layouts(device, torch.float32, 9, batch=1, heads=2, tokens=5, dim=8)
    to = wanted(q, slice(0, 1), slice(0, 5), None, 1, ((1,),))
    assert column_sums(q, k, to) is not None
    refused = [
        (q.double(), k.double(), to, None),
        (q, k.half(), to, None),
        (q, k[..., ::2].repeat(1, 1, 120, 2), to, None),
        (q.transpose(2, 3), k, to, None),
        (q, k, wanted(q, slice(0, 1), slice(0, 5), None, 1, ((), ())), None),
        (q, k, to, torch.ones(5, 9, device=device)),
    ]
    for item in refused:
        assert column_sums(*item) is None
    q, k = (torch.randn(1, 1, 2, 72, device=device) for _ in range(2))
    few = wanted(q, slice(0, 1), slice(0, 2), None, 1, ((1,),))
    assert column_sums(q, k, few) is None
    assert column_sums(q.half(), k.half(), few) is not None


def test_a_cpu_takes_the_torch_path() -> None:
    if not INSIDE:
        q, k = layouts("cpu", torch.float32, 9, batch=1, heads=2, tokens=5, dim=8)
        assert column_sums(q, k, wanted(q, slice(0, 1), slice(0, 5), None, 1, ((1,),))) is None


def test_the_work_fills_a_gpu_and_the_sums_stay_small() -> None:
    assert parts_of(1, 64, 8) == 8 and parts_of(1, 4096, 8) == 4 and parts_of(4, 4096, 8) == 1
    for queries in (64, 4096, 65536):  # floats of partial sums for a word
        assert parts_of(1, queries, 20) * queries <= 2 * max(64 * 256, queries)
