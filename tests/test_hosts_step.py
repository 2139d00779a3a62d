"""Steps: the step plane against hand-written loops, and step numbers under every scheduler."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.testing import zoo

Edit = Callable[[Tensor, int], Tensor]


def build(name: str) -> Any:
    return zoo.FAMILIES[name].build()


def named(pipe: Any, name: str) -> Any:
    """Make a pipeline that the zoo did not build known to it."""
    pipe._zoo_family = name
    pipe.set_progress_bar_config(disable=True)
    return pipe


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == two.shape and float((one - two).norm()) < tolerance * float(two.norm())


def scaled(latents: Tensor, index: int) -> Tensor:
    return latents * (0.9 + 0.05 * index)


def mirrored(latents: Tensor, index: int) -> Tensor:
    return 0.5 * latents + 0.5 * latents.flip(0, -1) + 0.01 * (index + 1)


@dataclasses.dataclass(frozen=True)
class Change(attnctl.Control):
    """Edits the latents before the steps of a window."""

    edit: Edit = scaled
    start: float = 0.0
    stop: float = 1.0
    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "change-test"

    @property
    def schedule(self) -> attnctl.Schedule:
        return attnctl.Schedule.of((self.start, self.stop))

    def between(self, call: attnctl.StepCall) -> Tensor:
        step = call.step
        self.seen.append((step.index, step.count, step.sigma, tuple(call.latents.shape)))
        return self.edit(call.latents, step.index)


@dataclasses.dataclass(frozen=True)
class Watch(attnctl.Control):
    """Notes the step of every denoiser call."""

    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)
    begun: list[int] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "watch-test"

    def begin(self, run: Any, selection: Any) -> None:
        self.begun.append(run.count)

    def denoise(self, call: attnctl.ForwardCall) -> Tensor:
        step = call.step
        time = float(step.timestep.flatten()[0])
        self.seen.append((step.index, step.count, step.fraction, step.sigma, call.run.time, time))
        return call.proceed()


# -- against loops by hand -----------------------------------------------------------------


def sampled(pipe: Any, edit: Edit, steps: int) -> Tensor:
    """A sampling loop with batched guidance, written out."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    inputs = zoo.denoiser_calls(pipe, steps=steps, limit=1)[0][1]
    scheduler, name = pipe.scheduler, next(iter(inputs))
    first = inputs[name]
    n = first.shape[0] // 2
    latents = first[:n]
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "scale_model_input"):
        call = zoo.FAMILIES[pipe._zoo_family].call(pipe)
        latents = pipe.prepare_latents(
            n, 4, 64, 96, torch.float32, torch.device("cpu"), call["generator"]
        )
        scheduler.set_timesteps(steps)
    with torch.no_grad():
        for i, time in enumerate(scheduler.timesteps):
            latents = edit(latents, i)
            x = torch.cat([latents, latents])
            if hasattr(scheduler, "scale_model_input"):
                x = scheduler.scale_model_input(x, time)
            t = time if inputs["timestep"].ndim == 0 else time.expand(2 * n)
            u, c = model(**{**inputs, name: x, "timestep": t})[0].chunk(2)
            guided = u + zoo.core.CFG_SCALE * (c - u)
            latents = scheduler.step(guided, time, latents, return_dict=False)[0]
    return latents


def use(pipe: Any, scheduler: str | None, **config: Any) -> Any:
    import diffusers

    if scheduler is not None:
        cls = getattr(diffusers, scheduler)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)
    return pipe


@pytest.mark.parametrize("edit", [scaled, mirrored])
@pytest.mark.parametrize(
    ("name", "scheduler"), [("sd3", None), ("sd1", None), ("sd1", "EulerDiscreteScheduler")]
)
def test_the_step_plane_equals_a_loop_by_hand(
    name: str, scheduler: str | None, edit: Edit
) -> None:
    pipe = use(build(name), scheduler)
    stock = zoo.run(pipe, steps=4)
    assert close(sampled(pipe, lambda x, i: x, 4), stock)
    with attnctl.patch(pipe, Change(edit)):
        got = zoo.run(pipe, steps=4)
    assert close(got, sampled(pipe, edit, 4)) and not close(got, stock, 1e-2)
    late = Change(edit, start=0.5)
    with attnctl.patch(pipe, late):
        got = zoo.run(pipe, steps=4)
    assert close(got, sampled(pipe, lambda x, i: edit(x, i) if i >= 2 else x, 4))
    assert torch.equal(zoo.run(pipe, steps=4), stock)
    assert [seen[:2] for seen in late.seen] == [(2, 4), (3, 4)]
    sigmas = getattr(pipe.scheduler, "sigmas", None)
    if sigmas is not None:
        assert [seen[2] for seen in late.seen] == [float(s) for s in sigmas[2:4]]


@pytest.mark.parametrize(
    "name",
    # packed; one call a branch; more channels than latents; more tokens than latents; 5-d
    ["flux", "wan", "wan-i2v", "flux-kontext", "cogvideox", "ltx", "qwenimage", "wan22"],
)
def test_the_step_plane_equals_given_latents_and_a_callback(name: str) -> None:
    """The same edits by the pipeline's own means."""
    pipe, control = build(name), Change(scaled)
    with attnctl.patch(pipe, control):
        got = zoo.run(pipe, steps=3)
    initial = initial_latents(pipe)
    assert [seen[3] for seen in control.seen] == [tuple(initial.shape)] * 3

    def callback(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": scaled(values["latents"], index + 1)} if index < 2 else values

    plain = zoo.run(pipe, steps=3, latents=initial.clone())
    assert close(plain, zoo.run(pipe, steps=3))
    wanted = zoo.run(pipe, steps=3, latents=scaled(initial, 0), callback_on_step_end=callback)
    assert close(got, wanted) and not close(got, plain, 1e-2)


def initial_latents(pipe: Any) -> Tensor:
    """What prepare_latents gives in a run."""
    made: list[Any] = []
    stock = pipe.prepare_latents

    def note(*args: Any, **kwargs: Any) -> Any:
        made.append(stock(*args, **kwargs))
        return made[-1]

    pipe.prepare_latents = note
    try:
        zoo.run(pipe, steps=1)
    finally:
        del pipe.prepare_latents
    return made[0][0] if isinstance(made[0], tuple) else made[0]


def test_guidance_and_the_users_callback_beside_it() -> None:
    """The callback of step i comes after the control's edit for step i + 1."""
    pipe = build("sd3")
    order: list[str] = []

    def edit(latents: Tensor, index: int) -> Tensor:
        order.append(f"edit {index}")
        return scaled(latents, index)

    def callback(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        order.append(f"callback {index}")
        return {"latents": values["latents"] + 0.1}

    with attnctl.patch(pipe, Change(edit), attnctl.SoftPAG()):
        got = zoo.run(pipe, steps=3, callback_on_step_end=callback)
    assert order == ["edit 0", "edit 1", "callback 0", "edit 2", "callback 1", "callback 2"]

    def both(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents = values["latents"]
        return {"latents": (scaled(latents, index + 1) if index < 2 else latents) + 0.1}

    initial = initial_latents(pipe)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        wanted = zoo.run(pipe, steps=3, latents=scaled(initial, 0), callback_on_step_end=both)
    assert close(got, wanted)


@dataclasses.dataclass(frozen=True)
class Probe(attnctl.Control):
    """Calls the denoiser between steps and throws the answer away."""

    inputs: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "probe-test"

    def between(self, call: attnctl.StepCall) -> Tensor:
        self.seen.append(call.run.pipe.transformer(**self.inputs)[0])
        return call.latents


@pytest.mark.parametrize("name", ["flux", "chroma"])  # with and without cache_context
def test_a_control_may_call_the_denoiser_between_steps(name: str) -> None:
    """Such a call meets the other controls, and the pipeline's own calls keep their roles."""
    pipe, (module, inputs) = build(name), zoo.denoiser_inputs(name)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        wanted = zoo.run(pipe, steps=3)
    with attnctl.patch(module, attnctl.SoftPAG()), torch.no_grad():
        answer = module(**inputs)[0]
    probe = Probe(inputs)
    with attnctl.patch(pipe, probe, attnctl.SoftPAG()):
        assert torch.equal(zoo.run(pipe, steps=3), wanted)
    assert len(probe.seen) == 3 and all(close(seen, answer) for seen in probe.seen)


def test_two_controls_change_the_latents_in_order() -> None:
    pipe = build("sd3")
    with attnctl.patch(pipe, Change(scaled), Change(mirrored)):
        got = zoo.run(pipe, steps=3)
    assert close(got, sampled(pipe, lambda x, i: mirrored(scaled(x, i), i), 3))


def test_the_given_latents_are_not_written_to() -> None:
    pipe = build("sd3")
    initial = initial_latents(pipe)
    before = initial.clone()
    with attnctl.patch(pipe, Change(scaled)):
        zoo.run(pipe, latents=initial)
    assert torch.equal(initial, before)


def test_latents_mixed_with_something_else_are_refused_at_the_first_step_only() -> None:
    """Wan 2.2 5B gives the denoiser latents whose first frame is the picture's."""
    from diffusers import WanImageToVideoPipeline

    parts = {**build("wan").components, "image_encoder": None, "image_processor": None}
    pipe = named(WanImageToVideoPipeline(**parts, expand_timesteps=True), "wan-i2v")
    text = zoo.FAMILIES["wan"].call(None, steps=4)
    text = {k: v for k, v in text.items() if "embeds" in k}
    stock = zoo.run(pipe, steps=4, **text)
    with attnctl.patch(pipe, Change(scaled)), pytest.raises(attnctl.HostError, match="mixes"):
        zoo.run(pipe, steps=4, **text)
    with attnctl.patch(pipe, Change(scaled, start=0.1)):
        assert not close(zoo.run(pipe, steps=4, **text), stock, 1e-2)
    assert torch.equal(zoo.run(pipe, steps=4, **text), stock)


# -- step numbers --------------------------------------------------------------------------


def sigma_of(scheduler: Any, time: float) -> float:
    alpha = float(scheduler.alphas_cumprod[int(time)])
    return ((1 - alpha) / alpha) ** 0.5


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (None, 4),
        ("EulerDiscreteScheduler", 4),
        ("EulerAncestralDiscreteScheduler", 4),
        ("DPMSolverMultistepScheduler", 4),
        ("DPMSolverSinglestepScheduler", 4),
        ("UniPCMultistepScheduler", 4),
        ("HeunDiscreteScheduler", 7),  # two calls a step but for the last
        ("KDPM2DiscreteScheduler", 7),
    ],
)
def test_steps_under_every_scheduler(scheduler: str | None, calls: int) -> None:
    """Number, count, fraction, noise level and time of every denoiser call."""
    pipe, watch, change = use(build("sd1"), scheduler), Watch(), Change(lambda x, i: x)
    stock = zoo.run(pipe, steps=4)
    with attnctl.patch(pipe, watch, change):
        assert torch.equal(zoo.run(pipe, steps=4), stock)
    assert watch.begun == [0]  # not the count of the run before
    assert [seen[:2] for seen in watch.seen] == [(i, calls) for i in range(calls)]
    assert [seen[:2] for seen in change.seen] == [(i, calls) for i in range(calls)]
    assert [seen[2] for seen in watch.seen] == [i / calls for i in range(calls)]
    assert [seen[4] for seen in watch.seen] == [seen[5] for seen in watch.seen]
    for seen in watch.seen if scheduler != "KDPM2DiscreteScheduler" else ():
        assert seen[3] == pytest.approx(sigma_of(pipe.scheduler, seen[5]), rel=2e-2)


def test_heun_equals_a_loop_by_hand() -> None:
    pipe = use(build("sd1"), "HeunDiscreteScheduler")
    with attnctl.patch(pipe, Change(mirrored)):
        assert close(zoo.run(pipe, steps=3), sampled(pipe, mirrored, 3))


IMAGE_TO_IMAGE = {
    "sd1": "StableDiffusionImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
}


def image_to_image(name: str, scheduler: str | None) -> tuple[Any, Callable[[], Tensor]]:
    """The pipeline, and a call of it with 8 steps at strength 1/2."""
    import diffusers

    cls = getattr(diffusers, IMAGE_TO_IMAGE[name])
    source = use(build(name), scheduler)
    if name == "sd1":
        source.unet.register_to_config(sample_size=12)  # a number is expected
    known = inspect.signature(cls.__init__).parameters
    parts = {**source.components, "requires_safety_checker": False}
    pipe = named(cls(**{k: v for k, v in parts.items() if k in known}), name)
    picture = zoo.core.rows("picture", 0, 2, 3, 64, 96).sigmoid()
    known = inspect.signature(cls.__call__).parameters

    def run() -> Tensor:
        call = zoo.FAMILIES[name].call(pipe, steps=8) | {"image": picture, "strength": 0.5}
        return pipe(**{k: v for k, v in call.items() if k in known})[0]

    return pipe, run


@pytest.mark.parametrize(
    ("name", "scheduler", "calls"),
    [
        ("sd1", None, 4),
        ("sd1", "EulerDiscreteScheduler", 4),
        ("sd1", "HeunDiscreteScheduler", 7),
        ("sd3", None, 4),
        ("flux", None, 4),
    ],
)
def test_image_to_image_leaves_steps_out(name: str, scheduler: str | None, calls: int) -> None:
    """A run of half strength has half the steps, numbered from 0, at the lower noise levels."""
    pipe, run = image_to_image(name, scheduler)
    stock, watch, change = run(), Watch(), Change(scaled)
    with attnctl.patch(pipe, watch):
        assert torch.equal(run(), stock)
    seen = list(dict.fromkeys(watch.seen))  # the calls of two branches are alike
    assert [x[:3] for x in seen] == [(i, calls, i / calls) for i in range(calls)]
    if name == "sd1":
        assert [x[4] for x in seen] == [x[5] for x in seen]
        for x in seen:
            assert x[3] == pytest.approx(sigma_of(pipe.scheduler, x[5]), rel=2e-2)
    else:
        assert [x[3] for x in seen] == [float(s) for s in pipe.scheduler.sigmas[4:8]]
        assert [x[4] for x in seen] == [float(t) for t in pipe.scheduler.timesteps[4:8]]
    with attnctl.patch(pipe, change):
        assert not close(run(), stock, 1e-2)
    assert [x[0] for x in change.seen] == list(range(calls))
    assert torch.equal(run(), stock)


# -- ControlNet ----------------------------------------------------------------------------


def with_controlnet() -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    pipe = build("sd1")
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(
        pipe.unet, conditioning_channels=3, load_weights_from_unet=False
    )
    zoo.core._wake(net.eval())
    made = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )
    return named(made, "sd1")


@pytest.mark.parametrize("guess", [False, True], ids=["both branches", "guess mode"])
def test_controlnet_residuals_follow_the_extra_rows(guess: bool) -> None:
    pipe = with_controlnet()
    call = {"image": zoo.core.rows("hint", 0, 2, 3, 64, 96).sigmoid(), "guess_mode": guess}
    stock = zoo.run(pipe, **call)
    assert not close(stock, zoo.run(pipe, **call, controlnet_conditioning_scale=0.0), 1e-2)
    results = []
    for passes in ("rows", "calls"):
        with attnctl.patch(pipe, attnctl.SoftPAG(passes=passes)) as handle:
            results.append(zoo.run(pipe, **call))
            assert handle.report().lines[0].steps == (0, 1)
    assert close(results[0], results[1]) and not close(results[0], stock, 1e-2)
    alone = {**call, "image": call["image"][:1]}
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert close(results[0][:1], zoo.run(pipe, batch=1, **alone), 1e-3)
    assert torch.equal(zoo.run(pipe, **call), stock)
