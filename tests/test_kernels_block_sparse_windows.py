"""Windows, sliding tiles and streaming as block masks, against token-by-token rules."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from attnctl.kernels import (
    BlockMask,
    TileOrder,
    Window,
    block_sparse_attention,
    streaming_mask,
    window_mask,
)
from attnctl.kernels.block_sparse.windows import axis_map
from attnctl.testing.calls import tensors
from attnctl.testing.oracles import apply_map, softmax

torch.set_num_threads(1)


def kept_keys(q: int, length: int, w: Window) -> set[int]:
    """Return the keys of one query, from the definition."""
    mates = list(range(q % w.dilation, length, w.dilation))
    place, last = q // w.dilation, len(mates) - 1
    first = place // w.stride * w.stride
    if w.causal:
        leader = min(first + w.stride - 1, last)
        return {mates[j] for j in range(place + 1) if leader - j < w.size}
    left = w.size // 2
    right = w.size - left - 1
    middle = min(first + w.stride // 2, last)
    middle = min(max(middle, left), last - right)
    return {mates[j] for j in range(middle - left, middle + right + 1)}


def whole_map(grid: tuple[int, ...], windows: tuple[Window, ...]) -> Tensor:
    """Return the map of all tokens of a grid in raster order."""
    axes = [
        torch.tensor([[k in kept_keys(q, n, w) for k in range(n)] for q in range(n)])
        for n, w in zip(grid, windows, strict=True)
    ]
    return functools.reduce(lambda a, b: torch.kron(a.int(), b.int()).bool(), axes)


@pytest.mark.parametrize("length", [5, 8, 11])
def test_one_axis_follows_the_definition(length):
    for size in range(1, length + 1):
        for stride in range(1, size + 1):
            for dilation in range(1, length // size + 1):
                for causal in (False, True):
                    window = Window(size, stride, dilation, causal)
                    got = axis_map(length, window)
                    for q in range(length):
                        assert set(got[q].nonzero()[:, 0].tolist()) == kept_keys(q, length, window)
                    if not causal:
                        assert (got.sum(1) == size).all()


GRIDS = {
    "video": ((5, 7, 9), (Window(3), Window(5, 2), Window(4, 4)), (2, 4, 4), 0),
    "dilated": ((5, 7, 9), (Window(2, 1, 2), Window(7), Window(3, 1, 3)), (2, 4, 4), 45),
    "causal": ((10, 12), (Window(4, 4, causal=True), Window(3, 3)), (4, 8), 3),
    "even": ((8, 8), (Window(4, 4), Window(8, 8)), (4, 8), 32),
    "line": ((70,), (Window(20),), (32,), 0),
}


@pytest.mark.parametrize("name", GRIDS)
def test_masks_in_tiles_are_the_windows(name):
    grid, windows, tile, text = GRIDS[name]
    mask, order = window_mask(grid, windows, tile, text=text)
    inner = whole_map(grid, windows)
    n = len(inner)
    want = torch.ones(n + text, n + text, dtype=torch.bool)
    want[:n, :n] = inner
    dense = mask.dense()[0, 0]
    assert torch.equal(dense[order.back][:, order.back], want)
    real = order.slots >= 0
    assert not dense[real][:, ~real].any()  # nobody attends to padding
    full = mask.lists.table(mask.cols) & mask.parts.table(mask.cols)
    assert not full.any() and order.block == mask.block


@pytest.mark.parametrize("name", ["video", "dilated"])
def test_attention_in_tiles_equals_attention_under_the_window(name):
    grid, windows, tile, text = GRIDS[name]
    mask, order = window_mask(grid, windows, tile, text=text)
    inner = whole_map(grid, windows)
    want = torch.ones(2 * (len(inner) + text,), dtype=torch.bool)
    want[: len(inner), : len(inner)] = inner
    q, k, v = tensors(1, 2, len(want), 8)
    out = order.unsort(block_sparse_attention(*(order.sort(x) for x in (q, k, v)), mask))
    logits = (q @ k.mT * 8**-0.5).masked_fill(~want, -torch.inf)
    torch.testing.assert_close(out, apply_map(softmax(logits), v), atol=1e-12, rtol=0)
    x = torch.randn(2, len(want), 3)
    assert torch.equal(order.unsort(order.sort(x)), x)


@pytest.mark.parametrize(
    "size,stride,tile,visited,full",
    [
        ((18, 24, 24), (1, 1, 1), (4, 4, 8), 0.182, None),
        ((18, 24, 24), (1, 1, 1), (2, 8, 8), 0.184, 0.17),
        ((18, 24, 24), (16, 8, 8), (4, 4, 8), 0.107, None),
        ((18, 24, 24), (16, 8, 8), (2, 8, 8), 0.090, 1.0),
        ((18, 24, 24), (6, 8, 8), (2, 8, 8), 0.090, 1.0),
    ],
)
def test_visited_tiles_of_published_windows(size, stride, tile, visited, full):
    """Shares of the NATTEN simulator at HunyuanVideo's grid; padding counted as it is there."""
    mask, _ = window_mask((30, 48, 80), [*map(Window, size, stride)], tile)
    blocks = 30 * 48 * 80 / 128
    assert mask.num_blocks / blocks**2 == pytest.approx(visited, abs=6e-4)
    if full is not None:
        assert len(mask.lists.idx) / mask.num_blocks == pytest.approx(full, abs=6e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 31, 64, 150])
def test_streaming_follows_the_rule(n, causal):
    q, k = torch.arange(n)[:, None], torch.arange(n)
    for sink in (0, 1, 32, 40, 100, 400):
        for recent in (0, 1, 20, 64, 90, 500):
            want = (k < sink) | ((q - k).abs() < recent)
            want = want & (k <= q) if causal else want
            mask = streaming_mask(n, sink, recent, block=32, causal=causal)
            assert torch.equal(mask.dense()[0, 0], want)


def test_bitmaps_are_shared():
    assert len(streaming_mask(115200, 512, 9000).bits) == 4
    mask, _ = window_mask((8, 16, 32), [*map(Window, (3, 5, 9))], (2, 4, 4))
    assert len(mask.bits.unique(dim=0)) == len(mask.bits) < len(mask.parts.idx) / 10


def test_the_drawings_show_the_patterns():
    pytest.importorskip("PIL")
    masks: list[BlockMask] = [
        streaming_mask(640, 64, 96, block=32),
        window_mask((4, 8, 16), [*map(Window, (2, 4, 8))], (2, 4, 4))[0],
    ]
    for mask in masks:
        image = mask.picture(cell=1)
        shades = {"empty": (244, 244, 240), "full": (32, 60, 110), "part": (238, 150, 60)}
        found = {name: 0 for name in shades}
        for count, colour in image.getcolors():
            found[{v: k for k, v in shades.items()}[colour]] += count
        assert found["full"] == len(mask.lists.idx) and found["part"] == len(mask.parts.idx)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="stride <= size"):
        Window(3, 4)
    with pytest.raises(ValueError, match="needs 10 places, the axis has 9"):
        window_mask((9,), [Window(5, 1, 2)], (32,))
    with pytest.raises(ValueError, match="as many axes each"):
        TileOrder((4, 4), (4,), (1, 1))
    with pytest.raises(ValueError, match="block=16"):
        window_mask((16,), [Window(4)], (16,))
    with pytest.raises(ValueError, match="sink=-1"):
        streaming_mask(10, -1, 3)
