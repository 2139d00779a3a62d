"""Sparse attention by a rule of one's own: masks, orders of tokens, wrong rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.apps.bench.similarity import psnr, ssim
from attnctl.apps.bench.sparse_quality import patterns, random_blocks
from attnctl.hosts.run import Run
from attnctl.kernels import BlockMask, Window, streaming_mask, window_mask
from attnctl.processors.sparse.shapes import VideoTokens
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import attention_call, joint_spans

GRID = (5, 6, 8)
VIDEO = 5 * 6 * 8


def tensors(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    return tuple(torch.randn(shape, generator=source).double() for _ in range(3))  # type: ignore[return-value]


def windows(tokens: VideoTokens) -> Any:
    return window_mask(
        tokens.grid, [Window(3), Window(5), Window(4, 2)], (1, 4, 8), text=tokens.text
    )


def neighbours(text: int, text_first: bool) -> Tensor:
    """bool [N, N] in the model's order: the windows above, written out; text with all."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in GRID))

    def near(axis: int, size: int, stride: int) -> Tensor:
        x, n = place[:, axis], GRID[axis]
        middle = (x // stride * stride + stride // 2).clamp(max=n - 1)
        left = size // 2
        middle = middle.clamp(left, n - 1 - (size - 1 - left))
        away = x[None] - middle[:, None]
        return (away >= -left) & (away < size - left)

    video = near(0, 3, 1) & near(1, 5, 1) & near(2, 4, 2)
    out = torch.ones(VIDEO + text, VIDEO + text, dtype=torch.bool)
    at = text if text_first else 0
    out[at : at + VIDEO, at : at + VIDEO] = video
    return out


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (7, False), (7, True)])
def test_a_rule_with_its_own_order_equals_the_explicit_map(text: int, text_first: bool) -> None:
    control = attnctl.BlockSparse(rule=windows, dense_layers=0)
    q, k, v = tensors(2, 3, VIDEO + text, 8)
    spans = joint_spans(VIDEO, text, text_first=text_first, grid=GRID)
    call = attention_call(q, k, v, spans=spans, kind="joint" if text else "self")
    allowed = neighbours(text, text_first)
    assert 0.1 < allowed.double().mean() < 0.5
    want = oracles.apply_map(oracles.softmax_map(q, k, allowed), v)
    torch.testing.assert_close(control.attend(call), want, atol=1e-12, rtol=0)


def test_a_plain_rule_leaves_padding_out_and_is_asked_once_a_sequence() -> None:
    asked: list[VideoTokens] = []

    def rule(tokens: VideoTokens) -> BlockMask:
        asked.append(tokens)
        keys = tokens.n - tokens.padding
        kept = torch.ones(-(-tokens.n // 32), -(-keys // 32), dtype=torch.bool).tril()
        return BlockMask.of_blocks(kept, tokens.n, keys, block=32)

    control: Any = attnctl.BlockSparse(rule=rule, dense_layers=0)
    q, k, v = tensors(3, 2, VIDEO + 40, 8)
    valid = torch.arange(VIDEO + 40) < VIDEO + torch.tensor([5, 40, 5])[:, None]
    state = control.begin(Run(), {})
    spans = joint_spans(VIDEO, 40, grid=GRID)
    call = attention_call(
        q, k, v, spans=spans, kind="joint", mask=valid[:, None, None], state=state
    )
    block = torch.arange(VIDEO + 40) // 32
    allowed = (block[None] <= block[:, None]) & valid[:, None, None]
    want = oracles.apply_map(oracles.softmax_map(q, k, allowed), v)
    for _ in range(2):
        torch.testing.assert_close(control.attend(call), want, atol=1e-12, rtol=0)
    assert [tokens.padding for tokens in asked] == [0, 35]


def test_an_order_of_its_own_and_padding_are_refused() -> None:
    control = attnctl.BlockSparse(rule=windows, dense_layers=0)
    q, k, v = tensors(1, 2, VIDEO + 9, 8)
    mask = (torch.arange(VIDEO + 9) < VIDEO + 4)[None, None, None]
    call = attention_call(q, k, v, spans=joint_spans(VIDEO, 9, grid=GRID), kind="joint", mask=mask)
    with pytest.raises(attnctl.HostError, match="pads the text by 5 tokens"):
        control.attend(call)


def test_wrong_rules_are_refused() -> None:
    with pytest.raises(attnctl.OptionError, match="expected a function"):
        attnctl.BlockSparse()
    q, k, v = tensors(1, 2, VIDEO, 8)
    call = attention_call(q, k, v, spans=joint_spans(VIDEO, 0, grid=GRID))

    def short(tokens: VideoTokens) -> BlockMask:
        return streaming_mask(tokens.n - 1, 32, 32, block=32)

    def other_order(tokens: VideoTokens) -> Any:
        return window_mask((5, 6, 7), [Window(3), Window(5), Window(4)], (1, 4, 8))

    for rule, message in ((short, "a mask of 239 queries"), (other_order, "order of 210 tokens")):
        with pytest.raises(attnctl.OptionError, match=message):
            attnctl.BlockSparse(rule=rule, dense_layers=0).attend(call)


def test_a_video_pipeline_with_all_patterns_of_the_bench() -> None:
    pipe = zoo.FAMILIES["wan"].build()
    before = zoo.run(pipe, num_frames=33)
    for pattern in patterns()[:2]:
        with attnctl.patch(pipe, pattern.control(0, 0.0)) as handle:
            assert not torch.equal(zoo.run(pipe, num_frames=33), before)
            assert handle.report().lines[0].calls
    assert torch.equal(zoo.run(pipe, num_frames=33), before)


def test_patterns_of_the_bench_keep_about_as_much() -> None:
    tokens = VideoTokens(9, 16, 16)
    densities = [pattern.mask(tokens).density for pattern in patterns()]
    assert all(0.48 < density < 0.57 for density in densities)
    kept = random_blocks(tokens, 0.25).dense()[0, 0, ::32, ::32]
    assert bool(kept.diagonal().all()) and set(kept.sum(1).tolist()) == {18}


# -- similarity ------------------------------------------------------------------------------


def test_psnr_and_ssim_equal_their_definitions() -> None:
    source = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 17, 13, generator=source).double() for _ in range(2))
    assert psnr(x, x).tolist() == [100, 100] and torch.equal(ssim(x, x), torch.ones(2).double())
    torch.testing.assert_close(psnr(x, x + 0.1), torch.full((2,), 20.0).double())
    line = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    weight = torch.outer(line, line) / line.sum() ** 2
    values = []
    for c in range(3):
        for i in range(17 - 10):
            for j in range(13 - 10):
                a, b = (z[0, c, i : i + 11, j : j + 11] for z in (x, y))
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                both = (weight * (a - ma) * (b - mb)).sum()
                top = (2 * ma * mb + 1e-4) * (2 * both + 9e-4)
                values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    torch.testing.assert_close(ssim(x, y)[0], torch.stack(values).mean(), atol=1e-12, rtol=0)
