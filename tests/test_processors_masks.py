"""Masks of words: carried maps against the explicit power of the map, planted blocks, models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.processors.analysis.affinity import carried, labelled, minmax, sharpened
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import tensors


@functools.cache
def shipped(name: str) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(assets.path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the maths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0, 1, 4])
def test_carried_maps_equal_the_power_of_the_explicit_map(power: int) -> None:
    """Two sites of other heads and widths; P is the mean over all heads."""
    first, second = (
        tensors(batch=2, heads=heads, tokens=35, dim=dim, seed=heads)
        for heads, dim in ((3, 7), (2, 4))
    )
    each = [
        oracles.softmax_map(q, k, scale=scale)
        for (q, k, _), scale in ((first, None), (second, 0.3))
    ]
    affinity = torch.cat(each, dim=1).mean(1)
    torch.testing.assert_close(affinity.sum(-1), torch.ones(2, 35, dtype=torch.float64))
    maps = torch.rand(2, 4, 35, dtype=torch.float64)
    want = torch.einsum("bij,bkj->bki", torch.linalg.matrix_power(affinity, power), maps)
    sites = [(first[0], first[1], None), (second[0], second[1], 0.3)]
    torch.testing.assert_close(carried(maps, sites, power), want)


def blocks(within: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose map is even within two blocks of 6 and 10 tokens, and 0 across."""
    place = torch.tensor([0] * 6 + [1] * 10)
    x = within * torch.nn.functional.one_hot(place, 2).double()[None, None]
    return x, x


def test_planted_blocks_are_recovered_from_one_seed_each() -> None:
    seeds = torch.zeros(1, 2, 16, dtype=torch.float64)
    seeds[0, 0, 2] = seeds[0, 1, 9] = 1
    want = torch.tensor([[0] * 6 + [1] * 10])
    q, k = blocks(30.0)
    assert torch.equal(labelled(minmax(carried(seeds, [(q, k, 1.0)], 4)), 0.1), want)
    # without an affinity only the seeds are known, with an even one nothing is
    alone = labelled(minmax(carried(seeds, [(q, k, 1.0)], 0)), 0.1)
    assert (alone >= 0).sum() == 2 and alone[0, 2] == 0 and alone[0, 9] == 1
    even = labelled(minmax(carried(seeds, [(0 * q, k, 1.0)], 4)), 0.1)
    assert (even < 0).all()


def test_margins_and_the_order_of_concepts() -> None:
    soft = torch.rand(2, 3, 40, dtype=torch.float64)
    assert (labelled(soft, 0.0) == soft.argmax(1)).all() and (labelled(soft, 1.0) < 0).all()
    some = labelled(soft, 0.3)
    assert (some < 0).any() and (some >= 0).any()
    turned = labelled(soft.flip(1), 0.3)
    assert torch.equal(torch.where(turned < 0, -1, 2 - turned), some)
    assert labelled(torch.tensor([[[0.05, 0.5]]]), 0.1).tolist() == [[-1, 0]]


def test_maps_are_stretched_and_squared() -> None:
    assert torch.equal(minmax(torch.full((2, 5), 0.3)), torch.zeros(2, 5))
    maps = torch.rand(1, 2, 1, 4, 4, dtype=torch.float64)
    same = sharpened(maps, (4, 4))
    torch.testing.assert_close(same, minmax(maps.flatten(2) ** 2))
    finer = sharpened(maps, (8, 8))
    assert finer.shape == (1, 2, 64) and finer.min() == 0 and finer.max() == 1


# -- models -------------------------------------------------------------------------------------

PROMPT = "a red circle and a blue square"


def run(name: str, prompt: Any = PROMPT, seeds: Any = (3,), **options: Any) -> Any:
    if name == "tiny-sd3":
        options = {"max_sequence_length": 16, **options}
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 12, "guidance_scale": 5.0, "output_type": "pt"}
    return attnctl.masks(shipped(name), prompt, generator=noise, **{**call, **options})


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_masks_lie_on_the_objects(name: str) -> None:
    """Against the objects' own pixels, by colour: IoU above .5 for most, and far above chance."""
    found = run(name, [PROMPT] * 4, (1, 2, 3, 4))
    assert found.words == ("red circle", "blue square", "background")
    pictures = found.images
    good = []
    for word, channel in (("red circle", 0), ("blue square", 2)):
        others = [i for i in range(3) if i != channel]
        object_ = (pictures[:, channel] - pictures[:, others].amax(1)) > 0.25
        mask = torch.nn.functional.interpolate(found[word][:, None].float(), (64, 64))[:, 0] > 0
        for inside, true in zip(mask, object_, strict=True):
            if true.sum() > 60:  # it was drawn
                good.append(float((inside & true).sum() / (inside | true).sum()))
    assert len(good) >= 4 and sum(iou > 0.5 for iou in good) > len(good) / 2, good
    assert found["background"].float().mean() > 0.5


def test_the_run_is_untouched_and_undone() -> None:
    pipe = shipped("tiny-sd")
    noise = torch.Generator().manual_seed(3)
    stock = pipe(
        PROMPT, generator=noise, num_inference_steps=12, guidance_scale=5.0, output_type="pt"
    )
    found = run("tiny-sd")
    assert torch.equal(found.images, stock.images)
    assert found.report.lines[0].sites_hit == 14
    assert found.soft.shape == (1, 3, 16, 16) and found.labels.shape == (1, 16, 16)
    assert 0 <= float(found.unassigned) < 0.5
    share = sum(float(found[word].float().mean()) for word in found)
    assert share + float(found.unassigned) == pytest.approx(1)


def test_options_and_mistakes() -> None:
    none = run("tiny-sd", words=["circle", "square"], background=None, num_inference_steps=3)
    assert none.words == ("circle", "square") and set(none) == {"circle", "square"}
    with pytest.raises(attnctl.OptionError, match="no mask of 'ring'"):
        none["ring"]
    for options, message in (
        ({"at": 1.0}, "at in"),
        ({"margin": -0.1}, "margin"),
        ({"power": -1}, "power"),
        ({"words": ["ring"]}, "not in the prompt"),
    ):
        with pytest.raises(attnctl.OptionError, match=message):
            run("tiny-sd", **options)
    with pytest.raises(attnctl.HostError, match="only one of them"):
        run("tiny-sd", heads="cross", num_inference_steps=2)
    with pytest.raises(attnctl.HostError, match="different words"):
        run("tiny-sd", ["a red circle", "a ring"], (1, 2), num_inference_steps=2)


@pytest.mark.parametrize("name", ["sdxl", "flux", "pixart", "wan"])
def test_other_families(name: str) -> None:
    try:
        pipe = zoo.FAMILIES[name].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))
    words = {"one": [1], "two": [2, 3]}
    with torch.no_grad():
        call = zoo.FAMILIES[name].call(pipe)
        found = attnctl.masks(pipe, None, words, background=[0], at=0.0, **call)
    assert found.words == ("one", "two", "background") and torch.isfinite(found.soft).all()
    assert len(found.soft) == 2 and found.soft.ndim == (5 if name == "wan" else 4)
