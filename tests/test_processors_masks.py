"""Masks of words: carried maps against the explicit power of the map, planted blocks, models."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.assets.world.captions import parse
from attnctl.assets.world.palette import COLOUR_NAMES, rgb_table
from attnctl.presets import find, presets
from attnctl.processors.analysis.affinity import carried, labelled, minmax, sharpened
from attnctl.processors.analysis.mask_reading import SelfReader, TextReader, WordsRead
from attnctl.processors.analysis.word_masks import extracted
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


def stretched(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


def test_the_official_form_of_the_affinity_gives_the_same_masks() -> None:
    """There P is stretched to 0..1 as a whole, before and after its power; here it is not."""
    (q, k, _), maps = tensors(batch=1, heads=3, tokens=35, dim=7), torch.rand(4, 35).double()
    affinity = oracles.softmax_map(q, k).mean(1)[0]
    squared = torch.stack([stretched(one**2) for one in maps])
    fourth = stretched(torch.linalg.matrix_power(stretched(affinity), 4))
    want = torch.stack([stretched(fourth @ one) for one in squared])
    ours = minmax(carried(sharpened(maps.view(1, 4, 1, 5, 7), (5, 7)), [(q, k, None)], 4))
    torch.testing.assert_close(ours[0], want)
    assert torch.equal(labelled(ours, 0.1)[0], labelled(want[None], 0.1)[0])


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


# -- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", presets("masks"), ids=lambda preset: preset.name)
def test_presets_give_every_option_and_say_their_origin(preset: Any) -> None:
    assert set(preset.options) == {"heads", "along", "at", "power", "margin"}
    assert preset.source and (preset.origin == "published") == (preset.name == "sd2")


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (("UNet2DConditionModel", 7, 8), "tiny-sd"),
        (("SD3Transformer2DModel", 8, 8), "tiny-sd3"),
        (("UNet2DConditionModel", 16, 5), "sd2"),
        (("UNet2DConditionModel", 16, 8), "sd1"),
        (("UNet2DConditionModel", 70, 10), "sdxl"),
        (("SD3Transformer2DModel", 24, 24), "sd3-medium"),
        (("FluxTransformer2DModel", 57, 24), "flux1"),
        (("PixArtTransformer2DModel", 28, 16), "any-model"),
    ],
)
def test_the_defaults_come_from_the_model(structure: tuple[str, int, int], name: str) -> None:
    assert next(p.name for p in presets("masks") if p.fits(*structure)) == name


def test_masks_are_no_control() -> None:
    """Their presets are of a function: a command's completion must not offer them."""
    from attnctl.apps.cli import _known_controls

    assert "masks" not in attnctl.controls() and "masks" not in _known_controls()
    assert set(_known_controls()) <= set(attnctl.controls())


# -- what was measured --------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_has_what_was_measured() -> None:
    text = (DOCS / "masks.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "make_masks.py"))["page"](text) == text


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_presets_are_those_that_were_chosen_and_confirmed(name: str) -> None:
    chosen, confirmed = (
        json.loads((DOCS / f"measured/masks/{kind}.json").read_text())[name]
        for kind in ("choosing", "heldout")
    )
    (preset,) = (one for one in presets("masks") if one.name == name)
    assert confirmed["options"] == preset.options
    assert preset.options.items() <= chosen["best"][0].items()
    assert chosen["pictures"] >= 40 and confirmed["pictures"] >= 40
    for arm in ("raw, same heads", "published", "power=0"):
        assert confirmed["arms"][arm]["no options gain"]["low"] > 0, arm


# -- models -------------------------------------------------------------------------------------

PROMPT = "a red circle and a blue square"
PROMPTS = (PROMPT, "a green ring and a purple triangle", "a yellow cross and a cyan diamond")


def run(name: str, prompt: Any = PROMPT, seeds: Any = (3,), **options: Any) -> Any:
    if name == "tiny-sd3":
        options = {"max_sequence_length": 16, **options}
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    call = {"num_inference_steps": 12, "guidance_scale": 5.0, "output_type": "pt"}
    return attnctl.masks(shipped(name), prompt, generator=noise, **{**call, **options})


def overlap(images: Tensor, labels: Tensor, prompt: str) -> list[float]:
    """Return the IoU of every drawn object's mask with the pixels nearest to its colour."""
    size, each = images.shape[2:], []
    for image, of_image in zip(images, labels, strict=True):
        colours = torch.cdist(image.flatten(1).T, rgb_table()).argmin(1).view(size)
        vivid = image.amax(0) - image.amin(0) > 0.25
        grown = torch.nn.functional.interpolate(of_image[None, None].float(), size)[0, 0]
        for word, (colour, _) in enumerate(parse(prompt)):
            true = (colours == COLOUR_NAMES.index(colour)) & vivid
            if true.sum() > 60:  # it was drawn
                inside = grown == word
                each.append(float((inside & true).sum() / (inside | true).sum()))
    return each


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_masks_lie_on_the_objects(name: str) -> None:
    """Without options: on nearly all, and better than by cross-attention or as published."""
    own, published = (find("masks", shipped(name), one).options for one in (None, "any-model"))
    every: dict[str, list[float]] = {"own": [], "cross": [], "published": []}
    for i, prompt in enumerate(PROMPTS):
        # the others' maps are read in the same run
        reads: list[Any] = []
        readers = [
            reader(reads.append, options[heads], options["at"])
            for options in (own, published)
            for reader, heads in ((TextReader, "heads"), (SelfReader, "along"))
        ]
        with attnctl.patch(shipped(name), *readers):
            found = run(name, [prompt] * 3, range(10 * i, 10 * i + 3), num_inference_steps=8)
        texts = [one for one in reads if isinstance(one, WordsRead)]
        images = [one for one in reads if not isinstance(one, WordsRead)]
        labels = {"own": found.labels}
        for kind, which, options in (("cross", 0, own), ("published", 1, published)):
            soft = extracted(texts[which], images[which], 4 * which)[:, :, 0]
            labels[kind] = labelled(soft, options["margin"])
        for kind, ious in every.items():
            ious += overlap(found.images, labels[kind], prompt)
    mean = {kind: sum(ious) / len(ious) for kind, ious in every.items()}
    assert len(every["own"]) >= 14 and mean["own"] > 0.6, mean
    assert sum(iou > 0.5 for iou in every["own"]) > 0.85 * len(every["own"]), every["own"]
    assert mean["own"] > mean["cross"] + 0.03 and mean["own"] > mean["published"] + 0.12, mean


def test_the_run_is_untouched_and_undone() -> None:
    pipe = shipped("tiny-sd")
    noise = torch.Generator().manual_seed(3)
    stock = pipe(
        PROMPT, generator=noise, num_inference_steps=12, guidance_scale=5.0, output_type="pt"
    )
    found = run("tiny-sd", along="all", heads="all")
    assert torch.equal(found.images, stock.images)
    assert [line.sites_hit for line in found.report.lines] == [7, 7]
    assert "masks (text)(heads=all, at=0.9)" in str(found.report)
    assert found.soft.shape == (1, 3, 16, 16) and found.labels.shape == (1, 16, 16)
    assert 0 <= float(found.unassigned) < 0.5
    share = sum(float(found[word].float().mean()) for word in found)
    assert share + float(found.unassigned) == pytest.approx(1)


def test_masks_at_another_size() -> None:
    found = run("tiny-sd", num_inference_steps=4)
    sized = found.resized(48, 64)
    assert sized.soft.shape == (1, 3, 48, 64) and sized["background"].shape == (1, 48, 64)
    assert torch.equal(sized.labels, labelled(sized.soft, found.options["margin"]))
    same = found.resized(16, 16)
    assert torch.equal(same.labels, found.labels)
    video = attnctl.Masks(
        torch.rand(1, 2, 3, 4, 4), torch.zeros(1, 3, 4, 4), ("a", "b"), options={"margin": 0.0}
    )
    assert video.resized(8, 6).labels.shape == (1, 3, 8, 6)
    with pytest.raises(attnctl.OptionError, match="at least 1"):
        found.resized(0, 8)


def test_words_without_a_place_are_named() -> None:
    labels = torch.tensor([[[0, 2], [2, -1]], [[0, 1], [2, -1]]])
    found = attnctl.Masks(torch.zeros(2, 3, 2, 2), labels, ("cat", "dog", "background"))
    assert found.missing == (("dog",), ())


def test_options_and_mistakes() -> None:
    none = run("tiny-sd", words=["circle", "square"], background=None, num_inference_steps=3)
    assert none.words == ("circle", "square") and set(none) == {"circle", "square"}
    assert none.options["heads"] == "L1-2" and none.options["power"] == 1
    own = run("tiny-sd", preset="sd2", margin=0.2, along="L0", num_inference_steps=2)
    assert own.options == {"heads": "all", "along": "L0", "at": 0.85, "power": 4, "margin": 0.2}
    with pytest.raises(attnctl.OptionError, match="no mask of 'ring'"):
        none["ring"]
    for options, message in (
        ({"at": 1.0}, "at in"),
        ({"margin": -0.1}, "margin"),
        ({"power": -1}, "power"),
        ({"words": ["ring"]}, "not in the prompt"),
        ({"preset": "sd3"}, "no preset 'sd3'"),
    ):
        with pytest.raises(attnctl.OptionError, match=message):
            run("tiny-sd", **options)
    with pytest.raises(attnctl.SelectorError, match="cross"):
        run("tiny-sd", along="cross", num_inference_steps=2)
    with pytest.raises(attnctl.HostError, match="different words"):
        run("tiny-sd", ["a red circle", "a ring"], (1, 2), num_inference_steps=2)


def test_a_run_that_stops_before_the_step_is_an_error() -> None:
    def stop(pipe: Any, step: int, time: Any, values: Any) -> Any:
        pipe._interrupt = True
        return values

    with pytest.raises(attnctl.HostError, match="no attention was seen at the step"):
        run("tiny-sd", num_inference_steps=4, callback_on_step_end=stop)


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
