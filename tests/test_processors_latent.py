"""The latent engine: against loops by hand, and diffusers' own Attend-and-Excite pipeline."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.processors.latent import engine
from attnctl.processors.latent.engine import LatentControl, Maps
from attnctl.processors.latent.targets import Target, targets_of
from attnctl.testing import zoo
from attnctl.testing.calls import sdpa_inputs
from attnctl.words.prompts import Prompt

WORDS = [[1], [2]]
PROMPTS = ["a red circle and a blue square", "a green ring and a yellow star"]
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def build(name: str) -> Any:
    return zoo.FAMILIES[name].build()


def close(one: Tensor, two: Tensor, tolerance: float = 1e-4) -> bool:
    return one.shape == two.shape and float((one - two).norm()) < tolerance * float(two.norm())


@functools.cache
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(prompts: Any, seeds: Any, *controls: attnctl.Control, steps: int = 3) -> Tensor:
    """Latents of tiny-sd."""
    pipe = tiny_sd()
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": steps, "guidance_scale": 5.0, "output_type": "latent"}
    if not controls:
        return pipe(prompts, generator=noise, **call).images
    with attnctl.patch(pipe, *controls):
        return pipe(prompts, generator=noise, **call).images


@dataclasses.dataclass(frozen=True)
class Squares(LatentControl):
    """A loss that is easy to write by hand: the squares of one token's map."""

    name: ClassVar[str] = "squares-test"
    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        self.seen.append((maps.step.index, maps.text.shape))
        return maps.text[1].square().sum()


# -- against loops by hand --------------------------------------------------------------------


def squares(model: Any, inputs: dict[str, Any], n: int, monkeypatch: Any) -> Tensor:
    """The loss of `Squares` by explicit maps, from every attention call with text keys."""
    calls = sdpa_inputs(model, inputs, monkeypatch)
    text = inputs["encoder_hidden_states"].shape[1]
    maps = []
    for q, k in calls:
        if k.shape[2] == text:
            maps.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1))
        elif hasattr(model, "transformer_blocks"):  # joint: image tokens, then text tokens
            z = q[:, :, :-text] @ k[:, :, -text:].mT / q.shape[-1] ** 0.5
            maps.append(torch.softmax(z, -1))
    tokens = max(m.shape[2] for m in maps)
    return torch.cat([m for m in maps if m.shape[2] == tokens], 1).mean(1)[:, :, 1].square().sum()


@pytest.mark.parametrize(
    ("name", "scheduler"), [("sd1", None), ("sd1", "EulerDiscreteScheduler"), ("sd3", None)]
)
def test_equals_a_loop_by_hand(
    name: str, scheduler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents as the denoiser gets them go down the gradient; the scheduler gets them unscaled."""
    import diffusers

    pipe, steps = build(name), 4
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    control = Squares(words=WORDS, scale=500.0, stop=0.5, shrink=1.0)
    with attnctl.patch(pipe, control):
        got = zoo.run(pipe, steps=steps)
    assert {index for index, _ in control.seen} == {0, 1}

    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    given = zoo.denoiser_calls(pipe, steps=steps, limit=1)[0][1]
    key = next(iter(given))
    cond = {
        k: v[2:] if isinstance(v, Tensor) and v.ndim and len(v) == 4 else v
        for k, v in given.items()
    }
    call = zoo.FAMILIES[name].call(pipe, steps=steps)
    latents = given[key][:2]
    if name == "sd1":
        pipe.scheduler.set_timesteps(steps)
        cpu = torch.device("cpu")
        latents = pipe.prepare_latents(2, 4, 64, 96, torch.float32, cpu, call["generator"])
    pipe.scheduler.set_timesteps(steps)
    for i, time in enumerate(pipe.scheduler.timesteps):
        scale = getattr(pipe.scheduler, "scale_model_input", lambda x, t: x)
        x = scale(latents, time)
        factor = x.norm() / latents.norm()
        t = time if given["timestep"].ndim == 0 else time.expand(4)
        mine = {**cond, "timestep": t if t.ndim == 0 else t[:2]}
        if i < 2:
            leaf = x.clone().requires_grad_(True)
            loss = squares(model, {**mine, key: leaf}, 2, monkeypatch)
            (grad,) = torch.autograd.grad(loss, leaf)
            moved = x - 500 * (1 - 0.5 * i / 3) ** 0.5 * grad
            latents, x = moved / factor, moved
        with torch.no_grad():
            both = {**given, key: torch.cat([x, x]), "timestep": t}
            u, c = model(**both)[0].chunk(2)
        guided = u + zoo.core.CFG_SCALE * (c - u)
        latents = pipe.scheduler.step(guided, time, latents, return_dict=False)[0]
    assert close(got, latents) and not close(got, zoo.run(pipe, steps=steps), 1e-2)


def test_equals_the_pipeline_of_diffusers() -> None:
    """The deprecated Attend-and-Excite pipeline on tiny-sd, with refinement at the first step."""
    from diffusers import StableDiffusionAttendAndExcitePipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusionAttendAndExcitePipeline.from_pretrained(assets.path("tiny-sd"))
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    wanted = theirs(
        PROMPTS[0], token_indices=[3, 7], generator=torch.Generator().manual_seed(1),
        attn_res=(16, 16), max_iter_to_alter=2, thresholds={0: 0.15}, scale_factor=5, **options,
    ).images  # fmt: skip
    control = attnctl.AttendAndExcite(scale=5.0, shrink=1.0, reach=(0.15, 0.0, 0.0))
    got = drawn(PROMPTS[0], [1], control, steps=4)
    assert close(got, wanted, 1e-5)
    assert not close(drawn(PROMPTS[0], [1], steps=4), wanted, 1e-3)
    once = dataclasses.replace(control, updates=0)
    assert not close(drawn(PROMPTS[0], [1], once, steps=4), wanted, 1e-3)


# -- what must not matter ----------------------------------------------------------------------


CONTROLS = [
    attnctl.AStar(scale=3.0),
    attnctl.AttendAndExcite(scale=3.0, updates=2, reach=(0.3, 0.6, 0.9)),
    attnctl.Conform(scale=3.0, updates=1),
    attnctl.DivideAndBind(scale=3.0, updates=1),
    attnctl.SynGen(scale=3.0),
    attnctl.DisenDiff(scale=3.0),
]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.name)
def test_a_batch_of_different_prompts_is_each_of_them_alone(control: LatentControl) -> None:
    together = drawn(PROMPTS, [1, 2], control)
    for i in (0, 1):
        alone = drawn(PROMPTS[i], [i + 1], control)
        assert close(together[i : i + 1], alone, 1e-3)
    assert not close(together, drawn(PROMPTS, [1, 2]), 1e-3)


def test_samples_of_a_batch_a_few_at_a_time() -> None:
    """Prompts, memories and reports follow the samples; other controls keep them together."""
    prompts, seeds = [*PROMPTS, *reversed(PROMPTS), PROMPTS[1]], [1, 2, 3, 4, 5]
    sizes: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Noted(attnctl.AStar):
        def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
            assert memory.setdefault("sample", maps.sample) == maps.sample
            return super().loss(maps, memory)

        def direction(self, grad: Tensor) -> Tensor:
            sizes.append(len(grad))
            return super().direction(grad)

    control = Noted(scale=3.0)
    few = drawn(prompts, seeds, control, steps=2)
    assert sizes == [2, 2, 1] * 2
    for at_once, want in ((1, [1] * 5), (8, [5])):
        sizes.clear()
        other = drawn(prompts, seeds, dataclasses.replace(control, at_once=at_once), steps=2)
        assert close(few, other, 1e-4) and sizes == want * 2
    assert not close(few, drawn(prompts, seeds, steps=2), 1e-3)
    sizes.clear()
    drawn(prompts, seeds, control, attnctl.HeatMap(["and"], sink=lambda maps: None), steps=1)
    assert sizes == [5]


def test_grad_modes_of_the_caller_and_gradients_of_the_weights() -> None:
    pipe, control = build("sd1"), Squares(words=WORDS, scale=300.0)
    weights = list(pipe.unet.parameters())
    weights[0].requires_grad_(False)
    before = [p.requires_grad for p in weights]
    with attnctl.patch(pipe, control):
        want = zoo.run(pipe)
        with torch.inference_mode():
            got = pipe(**zoo.FAMILIES["sd1"].call(pipe), return_dict=False)[0]
    assert torch.equal(got.clone(), want)
    assert [p.requires_grad for p in weights] == before
    assert all(p.grad is None for p in weights)


@dataclasses.dataclass(frozen=True)
class Failing(Squares):
    """Breaks off in the gradient pass."""

    name: ClassVar[str] = "failing-test"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupt_in_the_gradient_pass_leaves_nothing_behind() -> None:
    pipe = build("sd1")
    stock = zoo.run(pipe)
    with (
        pytest.raises(KeyboardInterrupt),
        attnctl.patch(pipe, Failing(words=WORDS, checkpoint=True)),
    ):
        zoo.run(pipe)
    assert torch.equal(zoo.run(pipe), stock)
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not pipe.unet.is_gradient_checkpointing


def test_the_modules_are_walked_through_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk takes as long as many layers; nothing of it changes from step to step."""
    pipe = build("sd1")
    asked: list[Any] = []
    monkeypatch.setattr(engine, "_may_end", lambda call: not asked.append(call))
    with attnctl.patch(pipe, attnctl.AStar(WORDS, scale=1.0)):
        zoo.run(pipe, steps=4)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_checkpointing_and_ending_early_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build(name)
    heads = "down" if name == "sd1" else "L1"
    control = Squares(words=WORDS, scale=300.0, heads=heads)
    with attnctl.patch(pipe, control):
        early = zoo.run(pipe)
    with attnctl.patch(pipe, dataclasses.replace(control, checkpoint=True)):
        checkpointed = zoo.run(pipe)
    monkeypatch.setattr(engine, "_may_end", lambda call: False)
    with attnctl.patch(pipe, control):
        whole = zoo.run(pipe)
    assert torch.equal(early, whole) and close(checkpointed, whole, 1e-5)
    assert not close(whole, zoo.run(pipe), 1e-3)


@pytest.mark.parametrize(
    ("name", "blocks"), [("sd3", "transformer_blocks"), ("flux", "single_transformer_blocks")]
)
def test_blocks_after_the_last_site_do_not_run_in_later_gradient_passes(
    name: str, blocks: str
) -> None:
    """FLUX's pipeline leaves an empty registry of hooks on its denoiser."""
    pipe = build(name)
    runs: list[bool] = []
    getattr(pipe.transformer, blocks)[-1].register_forward_pre_hook(
        lambda *_: runs.append(torch.is_grad_enabled())
    )
    with attnctl.patch(pipe, Squares(words=WORDS, heads="L0")):
        zoo.run(pipe, steps=3)
    # the first pass finds out which sites there are; then come the steps' own calls
    assert runs[0] and len(runs) > 3 and not any(runs[1:])


def test_a_site_that_attends_to_an_image_before_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan from an image: its last site's first call is not the one that is needed."""
    pipe, control = build("wan-i2v"), Squares(words=WORDS, scale=3e4)
    with attnctl.patch(pipe, control):
        early = zoo.run(pipe)
    monkeypatch.setattr(engine, "_may_end", lambda call: False)
    with attnctl.patch(pipe, control):
        assert torch.equal(early, zoo.run(pipe))
    assert not close(early, zoo.run(pipe), 1e-3)


def test_a_compiled_denoiser() -> None:
    pipe, control = build("sd1"), Squares(words=WORDS, scale=300.0)
    with attnctl.patch(pipe, control):
        want = zoo.run(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with attnctl.patch(pipe, control):
        assert close(zoo.run(pipe), want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    pipe, exact = build(name).to(dtype), build(name)
    call = zoo.FAMILIES[name].call(pipe)
    call = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
    control = Squares(words=WORDS, scale=100.0)
    with warnings.catch_warnings(), attnctl.patch(pipe, control):
        warnings.simplefilter("error", attnctl.AttnctlWarning)
        out = pipe(**call, return_dict=False)[0]
    with attnctl.patch(exact, control):
        want = zoo.run(exact)
    assert close(out.float(), want, 0.1) and not close(want, zoo.run(exact), 0.1)


@dataclasses.dataclass(frozen=True)
class Broken(Squares):
    """Gives the last sample of three a gradient that is not finite."""

    name: ClassVar[str] = "broken-test"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        return super().loss(maps, memory) * (float("inf") if maps.sample == 2 else 1.0)


def test_samples_without_a_finite_gradient_stay_and_are_reported() -> None:
    pipe = build("sd1")
    stock = zoo.run(pipe, batch=3)
    with attnctl.patch(pipe, Squares(words=WORDS, scale=300.0)):
        want = zoo.run(pipe, batch=3)
    with (
        attnctl.patch(pipe, Broken(words=WORDS, scale=300.0)),
        pytest.warns(attnctl.AttnctlWarning, match="sample 2 at step 0 is not finite"),
    ):
        got = zoo.run(pipe, batch=3)
    assert close(got[:2], want[:2], 1e-5) and close(got[2:], stock[2:], 1e-5)


# -- beside other controls ---------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("name", ["sd1", "wan", "flux"])
def test_guidance_sees_the_moved_latents_in_either_order(name: str, passes: Any) -> None:
    pipe, steer = build(name), Squares(words=WORDS, scale=300.0)
    guidance = attnctl.SoftPAG(scale=1.0, passes=passes)
    with attnctl.patch(pipe, steer, guidance):
        outer = zoo.run(pipe)
    with attnctl.patch(pipe, guidance, steer):
        inner = zoo.run(pipe)
    assert close(outer, inner, 1e-5)
    with attnctl.patch(pipe, guidance):
        assert not close(zoo.run(pipe), inner, 1e-4)


def test_two_of_them_move_one_after_the_other() -> None:
    """As one that moves the latents twice in the same step."""
    pipe = build("sd3")
    options: dict[str, Any] = {"words": WORDS, "scale": 300.0, "stop": 0.3}
    with attnctl.patch(pipe, Squares(**options), Squares(**options)):
        got = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, Squares(**options, updates=1, reach=(1.0, 1.0, 1.0))):
        assert close(got, zoo.run(pipe, steps=3), 1e-5)
    with attnctl.patch(pipe, Squares(**options)):
        assert not close(got, zoo.run(pipe, steps=3), 1e-3)


def test_a_star_and_attend_and_excite_in_one_stack() -> None:
    """Each moves what the other left, once a step, with maps of its own passes."""
    pipe, star, excite = tiny_sd(), CONTROLS[0], attnctl.AttendAndExcite(scale=3.0, updates=0)
    moved: list[tuple[Tensor, Tensor]] = []
    stock = attnctl.ForwardCall.move_latents

    def note(call: attnctl.ForwardCall, x: Tensor) -> attnctl.ForwardCall:
        moved.append((call.latents, x))
        return stock(call, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnctl.ForwardCall, "move_latents", note)
        both = drawn(PROMPTS[0], [1], star, excite)
    assert len(moved) == 2 * 2 + 1  # Attend-and-Excite ends at half of three steps, after two
    for (_, first), (second, _) in (moved[:2], moved[2:4]):
        torch.testing.assert_close(first.to(second), second, rtol=1e-5, atol=1e-6)
    for alone in ((star,), (excite,), ()):
        assert not close(drawn(PROMPTS[0], [1], *alone), both, 1e-4)
    with attnctl.patch(pipe, star, excite) as handle:
        pipe(PROMPTS[0], num_inference_steps=3, output_type="latent")
        assert [line.steps for line in handle.report().lines] == [(0, 1, 2), (0, 1)]


@dataclasses.dataclass(frozen=True)
class Straight(LatentControl):
    """The sum over a token's map; moves of small size do not change its gradient much."""

    normalise: bool = True
    name: ClassVar[str] = "straight-test"

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        return maps.text[1].sum()


def moves(control: LatentControl) -> list[tuple[Tensor, Tensor]]:
    """Latents before and after each move, in three steps of a tiny SD3."""
    pipe, found = build("sd3"), []
    stock = attnctl.ForwardCall.move_latents

    def note(call: attnctl.ForwardCall, x: Tensor) -> attnctl.ForwardCall:
        found.append((call.latents.flatten(1), x.flatten(1)))
        return stock(call, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attnctl.ForwardCall, "move_latents", note)
        with attnctl.patch(pipe, control):
            zoo.run(pipe, steps=3)
    return found


def test_normalised_moves_have_the_size_asked_for() -> None:
    found = moves(Straight(words=WORDS, scale=0.02))
    wanted = [0.02 * (1 - 0.5 * i / 2) ** 0.5 for i in range(3)]
    for (before, after), want in zip(found, wanted, strict=True):
        sizes = (after - before).square().mean(1).sqrt()
        torch.testing.assert_close(sizes, torch.full_like(sizes, want), rtol=1e-3, atol=0)


def test_moves_that_keep_the_norm() -> None:
    found = moves(Straight(words=WORDS, scale=0.5, keep_norm=True))
    assert len(found) == 3
    for before, after in found:
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1), rtol=1e-5, atol=0)
        assert not close(before, after, 0.1)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: c.name)
def test_neutral_options_and_windows(control: LatentControl) -> None:
    stock = drawn(PROMPTS[0], [1])
    assert torch.equal(drawn(PROMPTS[0], [1], dataclasses.replace(control, scale=0.0)), stock)
    assert torch.equal(
        drawn(PROMPTS[0], [1], dataclasses.replace(control, start=0.5, stop=0.5)), stock
    )
    pipe = tiny_sd()
    with attnctl.patch(pipe, dataclasses.replace(control, start=0.3, stop=0.6)) as handle:
        pipe(PROMPTS[0], num_inference_steps=4, output_type="latent")
        assert handle.report().lines[0].steps == (2,)


# -- what they do ------------------------------------------------------------------------------


def test_a_star_keeps_two_objects_apart() -> None:
    """The overlap of the two nouns' maps, seen by a control of its own, falls."""
    want = [overlap_of(), overlap_of(attnctl.AStar(scale=4.0, heads="L1-2"))]
    assert want[1] < 0.9 * want[0]


def overlap_of(*controls: attnctl.Control) -> float:
    from attnctl.processors.latent.a_star import segregation

    found: list[float] = []

    @dataclasses.dataclass(frozen=True)
    class Look(LatentControl):
        name: ClassVar[str] = "look-test"

        def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
            found.append(float(segregation(maps.objects(maps.sharp()).detach())))
            return maps.text.sum() * 0

    drawn(PROMPTS, [1, 2], *controls, Look(heads="L1-2"), steps=6)
    return sum(found) / len(found)


def test_a_layout_says_where_things_are() -> None:
    """The share of the first noun's map in the left half, with it there and on the right."""
    mask = torch.zeros(4, 4)
    mask[:, :2] = 1
    shares = []
    for layout in ([LEFT, RIGHT], {"circle": RIGHT, "square": LEFT}, [mask, 1 - mask]):
        control = attnctl.AStar(
            scale=0.05, normalise=True, heads="L1-2", segregate=0.0, layout=layout, decay=1.0
        )
        pipe = tiny_sd()
        with attnctl.patch(pipe, control):
            found = attnctl.heatmaps(
                pipe, PROMPTS[0], ["circle"], heads="L1-2", start=0.5, num_inference_steps=8,
                output_type="latent", generator=torch.Generator().manual_seed(0),
            )["circle"][0]  # fmt: skip
        shares.append(float(found[:, :4].sum() / found.sum()))
    assert shares[0] > shares[1] + 0.1
    assert shares[2] == pytest.approx(shares[0], abs=0.02)


def test_objects_are_drawn_where_a_layout_says() -> None:
    """Red left of blue, then the other way, from the same noise."""
    pipe, across = tiny_sd(), torch.arange(64.0)
    for layout, left in (([LEFT, RIGHT], True), ([RIGHT, LEFT], False)):
        control = attnctl.AStar(layout=layout, segregate=0.0, heads="L1-2", keep_norm=True)
        noise = [torch.Generator().manual_seed(seed) for seed in range(6)]
        with attnctl.patch(pipe, control):
            pictures = pipe(
                PROMPTS[:1] * 6, generator=noise, num_inference_steps=12, guidance_scale=5.0,
                output_type="pt",
            ).images  # fmt: skip
        middles = []
        for channel in (0, 2):
            others = [i for i in range(3) if i != channel]
            mine = (pictures[:, channel] - pictures[:, others].amax(1) - 0.2).clamp_min(0)
            middles.append((mine * across).sum((1, 2)) / mine.sum((1, 2)).clamp_min(1e-6))
        assert int(((middles[0] < middles[1]) == left).sum()) >= 5


def test_forms_of_a_layout() -> None:
    """Phrases in any order, a word, discs and arrays; each prompt of a batch its own."""

    def placed(layout: Any, prompts: Any = PROMPTS[0], seeds: Any = (1,)) -> Tensor:
        control = attnctl.AStar(scale=3.0, layout=layout)
        return drawn(prompts, list(seeds), control)

    listed = placed([LEFT, RIGHT])
    assert not close(listed, placed([RIGHT, LEFT]), 1e-2)
    for same in (
        {"red circle": LEFT, "blue square": RIGHT},
        {"blue square": RIGHT, "red circle": LEFT},
        "row",
    ):
        assert close(listed, placed(same), 1e-5)
    mask = torch.zeros(4, 4)
    mask[:2, :2] = 1
    corner = placed([mask, 1 - mask])
    assert torch.equal(corner, placed([mask.bool().numpy(), (1 - mask).numpy()]))
    assert not close(corner, placed([(0.2, 0.2), (0.7, 0.7, 0.3)]), 1e-3)

    other = {"star": LEFT, "ring": RIGHT}
    first, second = placed([LEFT, RIGHT]), placed(other, PROMPTS[1], [2])
    both = placed([{"circle": LEFT, "square": RIGHT}, other], PROMPTS, [1, 2])
    assert close(both, torch.cat([first, second]))
    assert not close(second, placed([LEFT, RIGHT], PROMPTS[1], [2]), 1e-2)


# -- words and errors --------------------------------------------------------------------------


def test_objects_of_a_prompt() -> None:
    prompt = Prompt(tiny_sd(), PROMPTS[0])
    circle, square = Target((3,), ((2,),)), Target((7,), ((6,),))
    assert targets_of(prompt, None) == (circle, square)
    assert targets_of(prompt, "red circle, blue square") == (circle, square)
    assert targets_of(prompt, attnctl.concepts(PROMPTS[0])) == (circle, square)
    assert targets_of(prompt, ["circle", [7]]) == (Target((3,)), Target((7,)))
    assert targets_of(Prompt(tiny_sd(), None), [[[2], [3]], [7]]) == (circle, Target((7,)))
    twice = Prompt(tiny_sd(), "a red circle and a red square")
    assert targets_of(twice, None) == (circle, square)
    assert circle.words == ((2,), (3,)) and circle.tokens == (2, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ring"], "not in the prompt"),
        (["a"], "stands 2 times"),
        (["a#all"], "names 2 places"),
        ([], "no object"),
        ([[]], "without tokens"),
        (5, "no list of words"),
        ([None], "no list of words"),
        (["circle", "red circle"], "noun of 'red circle'"),
        ([[7], [3], [7]], "another object's too"),
    ],
)
def test_words_that_cannot_be_steered(words: Any, message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        targets_of(Prompt(tiny_sd(), PROMPTS[0]), words)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attnctl.AStar(scale=-1.0), "scale"),
        (lambda: attnctl.AStar(decay=2.0), "decay"),
        (lambda: attnctl.AStar(shrink=0.0), "shrink"),
        (lambda: attnctl.AStar(updates=-1), "updates"),
        (lambda: attnctl.AStar(tokens="verb"), "tokens"),  # type: ignore[arg-type]
        (lambda: attnctl.AStar(reach=(0.0, 0.5, 2.0)), "reach"),
        (lambda: attnctl.AStar(at_once=0), "at_once"),
        (lambda: attnctl.AStar(retain=-1.0), "retain"),
        (lambda: attnctl.AStar(level=1.0), "level"),
        (lambda: attnctl.AStar(layout=5), "layout=5"),
        (lambda: attnctl.AStar(layout="column"), "'row'"),
        (lambda: attnctl.AStar(layout=[LEFT, (0.5, 0.0, 0.2, 1.0)]), "'object 2'"),
        (lambda: attnctl.AStar(layout={"circle": torch.zeros(4, 4)}), "'circle' is empty"),
        (lambda: attnctl.AStar(layout=[LEFT], retain=0.0), "retain=0"),
        (lambda: attnctl.AStar(layout={0: LEFT}), "key 0"),
        (lambda: attnctl.AStar(["circle"], layout={"circle": LEFT}), "too many"),
        (lambda: attnctl.Conform(temperature=0.0), "temperature"),
        (lambda: attnctl.DisenDiff(bind=-1.0), "bind"),
    ],
)
def test_options_outside_their_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        make()


def test_runs_that_cannot_be_steered() -> None:
    pipe = build("sd1")
    bare, inputs = zoo.denoiser_inputs("sd1")
    star = attnctl.AStar(words=WORDS)
    with pytest.raises(attnctl.HostError, match="patch the pipe"), attnctl.patch(bare, star):
        bare(**inputs)
    with pytest.raises(attnctl.HostError, match="positions"), attnctl.patch(pipe, attnctl.AStar()):
        zoo.run(pipe)
    far = attnctl.AStar(words=[[1], [99]])
    with pytest.raises(attnctl.HostError, match="position 99"), attnctl.patch(pipe, far):
        zoo.run(pipe)
    with pytest.raises(attnctl.OptionError, match="at least 2"):
        drawn("a red circle", [1], attnctl.AStar())
    bad = attnctl.AStar(layout=[(0, 0, 1, 1)])
    with pytest.raises(attnctl.OptionError, match="1 places for 2"):
        drawn(PROMPTS[0], [1], bad)
    missing = attnctl.AStar(layout={"circle": LEFT, "ring": RIGHT})
    with pytest.raises(attnctl.OptionError, match="'ring' is not in the prompt"):
        drawn(PROMPTS[0], [1], missing)
    two = attnctl.AStar(layout=[{"circle": LEFT, "square": RIGHT}] * 2)
    with pytest.raises(attnctl.OptionError, match="2 layouts for 1 prompts"):
        drawn(PROMPTS[:1], [1], two)


def test_offloaded_weights_and_caches_are_refused() -> None:
    pipe = build("sd1")
    weight = pipe.unet.conv_out.weight
    pipe.unet.conv_out.weight = torch.nn.Parameter(weight.detach().to("meta"))
    star = attnctl.AStar(words=WORDS)
    with pytest.raises(attnctl.HostError, match="sequential"), attnctl.patch(pipe, star):
        zoo.run(pipe)
    from diffusers import FirstBlockCacheConfig

    pipe = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(attnctl.ControlConflict, match="disable_c"), attnctl.patch(pipe, star):
        zoo.run(pipe)


# -- placebos of the effect bench --------------------------------------------------------------


def test_random_words_are_none_of_the_objects() -> None:
    from attnctl.apps.bench.placebo import NoPlacebo
    from attnctl.apps.bench.placebo_latent import drawn_targets, random_words

    real = (Target((3,), ((2,),)), Target((7, 8), ((6,),)))
    others = drawn_targets(real, 20, seed=1)
    tokens = [token for target in others for word in target.words for token in word]
    assert [len(t.attributes) for t in others] == [1, 1] and len(set(tokens)) == 4
    assert not set(tokens) & {2, 3, 6, 7, 8} and min(tokens) >= 1 and max(tokens) <= 18
    assert others == drawn_targets(real, 20, seed=1) != drawn_targets(real, 20, seed=2)
    with pytest.raises(NoPlacebo, match="only 3 other tokens"):
        drawn_targets(real, 10, seed=1)
    made = random_words(CONTROLS[0], attnctl.sites(tiny_sd()), 0)
    assert made is not None and random_words(attnctl.PAG(), attnctl.sites(tiny_sd()), 0) is None
    stock, real_move = drawn(PROMPTS[0], [1]), drawn(PROMPTS[0], [1], CONTROLS[0])
    moved = drawn(PROMPTS[0], [1], made)
    assert not close(moved, stock, 1e-3) and not close(moved, real_move, 1e-3)


def test_the_neighbours_gradient() -> None:
    from attnctl.apps.bench.placebo_latent import neighbour_gradient

    made = neighbour_gradient(CONTROLS[0], attnctl.sites(tiny_sd()), 0)
    assert isinstance(made, LatentControl)
    assert made.direction(torch.arange(3.0)).tolist() == [2, 0, 1]
    assert neighbour_gradient(attnctl.PAG(), attnctl.sites(tiny_sd()), 0) is None
