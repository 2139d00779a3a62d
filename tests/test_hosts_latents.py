"""Latents moved from the denoiser plane: the same as by the step plane, on every pipeline."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.testing import zoo


def build(name: str) -> Any:
    return zoo.FAMILIES[name].build()


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return one.shape == two.shape and float((one - two).norm()) < tolerance * float(two.norm())


@dataclasses.dataclass(frozen=True)
class Between(attnctl.Control):
    """Scales the latents between steps."""

    name: ClassVar[str] = "between-test"

    def between(self, call: attnctl.StepCall) -> Tensor:
        return call.latents * (0.9 + 0.05 * call.step.index)


@dataclasses.dataclass(frozen=True)
class Within(attnctl.Control):
    """Scales them in the first denoiser call of each step."""

    name: ClassVar[str] = "within-test"

    def begin(self, run: Any, selection: Any) -> set[int]:
        return set()

    def denoise(self, call: attnctl.ForwardCall) -> Tensor:
        call = call.caught_up()
        if call.step.index not in call.state:
            call.state.add(call.step.index)
            call = call.move_latents(call.latents * (0.9 + 0.05 * call.step.index))
        return call.proceed()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd1", None),
        ("sd1", "EulerDiscreteScheduler"),
        ("sd1", "DPMSolverMultistepScheduler"),
        *((name, None) for name in ("sd3", "flux", "flux-kontext", "wan", "wan-i2v", "wan22")),
        *((name, None) for name in ("cogvideox", "ltx", "qwenimage", "sdxl")),
    ],
)
def test_moved_in_the_call_or_between_the_steps(name: str, scheduler: str | None) -> None:
    import diffusers

    pipe = build(name)
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    stock = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, Between()):
        want = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, Within()):
        got = zoo.run(pipe, steps=3)
    assert close(got, want) and not close(got, stock, 1e-2)
    assert torch.equal(zoo.run(pipe, steps=3), stock)


def test_both_planes_and_two_controls() -> None:
    pipe = build("sd1")
    with attnctl.patch(pipe, Between(), Within()):
        one = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, Within(), Within()):
        two = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, Between(), Between()):
        want = zoo.run(pipe, steps=3)
    assert close(one, want) and close(two, want)


def test_latents_of_another_shape_are_refused() -> None:
    pipe = build("sd1")
    stock = pipe.scheduler.step

    def step(output: Tensor, time: Any, sample: Tensor, **more: Any) -> Any:
        return type(pipe.scheduler).step(pipe.scheduler, output, time, sample[:, :, 1:], **more)

    pipe.scheduler.step = step
    with (
        attnctl.patch(pipe, Within()),
        pytest.raises(attnctl.HostError, match="cannot be handed on"),
    ):
        zoo.run(pipe)
    pipe.scheduler.step = stock


def test_a_bare_denoiser_is_refused() -> None:
    module, inputs = zoo.denoiser_inputs("sd1")
    with (
        attnctl.patch(module, Within()),
        pytest.raises(attnctl.HostError, match="patch the pipeline"),
    ):
        module(**inputs)
