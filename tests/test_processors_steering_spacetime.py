"""SpaceTime: regions, the rule against explicit maps, and objects that go where they are put."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attnctl
from attnctl import assets
from attnctl.processors.steering.regions import checked_region, coverage
from attnctl.processors.steering.spacetime import Local, Scene, mixed, side_by_side
from attnctl.records import Spans
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import attention_call, tensors

CPU = torch.device("cpu")


@functools.cache
def tiny_sd() -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- regions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 16, 32, 64])
def test_a_disc_covers_its_area(side: int) -> None:
    disc = coverage((0.5, 0.5), (1, side, side), CPU)
    assert abs(float(disc.mean()) - math.pi * 0.04) < 1.2 / side
    disc = coverage((0.3, 0.8, 0.2), (1, side, side), CPU).view(side, side)
    assert torch.equal(disc.T, coverage((0.8, 0.3), (1, side, side), CPU).view(side, side))


def test_regions_by_hand() -> None:
    box = coverage((0.5, 0.0, 1.0, 0.5), (2, 4, 6), CPU).view(2, 4, 6)
    assert torch.equal(box[0], box[1]) and box[0].sum() == 6 and box[0, :2, 3:].all()
    mask = torch.zeros(4, 4)
    mask[:2, :2] = 1
    assert coverage(mask, (1, 2, 2), CPU).tolist() == [1, 0, 0, 0]
    assert coverage(mask[:, 1:3], (1, 1, 1), CPU).tolist() == [0.25]
    assert coverage((0.0, 0.0), (1, 10, 10), CPU).sum() == 3  # cut off at the corner
    for same in (mask.numpy(), mask.bool().numpy(), mask.bool(), 255 * mask):
        assert torch.equal(checked_region(same, "circle"), mask)


@pytest.mark.parametrize(
    "region", [(0.5,), (0.5, 1.5), (0.5, 0.5, -1), (0.5, 0, 0.4, 1), (0, 0, 1, 2), "left", 3,
               torch.zeros(3), (0.5, 0.5, 0), torch.zeros(4, 4), torch.full((4, 4), torch.nan),
               np.zeros((2, 4, 4))],
)  # fmt: skip
def test_what_is_no_region_is_refused(region: Any) -> None:
    with pytest.raises(attnctl.OptionError, match="of 'circle'"):
        checked_region(region, "circle")


def test_concepts_side_by_side() -> None:
    assert side_by_side("a red circle and a blue square") == {
        "red circle": (0.0, 0.0, 0.5, 1.0),
        "blue square": (0.5, 0.0, 1.0, 1.0),
    }
    assert list(side_by_side("a red ring and a red ring")) == ["red ring", "red ring#2"]


# -- the rule -----------------------------------------------------------------------------------


def test_convex_weights_and_the_order_of_objects() -> None:
    whole = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    local = torch.randn(2, 1, 2, 5, 3, dtype=torch.float64)
    weights = torch.tensor([[[0.0, 1.0, 0.5, 0.0, 1.0]], [[0.0, 0.0, 0.25, 0.6, 1.0]]])
    out = mixed(whole, local, weights)
    assert torch.equal(out[:, :, 0], whole[:, :, 0]) and torch.equal(
        out[:, :, 1], local[0, :, :, 1]
    )
    torch.testing.assert_close(
        out[:, :, 2], 0.25 * whole[:, :, 2] + 0.5 * local[0, :, :, 2] + 0.25 * local[1, :, :, 2]
    )
    torch.testing.assert_close(out[:, :, 4], local[:, :, :, 4].mean(0))  # they share the weight
    torch.testing.assert_close(mixed(whole, local.flip(0), weights.flip(0)), out)
    same = mixed(whole, whole.expand(2, -1, -1, -1, -1), weights)
    torch.testing.assert_close(same, whole)
    # mode "guidance" is the convex rule where the unconditional rows are the conditional ones
    apart = torch.tensor([[[0.0, 1.0, 0.5, 0.0, 0.0]], [[0.0, 0.0, 0.0, 0.6, 1.0]]])
    torch.testing.assert_close(mixed(whole, local, apart, whole), mixed(whole, local, apart))


@pytest.mark.parametrize("mode", ["convex", "guidance"])
@pytest.mark.parametrize("heads", [None, [1]])
def test_a_call_equals_explicit_maps(mode: Any, heads: list[int] | None) -> None:
    """Two samples with other regions, grouped-query keys, rows of both roles."""
    q, k, v = tensors(batch=4, heads=4, kv_heads=2, tokens=15, keys=7, dim=8)
    _, lk, lv = tensors(batch=2, heads=4, kv_heads=2, tokens=1, keys=7, dim=8, seed=1)
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
    scene = Scene([[Local("", box)] for box in boxes], [[{}], [{}]], {0: [(lk, lv, None)]}, True)
    spans = Spans((("image", 0, 15),), (("text", 0, 7),), (1, 3, 5))
    call = attention_call(
        q, k, v, kind="cross", groups=("uncond", "cond"), heads=heads, spans=spans, state=scene,
        role="spacetime/0",
    )  # fmt: skip
    out, stock = attnctl.SpaceTime(mode=mode, lam=0.6).attend(call), call.primitive()
    assert torch.equal(out[:2], stock[:2])
    whole = oracles.apply_map(oracles.softmax_map(q, k), v)
    local = oracles.apply_map(oracles.softmax_map(q[2:], lk), lv)
    for sample, box in enumerate(boxes):
        inside = coverage(box, (1, 3, 5), CPU).bool()
        for head in range(4):
            mine, plain = out[2 + sample, head], stock[2 + sample, head]
            if heads and head not in heads:
                assert torch.equal(mine, plain)
                continue
            base = whole[2 + sample] if mode == "convex" else whole[sample]
            want = whole[2 + sample, head] + 0.6 * (local[sample, head] - base[head])
            torch.testing.assert_close(mine[inside], want[inside])
            assert torch.equal(mine[~inside], plain[~inside])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "convex or guidance"),
        ({"lam": 1.5}, r"in \[0, 1\]"),
        ({"lam": -1.0, "mode": "guidance"}, "0 or above"),
        ({"template": "a photo"}, "must hold"),
        ({"layout": "column"}, "'row' or 'fit'"),
        ({"layout": 3}, "mapping or a list"),
        ({"layout": {"circle": (2, 2)}}, "region of 'circle'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.SpaceTime(**options)


# -- models -------------------------------------------------------------------------------------

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def draw(prompts: list[str], seeds: list[int], **call: Any) -> Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "pt", **call}
    return tiny_sd()(prompts, generator=noise, **options).images


def test_neutral_options_and_undo_are_exact() -> None:
    prompts = ["a red circle and a blue square"]
    stock = draw(prompts, [1], num_inference_steps=3)
    for off in ({"lam": 0.0}, {"layout": {}}, {"stop": 0.0}):
        assert attnctl.SpaceTime(**off).neutral
    with attnctl.patch(tiny_sd(), attnctl.SpaceTime(lam=0.0)):
        assert torch.equal(draw(prompts, [1], num_inference_steps=3), stock)
    with attnctl.patch(tiny_sd(), attnctl.SpaceTime()) as handle:
        assert not torch.allclose(draw(prompts, [1], num_inference_steps=3), stock, atol=0.05)
        line = handle.report().lines[0]
    assert line.sites_hit == line.sites == 7 and line.steps == (0, 1, 2)
    # one pass per object once, then one call per site and step
    assert line.calls == 7 * (2 + 3)
    assert torch.equal(draw(prompts, [1], num_inference_steps=3), stock)


def test_a_batch_of_layouts_is_what_each_is_alone() -> None:
    prompts = ["a red circle and a blue square", "a green ring"]
    layouts = [{"red circle": RIGHT, "blue square": LEFT}, {"ring": (0.3, 0.3, 0.3)}]
    with attnctl.patch(tiny_sd(), attnctl.SpaceTime(layout=layouts)):
        both = draw(prompts, [1, 2], num_inference_steps=3)
    with attnctl.patch(tiny_sd(), attnctl.SpaceTime(layout=layouts[1])):
        alone = draw(prompts[1:], [2], num_inference_steps=3)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=2e-3)


def test_the_whole_picture_with_its_own_prompt_is_stock() -> None:
    """Convex, L_i = D: the mixture of an output with itself."""
    prompt = "a red circle"
    stock = draw([prompt], [1], num_inference_steps=3)
    control = attnctl.SpaceTime(layout={prompt: (0, 0, 1, 1)}, template="{}")
    with attnctl.patch(tiny_sd(), control):
        torch.testing.assert_close(
            draw([prompt], [1], num_inference_steps=3), stock, rtol=0, atol=1e-3
        )


def sides(pictures: Tensor) -> Tensor:
    """Return for each picture whether red's middle is left of blue's."""
    x = torch.arange(pictures.shape[-1], dtype=torch.float32)
    red = (pictures[:, 0] - pictures[:, 1:].amax(1) - 0.2).clamp_min(0)
    blue = (pictures[:, 2] - pictures[:, :2].amax(1) - 0.2).clamp_min(0)
    at = [(m * x).sum((1, 2)) / m.sum((1, 2)).clamp_min(1e-6) for m in (red, blue)]
    return at[0] < at[1]


def test_objects_go_where_they_are_put() -> None:
    """Red left and blue right, then the other way: the same noise, the sides follow."""
    prompts, seeds = ["a red circle and a blue square"] * 6, list(range(6))
    for first, second, left in ((LEFT, RIGHT, True), (RIGHT, LEFT, False)):
        control = attnctl.SpaceTime(layout={"red circle": first, "blue square": second})
        with attnctl.patch(tiny_sd(), control):
            assert int((sides(draw(prompts, seeds)) == left).sum()) >= 5


def test_what_cannot_be_done_is_refused() -> None:
    def run(message: str, error: type, prompts: Any, **options: Any) -> None:
        control = attnctl.SpaceTime(**options)
        with pytest.raises(error, match=message), attnctl.patch(tiny_sd(), control):
            draw(prompts, [0] * len(prompts), num_inference_steps=2)

    run("not in the prompt", attnctl.OptionError, ["a red circle"], layout={"ring": LEFT})
    run("2 layouts for 1 prompts", attnctl.OptionError, ["a ring"], layout=[{"ring": LEFT}, {}])
    run("has no object", attnctl.OptionError, ["and the"])
    pipe = zoo.FAMILIES["sd1"].build()
    with (
        pytest.raises(attnctl.HostError, match="got embeddings"),
        attnctl.patch(pipe, attnctl.SpaceTime()),
    ):
        zoo.run(pipe)
    with (
        pytest.raises(attnctl.HostError, match="unconditional rows"),
        attnctl.patch(tiny_sd(), attnctl.SpaceTime(mode="guidance")),
    ):
        draw(["a red circle"], [0], num_inference_steps=2, guidance_scale=1.0)
