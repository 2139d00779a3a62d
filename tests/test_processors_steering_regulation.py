"""Attention Regulation against explicit float64 maps, and on models: rows, batches, undo."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.hosts.run import Run
from attnctl.processors.steering.regulation import Memory, Regulated
from attnctl.processors.steering.regulation_loss import (
    Aim,
    Basis,
    loss_and_slope,
    optimise,
    shares,
    upper_quantile,
)
from attnctl.processors.steering.token_groups import Groups, split
from attnctl.records import Spans
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import attention_call, joint_spans, tensors
from attnctl.words.prompts import Prompt, border_tokens, prompts_of

WORDS = {"targets": [[1], [2]], "restore": [0]}
TRUE = torch.ones(1, 2, dtype=torch.bool)


@functools.cache
def shipped(name: str) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(assets.path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the loss and its descent -------------------------------------------------------------------


def dominated(seed: int = 0) -> tuple[Tensor, Tensor]:
    """One token at +3, the start of text at +4: (rest, logits of that and of a plain token)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 8, 77, 256, generator=generator, dtype=torch.float64)
    z[:, :, 0] += 4
    z[:, :, 3] += 3
    others = [i for i in range(77) if i not in (3, 7)]
    return z[:, :, others].logsumexp(2), z[:, :, [3, 7]]


def gaussians(grid: tuple[int, int, int]) -> Tensor:
    """Return every Gaussian of a grid as a map [f c d, m], one exponential at a time."""
    frames, high, wide = grid
    sigma = max(1, min(high, wide) // 16)
    rows = list(range(2 * sigma, high, 2 * sigma)) or [high // 2]
    columns = list(range(2 * sigma, wide, 2 * sigma)) or [wide // 2]
    maps = torch.zeros(frames, len(rows), len(columns), frames, high, wide, dtype=torch.float64)
    y, x = torch.arange(high)[:, None], torch.arange(wide)[None]
    for f in range(frames):
        for i, cy in enumerate(rows):
            for j, cx in enumerate(columns):
                apart = ((y - cy) ** 2 + (x - cx) ** 2).double()
                maps[f, i, j, f] = torch.exp(-apart / (2 * sigma**2))
    return maps.flatten(3).flatten(0, 2)


@pytest.mark.parametrize(
    ("grid", "count"),
    [((1, 16, 16), 49), ((1, 8, 8), 9), ((1, 20, 36), 9 * 17), ((2, 7, 3), 6), ((1, 2, 1), 1)],
)
def test_gaussians_of_a_grid(grid: tuple[int, int, int], count: int) -> None:
    basis, maps = Basis.of(grid, torch.zeros((), dtype=torch.float64)), gaussians(grid)
    weights = torch.randn(basis.zeros((2, 3)).shape, dtype=torch.float64)
    assert weights[0, 0].numel() == len(maps) == count
    assert torch.equal(maps.amax(-1), torch.ones(count, dtype=torch.float64))  # centres inside
    torch.testing.assert_close(basis.spread(weights), weights.flatten(2) @ maps)
    slope = torch.randn(2, 3, maps.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.gather(slope).flatten(2), slope @ maps.T)


def test_few_columns_stand_for_the_whole_softmax() -> None:
    z = torch.randn(2, 3, 13, 35, dtype=torch.float64) * 4
    z[:, :, :, 0] = -torch.inf  # a query without any key
    chosen = [5, 2]
    rest = z[:, :, [i for i in range(13) if i not in chosen]].logsumexp(2)
    want = oracles.softmax(z.transpose(-1, -2))[..., chosen].transpose(-1, -2)
    torch.testing.assert_close(shares(rest, z[:, :, chosen]), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tokens", [1, 2, 11, 35, 256])
@pytest.mark.parametrize("quantile", [0.9, 0.5, 1.0])
def test_quantile_equals_torch(tokens: int, quantile: float) -> None:
    maps = torch.rand(2, 3, tokens, dtype=torch.float64)
    value, ends, weights = upper_quantile(maps, quantile)
    torch.testing.assert_close(value, torch.quantile(maps, quantile, dim=-1))
    torch.testing.assert_close((maps.gather(-1, ends) * weights).sum(-1), value)


@pytest.mark.parametrize(
    ("grid", "step"), [((1, 16, 16), 1), ((1, 48, 48), 1), ((1, 8, 8), 1 / 4), ((2, 16, 32), 4)]
)
def test_the_step_follows_the_tokens_per_gaussian(grid: tuple[int, int, int], step: float) -> None:
    assert Basis.of(grid, torch.zeros(())).step == step


@pytest.mark.parametrize("targets", [1, 3, 6])
def test_loss_and_slopes_equal_autograd(targets: int) -> None:
    grid, aim = (1, 9, 7), Aim(0.8, 0.25, 70.0, 0.2)
    rest = torch.randn(2, 3, 63, dtype=torch.float64)
    logits = torch.randn(2, 3, targets, 63, dtype=torch.float64)
    basis, maps = Basis.of(grid, rest), gaussians(grid)
    weights = torch.randn(basis.zeros((2, 3, targets)).shape, dtype=torch.float64)
    weights.requires_grad_()
    changed = logits + weights.flatten(3) @ maps
    whole = torch.softmax(torch.cat([rest[:, :, None], changed], dim=2), dim=2)[:, :, 1:]
    high = torch.quantile(whole, 0.9, dim=-1)
    area = (whole.mean(-1) - min(1, 0.25 * targets) / targets) ** 2
    want = ((high - 0.8) ** 2 + 70 * area).mean(-1) + 0.2 * (weights**2).flatten(2).mean(-1)
    (slope,) = torch.autograd.grad(want.sum(), weights)
    valid = torch.ones(2, targets, dtype=torch.bool)
    with torch.no_grad():
        found = shares(rest, logits + basis.spread(weights))
        loss, toward, own = loss_and_slope(found, weights, valid, aim)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(basis.gather(toward) + own, slope, rtol=1e-10, atol=1e-14)


def test_planted_dominance_is_taken_away() -> None:
    """The neglected token's area rises to about that of the dominant one."""
    rest, logits = dominated()
    basis = Basis.of((1, 16, 16), rest)
    found = optimise(rest, logits, TRUE, basis, Aim())
    before, after = (
        shares(rest, logits + basis.spread(w)) for w in (0 * found.weights, found.weights)
    )
    area = before.mean((1, 3))[0]
    assert area[0] / area[1] > 15
    area = after.mean((1, 3))[0]
    assert area[0] / area[1] < 1.3 and (area > 0.15).all()
    assert (upper_quantile(after, 0.9)[0].mean(1) > 0.6).all()
    assert 8 < int(found.best) < 16 and found.loss < 0.3 * found.first


def test_the_best_iteration_is_kept_for_each_sample() -> None:
    """Losses do not fall steadily; more iterations are never worse."""
    rest, logits = (torch.cat(pair) for pair in zip(dominated(0), dominated(1), strict=True))
    basis, valid = Basis.of((1, 16, 16), rest), torch.ones(2, 2, dtype=torch.bool)
    each = [
        optimise(rest, logits, valid, basis, Aim(), iterations=n) for n in (1, 2, 4, 12, 13, 20)
    ]
    losses = torch.stack([one.loss for one in each])
    assert (losses.diff(dim=0) <= 0).all() and torch.equal(losses[0], losses[2])
    assert torch.equal(each[0].weights, torch.zeros_like(each[0].weights))
    alone = optimise(rest[1:], logits[1:], TRUE, basis, Aim())
    torch.testing.assert_close(alone.weights, each[-1].weights[1:])


def test_order_of_targets_and_heads_and_padding_do_not_matter() -> None:
    rest, logits = dominated()
    basis = Basis.of((1, 16, 16), rest)
    weights = optimise(rest, logits, TRUE, basis, Aim()).weights
    swapped = optimise(rest, logits.flip(2), TRUE, basis, Aim()).weights
    torch.testing.assert_close(swapped, weights.flip(2))
    heads = optimise(rest.flip(1), logits.flip(1), TRUE, basis, Aim()).weights
    torch.testing.assert_close(heads, weights.flip(1))
    none = torch.full_like(logits[:, :, :1], -torch.inf)
    padded = optimise(
        rest, torch.cat([logits, none], 2), torch.tensor([[True, True, False]]), basis, Aim()
    )
    torch.testing.assert_close(padded.weights[:, :, :2], weights)
    assert torch.equal(padded.weights[:, :, 2], torch.zeros_like(padded.weights[:, :, 2]))


# -- groups of keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_parts_with_a_bias_equal_the_explicit_map(masked: str | None) -> None:
    q, k, v = tensors(batch=2, heads=4, tokens=15, keys=13, kv_heads=2, dim=7)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 15, 13, generator=torch.Generator().manual_seed(1)) > 0.3
        if masked == "float":
            mask = torch.where(mask, 0.3, -torch.inf).double()
    samples = [[[3], [5, 7]], [[0, 12]]]
    groups = Groups.make(samples, q.device)
    assert groups.valid.tolist() == [[True, True], [True, False]]
    queries = slice(4, 13)
    call = attention_call(q, k, v, kind="cross", mask=mask, scale=0.4)
    parts = split(call.take(slice(0, 2)), queries, groups)
    by_group = torch.randn(2, 4, 2, 9, dtype=torch.float64)
    z = oracles.logits(q, k, mask, 0.4)[:, :, queries]
    for row, one in enumerate(samples):
        for g, keys in enumerate(one):
            want = oracles.lse(z[row, :, :, keys])
            torch.testing.assert_close(groups.gathered(parts.logits)[row, :, g], want)
            for key in keys:
                z[row, :, :, key] += by_group[row, :, g]
    want = oracles.apply_map(oracles.softmax(z), v)
    torch.testing.assert_close(parts.merged(groups.spread(by_group)), want)
    torch.testing.assert_close(parts.total(groups.spread(by_group)), oracles.lse(z))


# -- one call -----------------------------------------------------------------------------------


def memory(*groups: list[list[int]], borders: list[int]) -> Memory:
    return Memory(list(groups), [[[p] for p in borders] for _ in groups])


def explicit(
    z: Tensor, v: Tensor, groups: list[list[int]], borders: list[int], text: slice, grid: Any, *,
    past: Tensor | None = None, step: int = 0, smoothing: float = 0.25, decay: float = 0.99,
    strength: float = 1.0, iterations: int = 20, rate: float = 100.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Regulate one sample's logits [h, m, N] the long way: autograd, whole softmax, all maps."""
    maps, heads = gaussians(grid), z.shape[0]
    rate = rate * maps.shape[1] / 256  # sigma is 1 on these small grids
    w = torch.zeros(heads, len(groups), len(maps), dtype=torch.float64, requires_grad=True)
    at = torch.zeros(len(groups), z.shape[-1], dtype=torch.float64)
    for g, keys in enumerate(groups):
        at[g, keys] = 1

    def bias(weights: Tensor) -> Tensor:
        return torch.einsum("hgc,cm,gn->hmn", weights, maps, at)

    best, least = w, None
    for _ in range(iterations):
        share = torch.softmax((z + bias(w))[..., text], dim=-1) @ at[:, text].T  # [h, m, g]
        high = torch.quantile(share, 0.9, dim=1)
        area = share.mean(1) - min(1.0, 0.2 * len(groups)) / len(groups)
        each = ((high - 0.9) ** 2 + 80 * area**2).mean(-1) + 0.09 * (w**2).mean((1, 2))
        if least is None or each.mean() < least:
            best, least = w.detach(), each.mean().detach()
        (slope,) = torch.autograd.grad(each.sum(), w)
        w = (w - rate * slope).detach().requires_grad_()
    mixed = (1 - smoothing) * best + smoothing * (torch.zeros_like(best) if past is None else past)
    new = torch.softmax(z + strength * decay**step * bias(mixed), dim=-1)
    new[..., borders] = torch.softmax(z, dim=-1)[..., borders]
    return new @ v, best


@pytest.mark.parametrize("heads", [None, [0, 2]])
def test_cross_attention_equals_the_explicit_way_over_steps(heads: list[int] | None) -> None:
    """Rows of both roles, odd sizes, two prompts with other targets, three steps with a gap."""
    q, k, v = tensors(batch=4, heads=3, tokens=63, keys=11, dim=8)
    grid, spans = (1, 9, 7), Spans((("image", 0, 63),), (("text", 0, 11),), (1, 9, 7))
    state = memory([[2], [3]], [[4], [5], [7]], borders=[0, 8])
    past: list[Any] = [None, None]
    chosen = heads or [0, 1, 2]
    for step in (0, 1, 3):
        q = q.roll(step, dims=2)
        call = attention_call(
            q, k, v, kind="cross", groups=("uncond", "cond"), heads=heads, spans=spans,
            step=step, state=state,
        )  # fmt: skip
        out, stock = attnctl.Regulation(strength=0.7).attend(call), call.primitive()
        assert torch.equal(out[:2], stock[:2])
        others = [h for h in range(3) if h not in chosen]
        assert torch.equal(out[:, others], stock[:, others])
        for i, targets in enumerate([[[2], [3]], [[4], [5], [7]]]):
            z = oracles.logits(q, k)[2 + i, chosen]
            want, past[i] = explicit(
                z, v[2 + i, chosen], targets, [0, 8], slice(0, 11), grid,
                past=past[i], step=step, strength=0.7,
            )  # fmt: skip
            torch.testing.assert_close(out[2 + i, chosen], want, rtol=1e-6, atol=1e-8)
            assert not torch.allclose(want, stock[2 + i, chosen], rtol=1e-2)


@pytest.mark.parametrize("text_first", [False, True])
def test_joint_attention_equals_the_explicit_way(text_first: bool) -> None:
    """A' is over the text alone, S on the joint logits of image queries; text rows stay stock."""
    q, k, v = tensors(batch=1, heads=2, tokens=35 + 3 + 9, dim=8)
    spans = joint_spans(35, 9, text_first=text_first, grid=(1, 5, 7), refs=3)
    image, text = spans.queries("image"), spans.keys("text")
    assert image is not None and text is not None
    state = memory([[2], [3, 6]], borders=[0, 7])
    call = attention_call(q, k, v, kind="joint", groups=("cond",), spans=spans, state=state)
    out, stock = attnctl.Regulation(unit="phrase").attend(call), call.primitive()
    places = [[text.start + p for p in one] for one in ([2], [3, 6])]
    borders = [text.start, text.start + 7]
    z = oracles.logits(q, k)[0, :, image]
    want, _ = explicit(z, v[0], places, borders, text, (1, 5, 7))
    torch.testing.assert_close(out[0, :, image], want, rtol=1e-6, atol=1e-8)
    others = [i for i in range(47) if not image.start <= i < image.stop]
    assert torch.equal(out[:, :, others], stock[:, :, others])


def test_what_controls_further_in_did_is_kept() -> None:
    q, k, v = tensors(batch=1, heads=2, tokens=35, keys=9, dim=8)
    spans = Spans((("image", 0, 35),), (("text", 0, 9),), (1, 5, 7))
    both = {"kind": "cross", "groups": ("cond",), "spans": spans}
    plain = attention_call(q, k, v, **both, state=memory([[2]], borders=[0]))

    class Plus:
        def attend(self, call: attnctl.AttentionCall) -> Tensor:
            return call.proceed() + 3

    stacked = attention_call(q, k, v, **both, state=memory([[2]], borders=[0]))
    stacked.rest = (Plus(),)  # type: ignore[assignment]
    control = attnctl.Regulation()
    torch.testing.assert_close(control.attend(stacked), control.attend(plain) + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_its_rounding(dtype: torch.dtype) -> None:
    q, k, v = tensors(batch=1, heads=4, tokens=256, keys=20, dim=16, dtype=dtype)
    spans = Spans((("image", 0, 256),), (("text", 0, 20),), (1, 16, 16))
    both = {"kind": "cross", "groups": ("cond",), "spans": spans}
    half = attention_call(q, k, v, **both, state=memory([[2], [5]], borders=[0]))
    wide = attention_call(
        q.double(), k.double(), v.double(), **both, state=memory([[2], [5]], borders=[0])
    )
    out, want = (attnctl.Regulation().attend(call) for call in (half, wide))
    assert out.dtype == dtype
    error = (out.double() - want).norm() / want.norm()
    assert error < torch.finfo(dtype).eps


def test_columns_that_are_not_put_back_change_too() -> None:
    q, k, v = tensors(batch=1, heads=2, tokens=35, keys=9, dim=8)
    spans = Spans((("image", 0, 35),), (("text", 0, 9),), (1, 5, 7))
    call = attention_call(
        q, k, v, kind="cross", groups=("cond",), spans=spans, state=memory([[2]], borders=[])
    )
    want, _ = explicit(oracles.logits(q, k)[0], v[0], [[2]], [], slice(0, 9), (1, 5, 7))
    out = attnctl.Regulation(restore=None).attend(call)
    torch.testing.assert_close(out[0], want, rtol=1e-6, atol=1e-8)


def test_gradients_reach_the_queries() -> None:
    q, k, v = tensors(batch=1, heads=2, tokens=16, keys=7, dim=4)
    spans = Spans((("image", 0, 16),), (("text", 0, 7),), (1, 4, 4))
    q.requires_grad_()
    call = attention_call(
        q, k, v, kind="cross", groups=("cond",), spans=spans, state=memory([[2]], borders=[0])
    )
    (slope,) = torch.autograd.grad(attnctl.Regulation().attend(call).square().sum(), q)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0


# -- words --------------------------------------------------------------------------------------


def test_tokens_that_begin_and_end_a_prompt() -> None:
    assert border_tokens(shipped("tiny-sd"), "a red circle and a blue square") == (0, 8)
    assert border_tokens(shipped("tiny-sd"), "") == (0, 1)
    # T5 has no token at the beginning; its tokens come after CLIP's 20
    assert border_tokens(shipped("tiny-sd3"), "a red circle and a blue square") == (0, 8, 27)


def groups_of(prompt: str, **options: Any) -> list[list[int]]:
    return attnctl.Regulation(**options).groups(Prompt(shipped("tiny-sd"), prompt))


def test_targets_of_a_prompt() -> None:
    prompt = "a red circle and a blue square"
    assert groups_of(prompt) == [[2], [3], [6], [7]]
    assert groups_of(prompt, unit="phrase") == [[2, 3], [6, 7]]
    assert groups_of(prompt, targets="nouns") == [[3], [7]]
    assert groups_of(prompt, targets="circle, blue") == [[3], [6]]
    assert groups_of(prompt, targets=["blue square", "square"]) == [[6], [7]]
    assert groups_of("a red cat and a red dog", targets="red#2")
    with pytest.raises(attnctl.OptionError, match="belongs to 'blue square' and to another"):
        groups_of(prompt, targets=["blue square", "square"], unit="phrase")
    with pytest.raises(attnctl.OptionError, match="not in the prompt"):
        groups_of(prompt, targets="ring")
    with pytest.raises(attnctl.OptionError, match="stands 2 times"):
        groups_of("a red cat and a red dog", targets="red")


def test_prompts_of_a_run_are_those_of_its_call() -> None:
    pipe = shipped("tiny-sd")
    run = Run({"prompt": ["a ring", "a star"], "prompt_2": None}, pipe)
    assert [prompt.text for prompt in prompts_of(run)] == ["a ring", "a star"]
    assert [prompt.text for prompt in prompts_of(Run({}, pipe))] == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "finite, 0 or above"),
        ({"peak": 0.0}, r"in \(0, 1\]"),
        ({"iterations": -1}, "0 or above"),
        ({"rate": 0.0}, "above 0"),
        ({"smoothing": 1.0}, r"in \[0, 1\)"),
        ({"unit": "letter"}, "token or phrase"),
        ({"restore": "ends"}, "token positions"),
        ({"restore": [-1]}, "token positions"),
        ({"start": 0.6}, "window"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.Regulation(**options)


# -- models -------------------------------------------------------------------------------------

CALL = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}


def draw(pipe: Any, prompts: list[str], seeds: list[int], **call: Any) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    if hasattr(pipe, "transformer"):
        call = {"max_sequence_length": 16, **call}
    return pipe(prompts, generator=noise, **{**CALL, **call}).images


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_on_a_shipped_model(name: str) -> None:
    """Mixed prompts in a batch are what each is alone; neutral options and undo are exact."""
    pipe, prompts = shipped(name), ["a red circle and a blue square", "a small green ring"]
    stock = draw(pipe, prompts, [1, 2])
    notes: list[Regulated] = []
    with attnctl.patch(pipe, attnctl.Regulation(sink=notes.append)) as handle:
        both = draw(pipe, prompts, [1, 2])
        line = handle.report().lines[0]
        assert line.sites == line.sites_hit > 0 and line.steps == (0, 1)
        # rounding grows in the descent; the effect itself is of the order of 0.1
        torch.testing.assert_close(draw(pipe, prompts[1:], [2])[0], both[1], rtol=0, atol=0.03)
    assert not torch.allclose(both, stock, atol=0.1)
    assert torch.equal(draw(pipe, prompts, [1, 2]), stock)
    assert len(notes) == 2 * 2 * line.sites  # two calls of two regulated steps
    for note in notes:
        assert (note.optimum.loss <= note.optimum.first).all()
    for off in ({"strength": 0.0}, {"iterations": 0}, {"stop": 0.0}):
        assert attnctl.Regulation(**off).neutral
    with attnctl.patch(pipe, attnctl.Regulation(strength=0.0)):
        assert torch.equal(draw(pipe, prompts, [1, 2]), stock)


def test_the_neglected_words_get_their_area() -> None:
    """What the method promises, on a real model: the least of the targets' areas rises."""
    notes: list[Regulated] = []
    with attnctl.patch(shipped("tiny-sd"), attnctl.Regulation(sink=notes.append, heads="up")):
        draw(shipped("tiny-sd"), ["a red circle and a blue square"], [3])
    before, after = torch.stack([note.area for note in notes]).amin(-1).mean((0, 2))
    assert after > 1.5 * before


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan", "mochi", "pixart"])
def test_batches_of_every_kind_of_family(name: str) -> None:
    try:
        pipe = zoo.FAMILIES[name].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))
    with attnctl.patch(pipe, attnctl.Regulation(**WORDS, stop=1.0)):
        together = zoo.run(pipe, batch=2, num_images=2)
        alone = zoo.run(pipe, batch=1, num_images=1)
    torch.testing.assert_close(together[:1], alone[:1], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_known_is_refused() -> None:
    pipe = zoo.FAMILIES["sd1"].build()
    for options, message in (
        ({"targets": [[1]]}, "begins and ends is read from its text"),
        ({"targets": ["cat"], "restore": None}, "not with embeddings"),
        ({"targets": [[500]], "restore": None}, "token position 500"),
    ):
        control = attnctl.Regulation(**options)
        with pytest.raises(attnctl.HostError, match=message), attnctl.patch(pipe, control):
            zoo.run(pipe)


def test_the_placebo_takes_as_many_other_tokens() -> None:
    from attnctl.apps.bench.placebo import placebos

    pipe, prompt = shipped("tiny-sd"), Prompt(shipped("tiny-sd"), "a red circle and a blue square")
    control = attnctl.Regulation(unit="phrase")
    made = placebos(control, attnctl.sites(pipe), seed=5)["other prompt tokens"]
    other: Any = made
    drawn = other.groups(prompt)
    assert [len(one) for one in drawn] == [2, 2] and drawn == other.groups(prompt)
    taken = {0, 8, 2, 3, 6, 7}
    assert not taken & {p for one in drawn for p in one}
    assert other.unit == "phrase"
