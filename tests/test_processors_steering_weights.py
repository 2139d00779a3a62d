"""SpaceTime's lambda over the run, and its choice by a score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.processors.steering.spacetime import Local, Scene
from attnctl.processors.steering.weights import ClipScore, cropped, fit_weights, picture_losses
from attnctl.records import Spans
from attnctl.testing.calls import attention_call, tensors

PROMPTS = ["a red circle and a blue square", "a green ring and a yellow star"]
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0}


@functools.cache
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- lambda over the run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "slope", "mode"),
    [(0.5, 0.4, "convex"), (0.9, -2.0, "convex"), (None, -0.2, "convex"), (3.0, 2.0, "guidance")],
)
def test_lambda_is_a_line_over_the_run_and_stops_at_0(
    lam: float | None, slope: float, mode: Any
) -> None:
    """At every step the call is that of a constant lambda."""
    q, k, v = tensors(batch=2, heads=2, tokens=15, keys=7, dim=8)
    _, lk, lv = tensors(batch=1, heads=2, tokens=1, keys=7, dim=8, seed=1)
    scene = Scene([[Local("", (0.0, 0.0, 0.5, 1.0))]], [[{}]], {0: [(lk, lv, None)]}, True)
    spans = Spans((("image", 0, 15),), (("text", 0, 7),), (1, 3, 5))

    def out(control: attnctl.Control, step: int) -> Tensor:
        call = attention_call(
            q, k, v, kind="cross", groups=("uncond", "cond"), spans=spans, state=scene,
            role="spacetime/0", step=step,
        )  # fmt: skip
        return control.attend(call)

    found = []
    for step in (0, 3, 6, 9):  # of ten
        value = max(0.0, (0.7 if lam is None else lam) + slope * step / 10)
        got = out(attnctl.SpaceTime(lam=lam, slope=slope, mode=mode), step)
        want = out(attnctl.SpaceTime(lam=value, mode=mode), step)
        torch.testing.assert_close(got, want)
        found.append(got)
    assert not torch.equal(found[0], found[3])


def test_slopes_that_are_refused_and_those_that_are_off() -> None:
    assert attnctl.SpaceTime(lam=0.0).neutral and not attnctl.SpaceTime(lam=0.0, slope=0.5).neutral
    for options in ({"lam": 0.8, "slope": 0.3}, {"slope": float("nan")}, {"slope": 0.4}):
        with pytest.raises(attnctl.OptionError, match="slope"):
            attnctl.SpaceTime(**options)
    attnctl.SpaceTime(lam=2.0, slope=3.0, mode="guidance")


# -- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "rows", "columns"),
    [
        ((0.5, 0.5), (6, 14), (12, 28)),  # a disc of radius 0.2 in a picture of 20 x 40
        ((0.1, 0.9, 0.3), (12, 20), (0, 16)),  # cut off at the border
        ((0.0, 0.25, 0.5, 1.0), (5, 20), (0, 20)),
        ((0.49, 0.49, 0.51, 0.51), (9, 11), (19, 21)),
        ((1.0, 0.0, 0.0), (0, 1), (39, 40)),  # never nothing
    ],
)
def test_parts_of_a_picture(region: Any, rows: Any, columns: Any) -> None:
    picture = torch.arange(3 * 20 * 40.0).view(3, 20, 40)
    assert torch.equal(cropped(picture, region), picture[:, slice(*rows), slice(*columns)])


def test_the_part_around_a_mask() -> None:
    picture, mask = torch.arange(3 * 20 * 40.0).view(3, 20, 40), torch.zeros(4, 4)
    mask[1:3, 2] = 0.5
    assert torch.equal(cropped(picture, mask), picture[:, 5:15, 20:30])
    with pytest.raises(attnctl.OptionError, match="empty"):
        cropped(picture, torch.zeros(4, 4))


def letters(pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """A score that depends on the picture's size and values, and on the text."""
    sizes = torch.tensor([len(text) / 100 for text in texts])
    return pictures.mean((1, 2, 3)) * sizes + pictures.shape[-1] / 1000


def test_losses_by_hand() -> None:
    pictures = torch.rand(2, 3, 20, 40, generator=torch.Generator().manual_seed(0))
    places: list[Any] = [
        [("the red circle", (0.5, 0.5)), ("cat#2", (0.0, 0.0, 0.5, 1.0))],
        [("star", (0.0, 0.0, 1.0, 1.0))],
    ]
    one, two, three = pictures[0, :, 6:14, 12:28], pictures[0, :, :, :20], pictures[1]
    wanted = [
        1 - (pictures[0].mean() * 0.30 + 0.04)
        + 2 * (1 - (one.mean() * len("A photo of red circle") / 100 + 0.016))
        + 2 * (1 - (two.mean() * len("A photo of cat") / 100 + 0.02)),
        1 - (pictures[1].mean() * 0.31 + 0.04)
        + 2 * (1 - (three.mean() * len("A photo of star") / 100 + 0.04)),
    ]  # fmt: skip
    texts = ["x" * 30, "x" * 31]
    torch.testing.assert_close(
        picture_losses(pictures, texts, places, letters, part=2.0), torch.stack(wanted)
    )
    torch.testing.assert_close(
        picture_losses(pictures, texts, places, letters, part=0.0), 1 - letters(pictures, texts)
    )


def test_the_similarity_of_a_clip_model() -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    tokenizer = tiny_sd().tokenizer
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
                     "max_position_embeddings": tokenizer.model_max_length},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    score = ClipScore(model, tokenizer)
    pictures = torch.rand(2, 3, 32, 32)
    got = score(pictures, PROMPTS)
    words = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    mean, std = torch.tensor(ClipScore.MEAN), torch.tensor(ClipScore.STD)
    pixels = ((pictures - mean[:, None, None]) / std[:, None, None]).float()
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text = model.text_projection(model.text_model(**words).pooler_output)
    torch.testing.assert_close(got.detach(), torch.cosine_similarity(image, text))
    assert score(pictures[:, :, :9, :20], PROMPTS).shape == (2,)
    assert not torch.allclose(got, score(pictures, PROMPTS[::-1]))


# -- the choice -----------------------------------------------------------------------------------


def redness(pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Two prompts with opposite wishes, so that they choose different lines."""
    sign = torch.tensor([1.0 if "red" in text else -1.0 for text in texts])
    return sign * pictures[:, 0].mean((1, 2))


def test_each_prompt_keeps_its_best_picture_and_can_draw_it_again() -> None:
    pipe, lines = tiny_sd(), [(0.7, 0.0), (1.0, 0.0), (0.2, 0.5)]
    noise = [torch.Generator().manual_seed(i) for i in (3, 4)]
    found = fit_weights(
        pipe,
        attnctl.SpaceTime(),
        redness,
        PROMPTS,
        lines=lines,
        part=0.0,
        generator=noise,
        **OPTIONS,
    )
    assert found.losses.shape == (3, 2)
    drawn = []
    for lam, slope in lines:
        again = [torch.Generator().manual_seed(i) for i in (3, 4)]
        with attnctl.patch(pipe, attnctl.SpaceTime(lam=lam, slope=slope)):
            drawn.append(pipe(PROMPTS, generator=again, output_type="pt", **OPTIONS).images)
    losses = torch.stack([1 - redness(x, PROMPTS) for x in drawn])
    torch.testing.assert_close(found.losses, losses)
    for i, at in enumerate(losses.argmin(0).tolist()):
        assert torch.equal(found.images[i], drawn[at][i])
        assert (found.controls[i].lam, found.controls[i].slope) == lines[at]
    easy = fit_weights(
        pipe, attnctl.SpaceTime(), redness, PROMPTS[0], lines=lines, good=100.0,
        generator=noise[0], **OPTIONS,
    )  # fmt: skip
    assert easy.losses.shape == (1, 1) and easy.controls[0].lam == 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"lines": []}, "at least one line"),
        (lambda: {"num_images_per_prompt": 2}, "one picture per prompt"),
        (lambda: {"control": attnctl.SpaceTime(layout=[({}, (0.5, 0.5))])}, "phrases"),
        (lambda: {"lines": [(0.9, 0.5)]}, "slope"),
    ],
)
def test_what_cannot_be_chosen(change: Callable[[], dict[str, Any]], message: str) -> None:
    given = {"control": attnctl.SpaceTime(), "score": redness, "prompt": PROMPTS[0], **change()}
    with pytest.raises(attnctl.OptionError, match=message):
        fit_weights(tiny_sd(), **given)
