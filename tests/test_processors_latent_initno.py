"""InitNO: its parts against second implementations in float64, its search against a loop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.hosts.latents import noise_size
from attnctl.processors.latent import maps as maps_module
from attnctl.processors.latent.engine import Maps
from attnctl.processors.latent.initno import (
    InitNO,
    blob,
    divergence_from_normal,
    otsu,
    stray,
    within,
)
from attnctl.processors.latent.maps import Seen, image_rows, of_sample, smoothed
from attnctl.processors.latent.targets import Target
from attnctl.records import Step
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import sdpa_inputs, tensors

WORDS = [[1], [2]]
PROMPTS = ["a red circle and a blue square", "a green ring and a yellow star"]
ONE_LOOK: dict[str, Any] = {"rounds": 1, "round_steps": 1, "last_steps": 0}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def same(got: Tensor, want: Any, tolerance: float = 1e-12) -> None:
    wanted = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), wanted, rtol=0, atol=tolerance)


def close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return one.shape == two.shape and float((one - two).norm()) < tolerance * float(two.norm())


# -- rows of the image's own attention ------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_image_rows_equal_those_of_the_whole_map(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites of other heads, an odd grid; no other row is made, and gradients are the same."""
    grid, places = (1, 5, 7), torch.tensor([3, 34, 3])
    sites, explicit, leaves = [], [], []
    for seed, heads in enumerate((2, 3)):
        q, k, _ = tensors(batch=2, heads=heads, tokens=35, keys=35, dim=5, seed=seed)
        q, k = q.requires_grad_(True), k.requires_grad_(True)
        mask = random(2, 1, 35, 35, seed=seed) > 0.3 if masked else None
        leaves += [q, k]
        sites.append(of_sample([Seen(q, k, mask, 0.4, grid)], 1, 2))
        explicit.append(oracles.softmax_map(q, k, mask, 0.4)[1])
    want = torch.cat(explicit).mean(0)[places].reshape(3, *grid)
    made: list[torch.Size] = []
    stock = maps_module.mean_map

    def note(q: Tensor, *rest: Any) -> Tensor:
        made.append(q.shape)
        return stock(q, *rest)

    monkeypatch.setattr(maps_module, "mean_map", note)
    got = image_rows(sites, places)
    assert made == [(1, 2, 3, 5), (1, 3, 3, 5)]
    same(got, want.detach())
    weights = random(*got.shape, seed=9)
    ours, theirs = (torch.autograd.grad((m * weights).sum(), leaves) for m in (got, want))
    for one, two in zip(ours, theirs, strict=True):
        same(one, two)


def test_rows_of_joint_attention_are_divided_by_their_sum() -> None:
    q, k, _ = tensors(heads=2, tokens=12, keys=12, dim=6)  # 9 image tokens, then 3 of text
    block = oracles.softmax_map(q, k)[0, :, :9, :9]
    want = (block / block.sum(-1, keepdim=True)).mean(0)[[4]]
    seen = Seen(q[:1, :, :9], k[:1, :, :9], None, 6**-0.5, (1, 3, 3))
    same(image_rows([seen], torch.tensor([4])), want.reshape(1, 1, 3, 3))


def test_samples_of_a_site_that_is_called_once_for_each() -> None:
    q, k, _ = tensors(batch=3, heads=2, tokens=6, keys=6, dim=4)
    together = [Seen(q, k, None, 1.0, (1, 2, 3))]
    each = [Seen(q[i : i + 1], k[i : i + 1], None, 1.0, (1, 2, 3)) for i in range(3)]
    for i in range(3):
        same(of_sample(together, i, 3).q, of_sample(each, i, 3).q)
    with pytest.raises(attnctl.HostError, match="3 attention rows for 2 samples"):
        of_sample(together, 0, 2)


# -- the parts of the loss ------------------------------------------------------------------------


def otsu_by_hand(values: list[float]) -> float:
    levels = [int(v * 255) for v in values]
    best, found = -1.0, 0
    for level in range(256):
        low = [v for v in levels if v <= level]
        high = [v for v in levels if v > level]
        if low and high:
            apart = sum(low) / len(low) - sum(high) / len(high)
            spread = len(low) * len(high) * apart**2
            if spread > best * (1 + 1e-12):
                best, found = spread, level
    return found / 255


def blob_by_hand(mask: Tensor, start: tuple[int, ...]) -> set[tuple[int, ...]]:
    found, queue = {start}, deque([start])
    while queue:
        at = queue.popleft()
        for axis, step in itertools.product(range(3), (-1, 1)):
            there = tuple(v + step * (i == axis) for i, v in enumerate(at))
            inside = all(0 <= v < size for v, size in zip(there, mask.shape, strict=True))
            if inside and there not in found and bool(mask[there]):
                found.add(there)
                queue.append(there)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_main_blob_and_what_lies_outside(seed: int) -> None:
    one = smoothed(random(2, 7, 9, seed=seed) ** 4)
    threshold = otsu_by_hand(one.flatten().tolist())
    same(otsu(one), threshold, 1e-7)
    mask = one >= threshold
    peak = max(itertools.product(range(2), range(7), range(9)), key=lambda at: float(one[at]))
    inside = blob_by_hand(mask, peak)
    got = blob(mask, one.argmax())
    assert {tuple(at) for at in got.nonzero().tolist()} == inside
    assert 0 < len(inside) < int(mask.sum())  # there is more than one blob
    every = set(itertools.product(range(2), range(7), range(9)))
    outside = max(float(one[at]) for at in every - inside)
    lowest = min(float(one[at]) for at in inside)
    same(stray(one), outside if outside > lowest else 0.0)


def test_one_blob_has_no_strays() -> None:
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(5.0), indexing="ij")
    one = torch.exp(-((y - 2) ** 2 + (x - 3) ** 2) / 3)[None]
    assert stray(one) == 0
    assert torch.isfinite(stray(torch.full((1, 3, 3), 0.2)))
    assert otsu(torch.full((1, 3, 3), torch.nan)) == 0  # such samples are skipped later, by name


def test_the_bound_on_the_divergence() -> None:
    mu, log_var = 2 * random(3, 4, 5) - 1, 2 * random(3, 4, 5, seed=1) - 1
    mu[1], log_var[1] = mu[1] / 100, log_var[1] / 100
    normal = torch.distributions.Normal(0.0, 1.0)
    mine = torch.distributions.Normal(mu, (log_var / 2).exp())
    same(
        divergence_from_normal(mu, log_var),
        torch.distributions.kl_divergence(mine, normal).mean((1, 2)),
    )
    new_mu, new_var = within(mu, log_var, 1e-3)
    got = divergence_from_normal(new_mu, new_var)
    assert torch.equal(new_mu[1], mu[1]) and torch.equal(new_var[1], log_var[1])
    torch.testing.assert_close(got[[0, 2]], torch.full((2,), 1e-3).double(), rtol=1e-5, atol=0)
    ratio = new_mu / mu
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    torch.testing.assert_close(new_var / log_var, ratio)


def objects_by_hand(text: Tensor, tokens: list[int]) -> list[Tensor]:
    inner = torch.exp(100 * text[1:-1])
    return [smoothed((inner[i - 1] / inner.sum(0))[None])[0] for i in tokens]


@pytest.mark.parametrize("seed", range(4))
def test_losses_by_hand(seed: int) -> None:
    """L in the search, in refinement and between, on maps [tokens, 1, 5, 7] made at random."""
    text = (random(9, 1, 5, 7, seed=seed) * (1 + seed)).softmax(0)
    q, k, _ = tensors(heads=2, tokens=35, keys=35, dim=3, seed=seed + 50)
    rows = oracles.softmax_map(q, k, scale=2.0)[0].mean(0).reshape(35, 1, 5, 7)
    targets = tuple(Target((i,)) for i in (2, 4, 7))
    maps = Maps(text, targets, Step(0, 10), image=(Seen(q, k, None, 2.0, (1, 5, 7)),))
    found = objects_by_hand(text, [2, 4, 7])
    cross = max(1 - float(one.max()) for one in found)
    mine = [smoothed(rows[int(one.argmax())]) for one in found]
    pairs = [
        float(torch.minimum(a, b).sum() / (a + b).sum())
        for a, b in itertools.combinations(mine, 2)
    ]
    apart, strays = sum(pairs) / 3, sum(float(stray(one)) for one in found)
    control = InitNO(conflict=2.0, clean=3.0)
    loss = control.loss(maps, {})
    same(loss, cross)
    same(control.refining(maps, loss), cross + 2 * apart + 0.3 * strays)
    wanted = cross + (2 * apart if cross <= 0.5 else 0) + 3 * strays
    same(control._joint(maps)[0], wanted)
    same(control.shortfall(maps, loss), max(cross, apart * 0.2 / 0.3))
    same(InitNO(conflict=0.0, clean=0.0).refining(maps, loss), cross)


# -- the search against a loop by hand ------------------------------------------------------------


def look_by_hand(model: Any, inputs: dict[str, Any], joint: bool, monkeypatch: Any) -> Any:
    """Maps of all text tokens and of all image rows on the grid, from every attention call."""
    calls = sdpa_inputs(model, inputs, monkeypatch)
    text = inputs["encoder_hidden_states"].shape[1]
    cross, own = [], []
    finest = max(q.shape[2] for q, _ in calls)
    for q, k in calls:
        if q.shape[2] != finest:
            continue
        z = q @ k.mT / q.shape[-1] ** 0.5
        if joint:  # image tokens, then text tokens
            cross.append(z[:, :, :-text, -text:].softmax(-1))
            own.append(z[:, :, :-text, :-text].softmax(-1))
        else:
            (cross if k.shape[2] == text else own).append(z.softmax(-1))
    return torch.cat(cross, 1).mean(1), torch.cat(own, 1).mean(1)


def loss_by_hand(model: Any, inputs: dict[str, Any], grid: Any, joint: bool, patch: Any) -> Any:
    """L of one sample for the tokens 1 and 2 without L_clean, and its two parts."""
    cross, own = look_by_hand(model, inputs, joint, patch)
    text = cross[0].T.reshape(-1, 1, *grid)
    found = objects_by_hand(text, [1, 2])
    loud = torch.stack([1 - one.max() for one in found]).max()
    a, b = (smoothed(own[0, int(one.argmax())].reshape(1, *grid)) for one in found)
    apart = torch.minimum(a, b).sum() / (a + b).sum()
    return loud + (apart if loud <= 0.5 else 0), float(loud.detach()), float(apart.detach())


@pytest.mark.parametrize(
    ("name", "scheduler"), [("sd1", "EulerDiscreteScheduler"), ("sd1", None), ("sd3", None)]
)
def test_the_search_equals_a_loop_by_hand(
    name: str, scheduler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds, new noise between them, the better one optimised again; the bound holds."""
    import diffusers

    pipe, joint = zoo.FAMILIES[name].build(), name == "sd3"
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"words": WORDS, "scale": 0.0, "clean": 0.0, "shrink": 1.0}
    budget = {"rounds": 2, "round_steps": 2, "last_steps": 3}
    control = InitNO(**options, **budget, rate=0.05, bound=1e-3, heads="all")
    moved: list[Tensor] = []
    stock = attnctl.ForwardCall.move_latents

    def note(call: attnctl.ForwardCall, x: Tensor) -> attnctl.ForwardCall:
        moved.append(x)
        sizes.append(float(noise_size(call.run)))
        return stock(call, x)

    sizes: list[float] = []
    call = zoo.FAMILIES[name].call(pipe, steps=3, batch=1)
    call["generator"] = [torch.Generator().manual_seed(3)]
    with monkeypatch.context() as patch, attnctl.patch(pipe, control) as handle:
        patch.setattr(attnctl.ForwardCall, "move_latents", note)
        pipe(**call)
        assert [line.steps for line in handle.report().lines] == [(0,)]

    model = pipe.transformer if joint else pipe.unet
    _, given = zoo.denoiser_calls(pipe, steps=3, limit=1, batch=1)[0]
    key = next(iter(given))
    cond = {
        k: v[1:] if isinstance(v, Tensor) and v.ndim and len(v) == 2 else v
        for k, v in given.items()
    }
    start = given[key][:1]
    size = sizes[0]
    assert (scheduler is None) == (size == 1.0)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(start.shape, generator=generator)
    first, second = size * drawn, size * torch.randn(start.shape, generator=generator)
    zoos = zoo.FAMILIES[name].call(pipe, steps=3, batch=1)["generator"]
    own = torch.randn(start.shape, generator=zoos[0] if isinstance(zoos, list) else zoos)
    assert close(size * own, start, 1e-5)  # new noise is as large as the run's own
    grid = (start.shape[-2], start.shape[-1])
    if joint:
        grid = (grid[0] // 2, grid[1] // 2)

    def optimised(noise: Tensor, steps: int) -> tuple[Tensor, float]:
        mu = torch.zeros_like(noise).requires_grad_(True)
        log_var = torch.zeros_like(noise).requires_grad_(True)
        adam = torch.optim.Adam([log_var, mu], lr=0.05, eps=1e-3)
        score = 0.0
        for _ in range(steps):
            x = size * (mu + (log_var / 2).exp() * noise / size)
            loss, loud, apart = loss_by_hand(model, {**cond, key: x}, grid, joint, monkeypatch)
            score = loud + (apart if loud <= 0.5 else 1)
            adam.zero_grad()
            loss.backward()
            adam.step()
            low, high = 0.0, 1.0  # the factor that keeps the bound, by bisection
            with torch.no_grad():
                if float(divergence_from_normal(mu, log_var)) > 1e-3:
                    for _ in range(40):
                        middle = (low + high) / 2
                        over = float(divergence_from_normal(middle * mu, middle * log_var)) > 1e-3
                        low, high = (low, middle) if over else (middle, high)
                    mu *= low
                    log_var *= low
        return (size * (mu + (log_var / 2).exp() * noise / size)).detach(), score

    scores = [optimised(noise, 2)[1] for noise in (first, second)]
    want, _ = optimised(first if scores[0] <= scores[1] else second, 3)
    assert len(moved) == 1 and close(moved[0], want, 2e-5)
    assert not close(moved[0], first, 1e-2)
    assert abs(scores[0] - scores[1]) > 1e-4  # so that it matters which noise was taken


# -- what must hold of the control ----------------------------------------------------------------


@functools.cache
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(prompts: Any, seeds: Any, control: InitNO | None = None) -> tuple[Tensor, Any]:
    """Latents of tiny-sd after two steps, and what the report adds."""
    pipe = tiny_sd()
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}
    if control is None:
        return pipe(prompts, generator=noise, **call).images, None
    with attnctl.patch(pipe, control) as handle:
        out = pipe(prompts, generator=noise, **call).images
        return out, handle.report().lines[0].account


def test_a_batch_of_different_prompts_is_each_of_them_alone() -> None:
    """The second one ends after its first round, the first one draws again."""
    control = InitNO(heads="L1-2", scale=3.0, updates=1, rounds=3, round_steps=2, last_steps=1,
                     tau_cross=0.1, tau_self=1.0)  # fmt: skip
    together, said = drawn(PROMPTS, [1, 2], control)
    assert len(set(said.rounds)) == 2 and any(said.met), str(said)
    for i in (0, 1):
        alone, mine = drawn(PROMPTS[i], [i + 1], control)
        assert close(together[i : i + 1], alone, 1e-3) and mine.rounds == said.rounds[i : i + 1]
    assert not close(together, drawn(PROMPTS, [1, 2])[0], 1e-2)


def test_neutral_options_and_noise_that_is_good_at_once() -> None:
    stock, _ = drawn(PROMPTS[0], [1])
    for options in ({"rounds": 0}, {"round_steps": 0}, {"stop": 0.0}):
        control = InitNO(**{"scale": 0.0, **options})
        assert control.neutral and torch.equal(drawn(PROMPTS[0], [1], control)[0], stock)
    easy = InitNO(scale=0.0, tau_cross=2.0, tau_self=2.0)
    got, said = drawn(PROMPTS[0], [1], easy)
    assert torch.equal(got, stock) and said.met == (True,) and said.rounds == (1,)
    assert "1 of 1 samples met both thresholds; rounds 1" in str(said)
    moves = InitNO(rounds=0, scale=3.0, updates=0)
    excite = attnctl.AttendAndExcite(scale=3.0, updates=0)
    same(drawn(PROMPTS[0], [1], moves)[0], drawn(PROMPTS[0], [1], excite)[0], 1e-6)  # type: ignore[arg-type]
    assert not torch.equal(drawn(PROMPTS[0], [1], InitNO(scale=0.0, **ONE_LOOK))[0], stock)


def test_a_search_lowers_its_loss() -> None:
    """On both samples, more steps of Adam end lower."""
    few, many = (
        drawn(PROMPTS, [1, 2], InitNO(heads="L1-2", scale=0.0, rounds=1, round_steps=steps,
              last_steps=0, rate=0.05, bound=0.1, tau_cross=1e-6, clean=0.0))[1].score
        for steps in (1, 8)
    )  # fmt: skip
    assert all(b < a - 0.02 for a, b in zip(few, many, strict=True)), (few, many)


def test_one_generator_for_all_samples_and_an_interrupt() -> None:
    pipe = tiny_sd()
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}

    def run() -> Tensor:
        out: Tensor = pipe(PROMPTS, generator=torch.Generator().manual_seed(5), **call).images
        return out

    stock = run()
    control = InitNO(
        heads="L1-2", scale=0.0, rounds=2, round_steps=1, last_steps=0, tau_cross=1e-6
    )
    with attnctl.patch(pipe, control):
        one, two = run(), run()
    assert torch.equal(one, two) and not close(one, stock, 1e-2) and torch.equal(run(), stock)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InitNO(rounds=-1), "rounds=-1"),
        (lambda: InitNO(clean=-1.0), "clean=-1"),
        (lambda: InitNO(rate=0.0), "rate=0"),
        (lambda: InitNO(bound=0.0), "bound=0"),
        (lambda: InitNO(start=0.2), "start=0.2 leaves out"),
        (lambda: InitNO(scale=-1.0), "scale"),
    ],
)
def test_options_outside_their_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        make()


def test_models_without_self_attention_maps_and_runs_that_begin_with_a_picture() -> None:
    sana = zoo.FAMILIES["sana"].build()
    control = InitNO(words=WORDS, scale=0.0, **ONE_LOOK)
    with pytest.raises(attnctl.HostError, match="give conflict=0"), attnctl.patch(sana, control):
        zoo.run(sana)
    only_cross = dataclasses.replace(control, conflict=0.0)
    before = zoo.run(sana)
    with attnctl.patch(sana, only_cross):
        assert not torch.equal(zoo.run(sana), before)
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64)
    with (
        pytest.raises(attnctl.HostError, match="image to image"),
        attnctl.patch(pipe, InitNO(scale=0.0, **ONE_LOOK)),
    ):
        pipe(PROMPTS[0], image=picture, strength=0.5, num_inference_steps=4)


def test_beside_other_controls() -> None:
    """Guidance sees the noise that was found, and A-STAR moves on from it."""
    pipe = tiny_sd()
    control = InitNO(
        heads="L1-2", scale=0.0, rounds=2, round_steps=1, last_steps=0, tau_cross=1e-6
    )
    call: dict[str, Any] = {
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }

    def run(*stack: attnctl.Control) -> Tensor:
        noise = [torch.Generator().manual_seed(1)]
        if not stack:
            return pipe(PROMPTS[0], generator=noise, **call).images
        with attnctl.patch(pipe, *stack):
            out: Tensor = pipe(PROMPTS[0], generator=noise, **call).images
        return out

    guidance, star = attnctl.SoftPAG(scale=1.0), attnctl.AStar(scale=3.0, heads="L1-2")
    assert close(run(control, guidance), run(guidance, control), 1e-5)
    both = run(control, star)
    for other in (run(control), run(star), run()):
        assert not close(both, other, 1e-3)


def test_half_precision() -> None:
    pipe, exact = (zoo.FAMILIES["sd1"].build() for _ in range(2))
    control = InitNO(words=WORDS, scale=0.0, rounds=1, round_steps=2, last_steps=0, rate=0.05,
                     bound=1.0, shrink=1.0)  # fmt: skip
    with attnctl.patch(exact, control):
        want = zoo.run(exact)
    for dtype in (torch.float16, torch.bfloat16):
        pipe = pipe.to(dtype)
        call = zoo.FAMILIES["sd1"].call(pipe)
        call = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
        with attnctl.patch(pipe, control):
            out = pipe(**call, return_dict=False)[0]
        assert torch.isfinite(out).all() and close(out.float(), want, 0.15)
    assert math.isfinite(float(want.norm())) and not close(want, zoo.run(exact), 1e-2)
