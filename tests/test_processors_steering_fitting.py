"""Layout "fit": arrangements by hand, and the chosen one against the model's predictions."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.apps.bench.placebo_steering import everywhere, worst_fit
from attnctl.processors.steering.fitting import MOST, arrangements, differences, fitted
from attnctl.processors.steering.spacetime import side_by_side
from attnctl.processors.steering.weights import fit_weights

PROMPTS = ["a red circle and a blue square", "a green ring and a red cross"]


@functools.cache
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(prompts: list[str], seeds: list[int], **call: Any) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "pt", **call}
    return tiny_sd()(prompts, generator=noise, **options).images


def test_arrangements_by_hand() -> None:
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    assert arrangements(2) == [(left, right), (right, left)]
    assert len(set(arrangements(3))) == 6
    with pytest.raises(attnctl.OptionError, match=f"at most {MOST}; this one has {MOST + 1}"):
        arrangements(MOST + 1)


def test_an_object_goes_where_the_predictions_agree() -> None:
    apart = torch.ones(3, 6, 9)
    for i, left in enumerate((6, 0, 3)):
        apart[i, :, left : left + 3] = 0.5
    assert [box[0] * 9 for box in fitted(apart)] == pytest.approx([6, 0, 3])
    assert all(a[0] != b[0] for a, b in zip(fitted(apart), fitted(apart, max), strict=True))


def test_regions_of_unequal_size_count_alike() -> None:
    """On a grid of 8 columns the three boxes cover 3, 2 and 3 of them."""
    apart = torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 2, 8).clone()
    apart[0, :, 3:5] = 0.9  # by the means 0 belongs there; the sums would put 2 on the few columns
    assert [round(box[0] * 3) for box in fitted(apart)].index(1) == 0


def test_differences_against_numpy() -> None:
    one, whole = torch.randn(2, 2, 5, 3, 7, 9, dtype=torch.float64)
    want = (np.asarray(one - whole)[:, :4] ** 2).mean((1, 2))
    np.testing.assert_allclose(differences(one, whole, 4), want, rtol=1e-5)
    with pytest.raises(attnctl.HostError, match=r"shape \(2, 9, 4\)"):
        differences(torch.zeros(2, 9, 4), torch.zeros(2, 9, 4), 4)


def noted(**options: Any) -> tuple[attnctl.SpaceTime, list[tuple[Tensor, Any]]]:
    """Return a control with layout "fit" and the list of what it was given and chose."""
    notes: list[tuple[Tensor, Any]] = []

    class Noted(attnctl.SpaceTime):
        def arranged(self, apart: Tensor) -> list[Any]:
            notes.append((apart, super().arranged(apart)))
            return notes[-1][1]

    return Noted(layout="fit", lam=0.5, **options), notes


def predicted(text: str, seed: int, steps: int) -> Tensor:
    """Return the bare model's prediction [4, h, w] for a text, from a seed's first latents."""
    pipe = tiny_sd()
    side, noise = pipe.unet.config.sample_size, torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, side, side, generator=noise) * pipe.scheduler.init_noise_sigma
    pipe.scheduler.set_timesteps(steps)
    t = pipe.scheduler.timesteps[0]
    words = pipe.encode_prompt(text, "cpu", 1, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        return pipe.unet(pipe.scheduler.scale_model_input(x, t), t, words).sample[0]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_first_predictions_decide(guidance: float) -> None:
    """A batch, against three calls of the bare model each, and against the layout as given."""
    pipe, seeds = tiny_sd(), [3, 4]
    control, notes = noted()
    with attnctl.patch(pipe, control):
        both = draw(PROMPTS, seeds, guidance_scale=guidance)
    assert len(notes) == 2
    for picture, prompt, seed, (apart, boxes) in zip(both, PROMPTS, seeds, notes, strict=True):
        names = list(side_by_side(prompt))
        texts = [prompt, *(f"a photo of the {name}" for name in names)]
        whole, *each = (predicted(text, seed, 2) for text in texts)
        want = torch.stack([(one - whole).square().mean(0) for one in each])
        torch.testing.assert_close(apart, want, rtol=1e-3, atol=1e-5)
        layout = dict(zip(names, boxes, strict=True))
        with attnctl.patch(pipe, attnctl.SpaceTime(layout=layout, lam=0.5)):
            alone = draw([prompt], [seed], guidance_scale=guidance)[0]
        torch.testing.assert_close(picture, alone, rtol=0, atol=2e-3)


def test_a_prompt_with_fewer_objects_gets_regions_for_those() -> None:
    control, notes = noted()
    with attnctl.patch(tiny_sd(), control) as handle:
        draw([PROMPTS[0], "a green ring"], [1, 2])
        line = handle.report().lines[0]
    assert [len(boxes) for _, boxes in notes] == [2, 1]
    assert notes[1][1] == [(0.0, 0.0, 1.0, 1.0)]
    assert line.calls == 7 * (1 + 2 + 2)  # the whole prompt, each object, each step


def test_placebos_of_a_fitted_layout() -> None:
    """Without a layout no order counts, and the worst one is another than the best."""
    pipe = tiny_sd()
    places = attnctl.sites(pipe)
    control, row = attnctl.SpaceTime(layout="fit", lam=0.5), attnctl.SpaceTime(lam=0.5)
    arms = [control, worst_fit(control, places, 0)]
    arms += [everywhere(one, places, 0) for one in (control, row)]
    drawn = []
    for arm in arms:
        assert arm is not None
        with attnctl.patch(pipe, arm):
            drawn.append(draw(PROMPTS[:1], [3]))
    assert (drawn[0] - drawn[1]).abs().max() > 0.05
    assert torch.equal(drawn[2], drawn[3])
    assert worst_fit(row, places, 0) is None


def test_weights_cannot_be_fitted_around_objects_of_a_fitted_layout() -> None:
    control = attnctl.SpaceTime(layout="fit")
    with pytest.raises(attnctl.OptionError, match="take part=0"):
        fit_weights(tiny_sd(), control, lambda x, texts: torch.zeros(len(x)), PROMPTS[0])
