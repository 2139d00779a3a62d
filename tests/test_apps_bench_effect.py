"""The effect bench: its statistics, its placebo, and a small version of the docs' table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import attnctl
from attnctl.apps.bench.effect import Arm, draw, run_arms, table
from attnctl.apps.bench.placebo import shuffled
from attnctl.apps.bench.statistics import mean_interval, paired_interval
from attnctl.assets import path
from attnctl.assets.world import heldout_prompts


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    source = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        found = mean_interval(source.normal(1.0, 2.0, 60), seed=i)
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 198


def test_paired_differences_drop_what_both_arms_share() -> None:
    shared = np.random.default_rng(1).normal(0, 10, 100)
    found = paired_interval(shared + 1.0, shared)
    assert found.value == pytest.approx(1.0) and found.high - found.low < 1e-9
    assert found.above_zero and not paired_interval(shared, shared + 1).above_zero
    assert str(found) == "1.000 [1.000, 1.000]"


def test_the_placebo_has_the_same_strength_and_options() -> None:
    control = attnctl.SoftPAG(scale=2.0, u=0.25)
    placebo = shuffled(control)
    cond, weak = torch.randn(3, 4), torch.randn(3, 4)
    mine, other = control.direction(cond, weak), placebo.direction(cond, weak)
    torch.testing.assert_close(other, mine[[2, 0, 1]])
    assert (placebo.scale, placebo.u, placebo.name) == (2.0, 0.25, "softpag-shuffled")


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    made.set_progress_bar_config(disable=True)
    return made


OPTIONS: dict[str, Any] = {
    "num_inference_steps": 8,
    "guidance_scale": 1.0,
    "max_sequence_length": 16,
}


def test_a_prompt_s_picture_does_not_depend_on_its_batch(pipe: Any) -> None:
    prompts = heldout_prompts(4, 2, seed=3)
    together = draw(pipe, prompts, seed=7, batch=4, **OPTIONS)
    apart = draw(pipe, prompts, seed=7, batch=3, **OPTIONS)
    assert (together - apart).abs().max() < 0.02


def test_a_mild_push_helps_where_a_full_or_a_misdirected_one_hurts(pipe: Any) -> None:
    """The ordering of docs/effects.md, by paired intervals over a few prompts."""
    mild = attnctl.SoftPAG(scale=1.0, u=0.25)
    arms = [
        Arm("full", (attnctl.PAG(scale=2.0),)),
        Arm("mild", (mild,)),
        Arm("placebo", (shuffled(mild),)),
    ]
    prompts = heldout_prompts(20, 2, seed=5)
    found = run_arms(pipe, arms, prompts, seed=1000, batch=20, **OPTIONS)
    for worse in ("full", "placebo"):
        gain = paired_interval(found["mild"].log_prob, found[worse].log_prob)
        assert gain.above_zero, f"{worse}: {gain}"
    text = table(found)
    assert text.count("\n") == 4 and "| mild |" in text
