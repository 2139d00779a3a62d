"""CARVE: formulas, planted maps, the probe against eager attention, and the whole call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import attnctl
import attnctl.assets
from attnctl.assets.world.evaluation import album
from attnctl.processors.vlm.carve_maps import box_of, contrast, flat, fused, refine, regions
from attnctl.processors.vlm.carving import ImageAttention, grids_of
from attnctl.testing.vlms import VLMS, FamilyUnavailable, generate


def planted(blocks: list[tuple[int, int, int, int]], grid: tuple[int, int]) -> list[Tensor]:
    """Return (A^Q, A^G) [1, 1, gh, gw]; blocks (top, left, bottom, right) get ten times more."""
    general = torch.rand(1, 1, *grid, dtype=torch.float64) + 0.1
    more = torch.ones(grid, dtype=torch.float64)
    for top, left, bottom, right in blocks:
        more[top:bottom, left:right] = 10
    return [general * more, general]


def test_the_contrast_solves_its_problem() -> None:
    a, b, lam = torch.rand(50).double(), torch.rand(50).double(), 0.3
    c = contrast(a, b, lam).requires_grad_()
    loss = ((c * b - a) ** 2 / b + lam * c**2).sum()
    (slope,) = torch.autograd.grad(loss, c)
    assert slope.abs().max() < 1e-12
    assert torch.equal(contrast(a, a, 0.0), torch.ones(50).double())


@pytest.mark.parametrize(("grid", "size"), [((8, 8), (64, 64)), ((6, 10), (100, 60))])
def test_a_planted_block_is_found_where_it_is(grid: Any, size: Any) -> None:
    """Wide pictures too: no axes are swapped. The grid is drawn as it is: nearest cells."""
    block = (1, 2, 4, 4)
    question, general = planted([block], grid)
    s = fused(question, general, size, 0.0, "start")
    cell = (size[0] // grid[1], size[1] // grid[0])
    share = 3 * 2 / (grid[0] * grid[1])
    left, top, right, bottom = box_of(regions(s, share, 1))
    wanted = (2 * cell[0], 1 * cell[1], 4 * cell[0], 4 * cell[1])
    assert np.abs(np.subtract((left, top, right, bottom), wanted)).max() <= max(cell) // 3


def test_regions_by_count_sum_and_neighbours() -> None:
    s = np.zeros((9, 12))
    s[1:3, 1:3], s[5:8, 6:9], s[8, 9] = 3.0, 2.0, 2.0  # the last touches a corner only
    p = np.count_nonzero(s) / s.size
    one = regions(s, p, 1)
    assert one.sum() == 9 and one[5:8, 6:9].all()  # the larger sum, 18 against 12
    assert regions(s, p, 2).sum() == 13 and regions(s, p, 3).sum() == 14
    assert regions(s, p, None).sum() == 14  # the official count: three at least
    assert regions(s, 1.0, 5).all()


def test_regions_equal_a_flood_fill() -> None:
    source = np.random.default_rng(0)
    for _ in range(30):
        s = source.random((11, 17))
        above = s >= np.percentile(s, 60)
        found, left = [], {(int(y), int(x)) for y, x in np.argwhere(above)}
        while left:
            todo, part = [left.pop()], set()
            while todo:
                y, x = todo.pop()
                part.add((y, x))
                near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
                left -= near
                todo += near
            found.append(part)
        best = sorted(found, key=lambda part: -sum(s[at] for at in part))[:3]
        wanted = np.zeros_like(above)
        for part in best:
            wanted[tuple(zip(*part, strict=True))] = True
        assert np.array_equal(regions(s, 0.4, 3), wanted)


def test_scales_of_the_maps_change_no_region() -> None:
    question, general = (torch.rand(2, 3, 6, 6).double() + 0.1 for _ in range(2))
    s = fused(question, general, (30, 30), 0.0, "full")
    np.testing.assert_allclose(fused(4 * question, general, (30, 30), 0.0, "full"), 4 * s)
    np.testing.assert_allclose(fused(4 * question, 4 * general, (30, 30), 0.0, "full"), s)
    assert np.array_equal(regions(4 * s, 0.3, 2), regions(s, 0.3, 2))


def test_steps() -> None:
    question, general = torch.rand(4, 2, 5, 5), torch.rand(3, 2, 5, 5) + 0.1
    each = [
        fused(question[t : t + 1], general[t : t + 1], (20, 20), 0.0, "start") for t in (0, 1, 2)
    ]
    full = fused(question, general, (20, 20), 0.0, "full")
    np.testing.assert_allclose(full, each[0] + 2 * each[1] + 3 * each[2])
    assert np.array_equal(fused(question, general, (20, 20), 0.0, "end"), each[2])
    assert np.array_equal(fused(question, general, (20, 20), 0.0, "start"), each[0])


def test_alike_maps_point_nowhere() -> None:
    a = torch.rand(1, 2, 6, 6) + 0.1
    assert flat(fused(a, a, (30, 30), 0.0, "start"))
    assert flat(fused(a, a, (30, 30), 1e-8, "start"))
    question, general = planted([(1, 1, 3, 3)], (6, 6))
    assert not flat(fused(question, general, (30, 30), 0.0, "start"))


def test_refined_pictures() -> None:
    pixels = np.random.default_rng(0).integers(1, 255, (40, 60, 3), dtype=np.uint8)
    image, mask = Image.fromarray(pixels), np.zeros((40, 60), dtype=bool)
    mask[10:20, 5:35] = True
    assert refine(image, np.ones_like(mask), "masked crop") is image
    black = np.asarray(refine(image, mask, "mask"))
    assert np.array_equal(black[mask], pixels[mask]) and not black[~mask].any()
    cut = refine(image, mask, "crop")
    assert cut.size == (120, 40)  # no side shorter than before, shape kept
    mask[12:18, 10:20] = False
    assert (np.asarray(refine(image, mask, "masked crop")) == 0).any()


# -- inside models ---------------------------------------------------------------------------


def eager_rows(name: str, inputs: dict[str, Any], layers: range) -> Tensor:
    """Return the last row's attention to the image [L, n], mean over heads, of eager maps."""
    model = VLMS[name].build(attention="eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    image = inputs["input_ids"][0] == 10
    return torch.stack([maps[i][0, :, -1].mean(0)[image] for i in layers])


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "internvl"])
def test_the_probe_equals_eager_attention_and_changes_nothing(name: str) -> None:
    model, inputs = VLMS[name].build(), VLMS[name].inputs((0,))
    before = generate(model, inputs, 3)
    probe = ImageAttention((1, 2))
    with attnctl.patch(model, probe):
        assert torch.equal(generate(model, inputs, 3), before)
    (maps,) = probe.maps(grids_of(model, inputs))
    assert maps.shape[:2] == (3, 2)
    wanted = eager_rows(name, inputs, range(1, 3))
    torch.testing.assert_close(maps[0].flatten(1), wanted, rtol=1e-4, atol=1e-6)
    # a written token: the whole text up to it, in one forward
    words = before.argmax(-1)[:, :2]
    longer = torch.cat([inputs["input_ids"], words], dim=1)
    more = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    if "mm_token_type_ids" in more:
        more["mm_token_type_ids"] = (longer == 10).long()
    wanted = eager_rows(name, more, range(1, 3))[:, : maps[2, 0].numel()]
    torch.testing.assert_close(maps[2].flatten(1), wanted, rtol=1e-4, atol=1e-6)


def test_image_tokens_that_are_no_grid_are_refused() -> None:
    for name, images in (("llava", 2), ("llava-next", 1), ("instructblip", 1)):
        model = VLMS[name].build()
        with pytest.raises(attnctl.HostError, match="not one square grid"):
            grids_of(model, VLMS[name].inputs((0,), images=images))


@functools.cache
def teller() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    folder = attnctl.assets.path("tiny-llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model, transformers.LlavaProcessor.from_pretrained(folder)


def test_the_whole_call() -> None:
    model, processor = teller()
    photo = album(1)[0]
    question = f"Is there a {photo.items[0].name} in the image?"
    held = {n: type(m) for n, m in model.named_modules()}
    found = attnctl.carve(model, processor, photo.image, question, p=0.2, max_new_tokens=4)
    assert found.box == box_of(found.mask) and found.map.shape == (224, 224)
    assert 0 < found.mask.mean() <= 0.21 and min(found.image.size) >= 224
    again = attnctl.carve(model, processor, photo.image, question, p=0.2, inputs="both",
                          form="crop", suffix="Please answer yes or no.")  # fmt: skip
    assert {found.answer, found.before, again.answer} <= {"Yes", "No"}
    assert {n: type(m) for n, m in model.named_modules()} == held


def test_what_keeps_the_picture() -> None:
    """p = 1, and a question that is the general instruction itself."""
    model, processor = teller()
    photo = album(1)[0]
    whole = attnctl.carve(model, processor, photo.image, "How many objects are there?", p=1.0)
    assert whole.image.tobytes() == photo.image.tobytes() and whole.answer == whole.before
    text = "Write a general description of the image."
    alike = attnctl.carve(model, processor, photo.image, text)
    assert alike.mask is None and alike.answer == alike.before


def test_general_maps_are_made_once_a_picture() -> None:
    model, processor = teller()
    one, two = album(2)
    carver = attnctl.Carver(model, processor, max_new_tokens=4)
    asked = [carver(one.image, "Is there a red circle in the image?")]
    assert len(carver.known) == 1
    maps = next(iter(carver.known.values()))[1]
    asked.append(carver(one.image, "Is there a red circle in the image?"))
    assert next(iter(carver.known.values()))[1] is maps
    assert np.array_equal(asked[0].map, asked[1].map)
    carver(two.image, "Is there a red circle in the image?")
    assert len(carver.known) == 2


@pytest.mark.parametrize("options", [
    {"steps": "full", "inputs": "both", "form": "crop", "p": 0.1, "regions": 1},
    {"steps": "start", "p": 0.3},
])  # fmt: skip
def test_a_batch_gives_what_single_questions_give(options: dict[str, Any]) -> None:
    """Answers of different lengths, a picture that comes twice, and one that points nowhere."""
    model, processor = teller()
    one, two, three = (photo.image for photo in album(3))
    name = album(1)[0].items[0].name
    asked = [
        (one, f"Is there a {name} in the image?"), (two, "Describe the image."),
        (three, "Write a general description of the image."), (one, "What color is the square?"),
    ]  # fmt: skip
    together = attnctl.Carver(model, processor, max_new_tokens=12, **options)
    found = together.many(*zip(*asked, strict=True))
    assert len(together.known) == 3 and found[2].mask is None
    assert together.many([], []) == []
    for got, (image, question) in zip(found, asked, strict=True):
        want = attnctl.Carver(model, processor, max_new_tokens=12, **options)(image, question)
        assert (got.answer, got.before, got.box) == (want.answer, want.before, want.box)
        assert got.ended == want.ended and (got.mask is None) == (want.mask is None)
        np.testing.assert_allclose(got.map, want.map, rtol=1e-3)
    assert len({one.ended for one in found}) == 2


def test_pictures_of_different_grids_in_one_batch() -> None:
    try:
        model = VLMS["qwen2.5-vl"].build()
    except FamilyUnavailable as error:
        pytest.skip(str(error))
    grids, words = [(4, 4), (4, 8)], [[1, 20], [1, 21, 22, 23]]
    pixels = [torch.randn(h * w, 96, generator=torch.Generator().manual_seed(w)) for h, w in grids]

    def inputs(*samples: int) -> dict[str, Any]:
        prompts = [
            [*words[i], 11, *[10] * (grids[i][0] * grids[i][1] // 4), 12, 30] for i in samples
        ]
        most = max(map(len, prompts))
        ids = torch.tensor([[0] * (most - len(one)) + one for one in prompts])
        return {
            "input_ids": ids, "attention_mask": (ids != 0).long(),
            "mm_token_type_ids": (ids == 10).long(),
            "pixel_values": torch.cat([pixels[i] for i in samples]),
            "image_grid_thw": torch.tensor([[1, *grids[i]] for i in samples]),
        }  # fmt: skip

    def maps(*samples: int) -> list[Tensor]:
        given, probe = inputs(*samples), ImageAttention((1, 2))
        known = inspect.signature(type(model).forward).parameters
        given = {k: v for k, v in given.items() if k in known}
        with attnctl.patch(model, probe):
            generate(model, given, 2)
        return probe.maps(grids_of(model, given))

    found = maps(0, 1)
    assert [tuple(one.shape) for one in found] == [(2, 2, 2, 2), (2, 2, 2, 4)]
    for sample in (0, 1):
        torch.testing.assert_close(found[sample], maps(sample)[0], rtol=1e-3, atol=1e-6)


def test_controls_in_the_model_take_part() -> None:
    model, processor = teller()
    photo = album(1)[0]
    question = "What color is the square?"
    plain = attnctl.carve(model, processor, photo.image, question)
    with attnctl.patch(model, attnctl.PAI(alpha=2.0, rows="text"), attnctl.VCD(both=True)):
        raised = attnctl.carve(model, processor, photo.image, question, steps="full")
    assert not np.allclose(plain.map, raised.map)


def test_the_probe_sees_the_rows_that_a_control_computes_anew() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs((0,))
    probes = [ImageAttention((0, 2)), ImageAttention((0, 2))]
    with torch.no_grad():
        for probe, alpha in zip(probes, (0.0, 5.0), strict=True):
            with attnctl.patch(model, attnctl.PAI(alpha=alpha, first_layer=1), probe):
                model(**inputs)
    plain, raised = (probe.maps(grids_of(model, inputs))[0][0].sum((1, 2)) for probe in probes)
    torch.testing.assert_close(raised[0], plain[0])
    assert (raised[1:] - plain[1:]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [({"p": 0.0}, "p=0.0"), ({"regions": 0}, "1 or more"), ({"lam": -1.0}, "lam"),
     ({"steps": "middle"}, "start, end, full"), ({"form": "oval"}, "masked crop"),
     ({"inputs": "three"}, "refined, both")],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        attnctl.Carver(None, None, **options)


def test_layers_by_depth() -> None:
    """Published layers where they were published for, the same share of the depth elsewhere."""
    model, processor = teller()
    assert attnctl.Carver(model, processor).span() == (5, 6)
    given = dataclasses.replace(attnctl.Carver(model, processor), layers=(1, 2))
    assert given.span() == (1, 2)
