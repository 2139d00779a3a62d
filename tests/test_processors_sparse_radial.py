"""Radial Attention: the mask against the rule written the long way, the control on tiny models."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.hosts.run import Run
from attnctl.kernels import BlockMask
from attnctl.processors.sparse import radial_mask, sparse
from attnctl.processors.sparse.radial import Radial, radial_block_mask
from attnctl.processors.sparse.radial_plan import speedup
from attnctl.processors.sparse.shapes import pipeline_grid
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import attention_call, joint_spans, tensors

torch.set_num_threads(1)

# -- the mask --------------------------------------------------------------------------------

GOLDEN = [
    # tokens per frame, frames, decay, family, adjacent, blocks, least and most in a row
    (3840, 18, 0.2, "wan", "half", 76_798, 78, 162),
    (3840, 18, 0.2, "wan", "full", 83_728, 92, 162),
    (1560, 21, 0.2, "wan", "half", 20_818, 55, 90),
    (1560, 21, 0.2, "wan", "full", 22_023, 60, 98),
    (3600, 21, 0.2, "wan", "half", 84_136, 85, 162),
    (3600, 21, 0.2, "wan", "full", 91_264, 98, 184),
    (3840, 20, 0.8, "wan", "half", 119_142, 100, 240),
    (3840, 20, 0.8, "wan", "full", 126_912, 114, 240),
    (3840, 30, 0.95, "hunyuan", "full", 222_452, 144, 281),
    (256, 6, 1.0, "wan", "half", 140, 10, 12),
    (256, 6, 1.0, "wan", "full", 140, 10, 12),
    (300, 8, 0.5, "wan", "half", 289, 12, 18),
    (300, 8, 0.5, "wan", "full", 290, 12, 18),
]


def whole_blocks(mask: BlockMask) -> Tensor:
    """Return the blocks that the sequence fills, which the published counts cover."""
    n = mask.nq // mask.block
    return mask.blocks()[0, 0, :n, :n]


@pytest.mark.parametrize("s,frames,decay,family,adjacent,count,least,most", GOLDEN)
def test_known_counts(s, frames, decay, family, adjacent, count, least, most):
    mask = radial_block_mask(frames, s, decay, family, adjacent)
    mask.check()
    kept = whole_blocks(mask)
    rows = kept.sum(-1)
    assert (int(kept.sum()), int(rows.min()), int(rows.max())) == (count, least, most)
    if s * frames % 128 == 0:
        assert mask.num_blocks == count and mask.density == count / kept.numel()
    else:  # the last row and column are kept
        assert mask.num_blocks == count + 2 * len(kept) + 1


@pytest.mark.parametrize(
    "s,frames,family,adjacent,sparsity",
    [
        (3600, 41, "wan", "half", 0.7505),
        (3600, 41, "wan", "full", 0.7401),
        (3600, 64, "hunyuan", "full", 0.8224),
        (3600, 128, "hunyuan", "full", 0.8912),
    ],
)
def test_known_sparsities_of_long_videos(s, frames, family, adjacent, sparsity):
    kept = whole_blocks(radial_block_mask(frames, s, 1.0, family, adjacent))
    assert round(1 - float(kept.double().mean()), 4) == sparsity
    if frames == 128:
        assert (int(kept.sum(-1).min()), int(kept.sum(-1).max())) == (218, 446)


@pytest.mark.parametrize(
    "decay,sparsity", [(0.1, 0.713), (0.3, 0.701), (0.5, 0.661), (0.8, 0.623), (1.0, 0.569)]
)
def test_known_sweep_of_the_decay(decay, sparsity):
    mask = radial_block_mask(18, 3840, decay, "wan", "full")
    assert round(1 - mask.density, 3) == sparsity


def long_way(s: int, frames: int, decay: float, family: str, adjacent: str, block: int) -> Tensor:
    """The rule of the sheet, pair of frames by pair of frames, on token masks."""
    size = -(-s * frames // block)
    out = torch.zeros(size, size, dtype=torch.bool)
    place = torch.arange(s)
    apart = (place[:, None] - place).abs()
    power = 2 ** len(f"{s:b}")
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            length = power / 2 ** (len(f"{d:b}") if d else 0)
            width = max(length * decay, block)
            if d <= 1:
                width = s // 2 if d and family == "wan" and adjacent == "half" else s
            tokens = apart <= width
            if length < 128 and d and d % int(128 / length):
                tokens = torch.zeros_like(tokens)
            if family == "wan" and j == 0:
                tokens = torch.ones_like(tokens)
            local = -(-s // block)
            padded = torch.zeros((local + 2) * block, (local + 2) * block)
            top, left = i * s % block, j * s % block
            padded[top : top + s, left : left + s] = tokens.float()
            cut = padded[: local * block, : local * block].view(local, block, local, block)
            column = cut.mean(1)  # density of each key column in a block's rows
            kept = (column > 1 / 3).sum(-1) / (column > 0).sum(-1).clamp_min(1) > 0.6
            r, c = i * s // block, j * s // block
            out[r : r + local, c : c + local] |= kept[: size - r, : size - c]
    return out


@pytest.mark.parametrize(
    "family,adjacent", [("wan", "half"), ("wan", "full"), ("hunyuan", "full")]
)
@pytest.mark.parametrize(
    "s,frames,decay,block",
    [(300, 8, 0.5, 128), (256, 9, 1.0, 128), (150, 20, 0.7, 64), (50, 40, 1.0, 64),
     (48, 30, 0.0, 32), (72, 33, 0.4, 32), (129, 5, 1.0, 128)],
)  # fmt: skip
def test_equals_the_rule_the_long_way(s, frames, decay, block, family, adjacent):
    want = long_way(s, frames, decay, family, adjacent, block)
    mask = radial_block_mask(frames, s, decay, family, adjacent, block)
    n = s * frames // block
    got = whole_blocks(mask)
    extra = got & ~want[:n, :n]
    assert not (want[:n, :n] & ~got).any()
    # what the released rule leaves out: a query's own block, and frame 0 for all
    own = torch.eye(n, dtype=torch.bool)
    if family == "wan":
        own[:, : -(-s // block)] = True
    assert not (extra & ~own).any() and got.diagonal().all()
    if (s, block) in ((300, 128), (256, 128), (48, 32), (72, 32)):
        assert not extra.any()


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@pytest.mark.parametrize("before,after,padding", [(64, 0, 0), (0, 40, 0), (0, 40, 33), (32, 7, 7)])
def test_text_is_kept_around_the_video(before, after, padding, family):
    s, frames, block = 48, 30, 32
    mask = radial_block_mask(
        frames, s, 0.3, family, "half", block, before=before, after=after, padding=padding
    )
    mask.check()
    video = radial_block_mask(frames, s, 0.3, family, "half", block)
    total = before + s * frames + after
    assert (mask.nq, mask.nk) == (total, total - padding)
    kept, low = mask.blocks()[0, 0], before // block
    high = low + s * frames // block
    assert torch.equal(kept[low:high, low:high], video.blocks()[0, 0])
    for rest in (slice(0, low), slice(high, None)):
        assert kept[rest].all() and kept[:, rest].all()


def test_text_that_fills_no_block_shifts_the_frames():
    """Every token of video keeps itself, its frame and the text, wherever blocks fall."""
    mask = radial_block_mask(9, 100, 0.5, "wan", "half", 32, before=11, after=5)
    allowed = mask.dense()[0, 0]
    assert allowed[:11].all() and allowed[:, :11].all() and allowed[-5:].all()
    assert allowed[:, -5:].all() and allowed[:, 11:111].all() and allowed.diagonal().all()
    assert 0.3 < float(allowed.double().mean()) < 0.9


def test_the_largest_mask_takes_milliseconds_and_equal_arguments_share_one():
    build = radial_mask._build.__wrapped__
    rule = radial_mask._Rule(3600, 1.0, False, 128)
    build(rule, 128, False, 0, 0, 0)
    seen = min(timed(lambda: build(rule, 128, False, 0, 0, 0)) for _ in range(5))
    new = []
    for _ in range(5):
        radial_mask._strip.cache_clear()  # as at a resolution that no mask was built for
        new.append(timed(lambda: build(rule, 128, False, 0, 0, 0)))
    assert seen < 0.035 and min(new) < 0.05  # 7 and 9 ms on a busy machine
    first = radial_block_mask(128, 3600, 1.0, "hunyuan")
    assert timed(lambda: radial_block_mask(128, 3600, 1.0, "hunyuan")) < 1e-3
    assert radial_block_mask(128, 3600, 1, "hunyuan", "full") is first
    assert radial_block_mask(128, 3600, 0.9, "hunyuan") is not first


def test_rows_of_one_strip_are_taken_together_through_all_frames():
    mask = radial_block_mask(5, 2048 + 64, 0.5, before=256, after=100)
    order = mask.order.tolist()
    assert sorted(order) == list(range(86)) and order[:4] == [0, 1, 84, 85]  # text first
    middle = [128 * row + 64 - 256 for row in order[4:]]
    places = [(at % 2112 // 1024, at // 2112, at) for at in middle]
    assert places == sorted(places)


def timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def test_values_out_of_range_are_refused():
    for options, message in (
        ({"frames": 0}, "frames=0, expected 1 or more"),
        ({"decay": 1.5}, r"decay=1\.5, expected 0 to 1"),
        ({"block": 100}, "block=100, expected 32"),
        ({"family": "sora"}, "family='sora'"),
        ({"after": 3, "padding": 4}, "padding=4, expected 0 to after=3"),
    ):
        arguments = {"frames": 3, "tokens_per_frame": 64, "decay": 0.5, **options}
        with pytest.raises(attnctl.OptionError, match=message):
            radial_block_mask(**arguments)


# -- one attention call ----------------------------------------------------------------------


def own_mask(call: Any, control: Radial, frames: int, s: int, before: int, after: int) -> Tensor:
    rule = "hunyuan" if call.site.kind == "joint" else "wan"
    mask = radial_block_mask(
        frames, s, control.decay, rule, control.adjacent, control.block,
        before=before, after=after,
    )  # fmt: skip
    assert 0.2 < mask.density < 0.9
    return mask.dense()


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("text", [0, 9])
@pytest.mark.parametrize("heads", [None, [1]])
def test_equals_the_explicit_masked_map(heads, text, text_first):
    control = Radial(decay=0.3, block=32, dense_layers=0)
    q, k, v = tensors(2, 3, 9 * 48 + text, 8)
    spans = joint_spans(9 * 48, text, text_first=text_first, grid=(9, 6, 8))
    call = attention_call(q, k, v, spans=spans, kind="joint" if text else "self", heads=heads)
    out = control.attend(call)
    before, after = (text, 0) if text_first else (0, text)
    allowed = own_mask(call, control, 9, 48, before, after)
    want = oracles.apply_map(oracles.softmax_map(q, k, allowed), v)
    mine = slice(None) if heads is None else heads
    torch.testing.assert_close(out[:, mine], want[:, mine], atol=1e-12, rtol=0)
    if heads is not None:
        assert torch.equal(out[:, ::2], call.proceed()[:, ::2])


@pytest.mark.parametrize("kind", ["bool", "float", "row"])
def test_padding_of_the_text_is_left_out_row_by_row(kind):
    control = Radial(decay=0.3, block=32, dense_layers=0)
    text, video = 40, 9 * 48
    q, k, v = tensors(3, 2, video + text, 8)
    valid = torch.arange(video + text) < video + torch.tensor([5, 40, 5])[:, None]
    mask = (
        valid[:, None, None]
        if kind == "bool"
        else torch.where(valid, 0.0, -torch.inf)[:, None, None].double()
    )
    if kind == "row":  # one for all
        mask = mask[:1]
        valid = valid[:1].expand(3, -1)
    spans = joint_spans(video, text, grid=(9, 6, 8))
    call = attention_call(q, k, v, spans=spans, kind="joint", mask=mask)
    allowed = own_mask(call, control, 9, 48, 0, text) & valid[:, None, None]
    want = oracles.apply_map(oracles.softmax_map(q, k, allowed), v)
    torch.testing.assert_close(control.attend(call), want, atol=1e-12, rtol=0)


def test_other_masks_and_pictures_are_refused():
    control = Radial(dense_layers=0)
    q, k, v = tensors(1, 2, 72, 8)
    video = joint_spans(60, 12, grid=(3, 4, 5))
    holes = torch.ones(1, 1, 1, 72).bool()
    holes[..., 3] = False
    bias = torch.zeros(1, 1, 1, 72)
    bias[..., 70:] = -2.0
    for mask in (holes, bias, torch.ones(1, 1, 72, 72).bool(), holes.flip(-1)):
        call = attention_call(q, k, v, spans=video, kind="joint", mask=mask)
        with pytest.raises(attnctl.HostError, match="more than leave out padding"):
            control.attend(call)
    with pytest.raises(attnctl.HostError, match="are not known"):
        control.attend(attention_call(q, k, v))
    picture = joint_spans(60, 12, grid=(1, 6, 10))
    with pytest.raises(attnctl.HostError, match="needs a video"):
        control.attend(attention_call(q, k, v, spans=picture, kind="joint"))
    with pytest.raises(attnctl.OptionError, match="causal"):
        control.attend(attention_call(q, k, v, spans=video, kind="joint", is_causal=True))


def test_a_video_too_small_for_it_is_told_once():
    q, k, v = tensors(1, 2, 72, 8)
    control: Any = Radial(dense_layers=0)
    state = control.begin(Run(), {})
    call = attention_call(q, k, v, spans=joint_spans(72, 0, grid=(3, 4, 6)), state=state)
    with pytest.warns(attnctl.AttnctlWarning, match="keeps every block") as told:
        out = control.attend(call)
        control.attend(call)
    assert len(told) == 1
    torch.testing.assert_close(out, call.proceed(), atol=1e-12, rtol=0)


def test_a_run_tells_of_a_full_mask_once() -> None:
    """Over layers, steps, branches and both denoisers of the pipeline; again in the next run."""
    pipe = built("wan22")
    with attnctl.patch(pipe, Radial(dense_layers=0, start=0.0)):  # blocks of 128 for 72 tokens
        for _ in range(2):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                zoo.run(pipe, steps=3)
            assert sum("keeps every block" in str(w.message) for w in told) == 1


# -- whole models ----------------------------------------------------------------------------

VIDEO = ("wan", "wan22", "wan-i2v", "cogvideox", "hunyuanvideo", "mochi", "ltx", "allegro")
LONGER = {"ltx": 65, "mochi": 49}
SPARSE = Radial(decay=0.3, block=32, dense_layers=0, start=0.0)


@functools.cache
def built(name: str) -> Any:
    try:
        return zoo.FAMILIES[name].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))


def clip(name: str, **options: Any) -> Tensor:
    """Run a tiny pipeline for nine latent frames of 4 x 6 tokens."""
    return zoo.run(built(name), num_frames=LONGER.get(name, 33), **options)


@pytest.mark.parametrize("name", VIDEO)
def test_all_dense_and_undo_are_bit_exact_and_sparse_is_not(name):
    pipe = built(name)
    before = clip(name)
    for dense in (
        Radial(start=1.0),
        Radial(start=0.0, dense_layers=99),
        Radial(start=0.0, dense_steps="0-1"),
    ):
        with attnctl.patch(pipe, dense):
            assert torch.equal(clip(name), before)
    with attnctl.patch(pipe, SPARSE) as handle:
        out = clip(name)
        line = handle.report().lines[0]
    assert torch.isfinite(out).all() and not torch.equal(out, before)
    assert line.calls and line.sites_hit == line.sites
    assert torch.equal(clip(name), before)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuanvideo", "mochi"])
def test_a_batch_is_what_each_sample_gives_alone(name):
    pipe = built(name)
    with attnctl.patch(pipe, SPARSE):
        together = clip(name, batch=2)
        alone = clip(name, batch=1)
    torch.testing.assert_close(together[:1], alone[:1], rtol=1e-3, atol=1e-3)


def test_dense_layers_and_steps_are_left_alone():
    pipe = built("wan")
    control = Radial(block=32, dense_layers=1, start=0.5, decay=0.3)
    seen: list[tuple[int, int]] = []
    original = sparse.block_sparse_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sparse, "block_sparse_attention",
            lambda *a, **k: (seen.append((1, 1)), original(*a, **k))[1],
        )  # fmt: skip
        with attnctl.patch(pipe, control) as handle:
            clip("wan", steps=4)
    assert handle.report().lines[0].steps == (2, 3)
    assert len(seen) == 2 * 2  # one of two layers, two of four steps, two branches


def test_the_report_tells_what_was_computed_by_layer_and_step():
    pipe = built("wan")
    control = Radial(block=32, dense_layers=1, start=0.5, decay=0.3)
    with attnctl.patch(pipe, control) as handle:
        assert handle.report().lines[0].account is None
        clip("wan", steps=4)
        line = handle.report().lines[0]
    density = radial_block_mask(9, 24, 0.3, "wan", "half", 32).density
    account = line.account
    assert density < 0.6 and account.steps == (0, 1, 2, 3) and account.layers == (0, 1)
    want = torch.ones(4, 2).double()
    want[2:, 1] = density
    assert torch.equal(account.computed, want)
    assert account.density == pytest.approx((6 + 2 * density) / 8)
    share = 216 / (216 + 6 * 36)
    assert account.attention_share == share
    assert account.speedup == pytest.approx(1 / (1 - share * (1 - density) / 4))
    said = str(handle.report()).splitlines()[1:]
    assert said == [
        f"  computed {account.density:.1%} of the blocks of self-attention, speedup at most "
        f"{account.speedup:.2f} with 50% of a dense step in it",
        "  steps 0-1: layers 0-1 100.0%",
        f"  steps 2-3: layer 0 100.0%, layer 1 {density:.1%}",
    ]


def test_the_report_counts_dense_heads_twice_and_each_denoiser_its_own_steps():
    pipe = built("wan22")
    control = Radial(block=32, dense_layers=0, start=0.0, decay=0.3, heads="L1H0")
    with attnctl.patch(pipe, control) as handle:
        zoo.run(pipe, num_frames=33, steps=4)
        first, second = (line.account for line in handle.report().lines)
    density = radial_block_mask(9, 24, 0.3, "wan", "half", 32).density
    assert first.steps + second.steps == (0, 1, 2, 3) and first.steps and second.steps
    for account in (first, second):
        want = torch.tensor([1, 1 + density], dtype=torch.float64).expand(len(account.steps), 2)
        assert torch.equal(account.computed, want) and account.speedup < 1


def test_the_report_of_a_bare_denoiser_is_of_its_run_so_far():
    module = built("wan").transformer
    inputs = {
        "hidden_states": torch.randn(1, 4, 9, 8, 12),
        "encoder_hidden_states": torch.randn(1, 11, 20),
    }
    control = Radial(block=32, dense_layers=0, start=0.5, decay=0.3)
    with attnctl.patch(module, control, steps=2) as handle, torch.no_grad():
        for time_ in (900.0, 400.0):
            module(timestep=torch.tensor([time_]), **inputs)
        account = handle.report().lines[0].account
        handle.reset()
        module(timestep=torch.tensor([900.0]), **inputs)
        assert handle.report().lines[0].account is None
    assert (account.computed[0] == 1).all() and (account.computed[1] < 1).all()


def test_steps_inside_a_window_and_outside_the_dense_ones():
    schedule = Radial(start=0.2, stop=0.9, dense_steps="steps:4-5 0.6-0.7").schedule
    steps = [i for i in range(10) if attnctl.Step(i, 10) in schedule]
    assert steps == [2, 3, 5, 7, 8]


def test_pictures_are_refused_by_name():
    pipe = built("sd3")
    with pytest.raises(attnctl.HostError, match="needs a video"), attnctl.patch(pipe, SPARSE):
        zoo.run(pipe)


def test_wrong_options_are_refused():
    for options, message in (
        ({"decay": -1}, "decay=-1"),
        ({"family": "x"}, "family='x', expected auto"),
        ({"dense_layers": -1}, "dense_layers=-1"),
        ({"block": 16}, "block=16"),
        ({"dense_steps": "never"}, "cannot read the step window"),
        ({"start": 0.5, "stop": 0.2}, "window 0.5-0.2"),
    ):
        with pytest.raises(attnctl.OptionError, match=message):
            Radial(**options)


@pytest.mark.parametrize("name", [n for n in VIDEO if n != "mochi"])
def test_the_grid_foretold_is_the_grid_of_the_run(name):
    pipe, sizes = built(name), zoo.FAMILIES[name].fixed
    size = {key: sizes[key] for key in ("height", "width", "num_frames")}
    assert pipeline_grid(pipe, **size) == (3, 4, 6)


def test_for_model_and_the_plan():
    pipe = built("wan")
    control = Radial.for_model(pipe, height=64, width=96, num_frames=9, block=32)
    assert control == Radial(decay=0.8, family="wan", adjacent="full", block=32)
    assert isinstance(control, Radial)
    plan = control.plan(pipe, height=480, width=832, num_frames=81, steps=8, attention_share=0.5)
    assert plan.mask.nq == 32_760 and plan.density.shape == (8, 2)
    assert (plan.density[:2] == 1).all() and (plan.density[:, 0] == 1).all()
    assert (plan.density[2:, 1] == plan.mask.density).all()
    assert plan.dense == pytest.approx(1 - 6 / 16)
    assert plan.speedup == pytest.approx(speedup(0.5, 10 / 16, plan.mask.density))
    assert "sparse in 6 of 8 steps, in 1 of 2 layers" in str(plan)
    with pytest.raises(attnctl.OptionError, match="together"):
        Radial.for_model(pipe, height=64)
    with pytest.raises(attnctl.OptionError, match="is not known before it runs"):
        Radial.for_model(pipe.transformer, height=64, width=96, num_frames=9)


def test_the_expected_speedup_is_the_sheets():
    assert speedup(1.0, 12 / 50, 0.2746) == pytest.approx(1 / (12 / 50 + 38 / 50 * 0.2746))
    assert speedup(0.0, 0.2, 0.3) == speedup(0.5, 1.0, 0.3) == 1
