"""The shape world: drawing, captions, the held-out split, the detector, the shipped files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from attnctl import assets
from attnctl.assets import world
from attnctl.assets.train.flaws import KINDS, draw_flawed
from attnctl.assets.train.sheet import picture
from attnctl.assets.world.draw import coverage, distance
from attnctl.assets.world.heldout import shows_heldout

RED_CIRCLE = world.Object("red", "circle", 0.3, 0.3, 0.17)
BLUE_SQUARE = world.Object("blue", "square", 0.7, 0.68, 0.17)
BOTH = "a red circle and a blue square"


def drawn(*objects: world.Object) -> torch.Tensor:
    return world.draw(world.Scenes.of([world.Scene(tuple(objects), 0.4)]))


def test_captions_come_back():
    scenes = world.sample(300, seed=3)
    for pairs in scenes.pairs():
        assert world.parse(world.caption(pairs)) == pairs
        assert world.parse(world.caption(pairs, "a drawing of {}")) == pairs


def test_caption_reads_as_english():
    pairs = [("red", "circle"), ("blue", "square"), ("orange", "ring")]
    assert world.caption(pairs) == "a red circle, a blue square and an orange ring"
    assert world.parse("An ORANGE ring, photo") == (("orange", "ring"),)


@pytest.mark.parametrize("prompt", ["", "a dog", "a red thing", "two red circles"])
def test_prompt_without_an_object(prompt: str):
    with pytest.raises(ValueError, match="no object"):
        world.parse(prompt)


def test_prompt_with_an_object_twice():
    with pytest.raises(ValueError, match="twice"):
        world.parse("a red circle and a red circle")


def test_unknown_words_name_the_known():
    with pytest.raises(ValueError, match="circle, square"):
        world.Object("red", "star", 0.5, 0.5, 0.2)
    with pytest.raises(ValueError, match="red, green"):
        world.Object("gold", "ring", 0.5, 0.5, 0.2)


def test_scenes_come_back_one_by_one():
    scenes = world.sample(20, seed=1)
    again = world.Scenes.of([scenes.scene(row) for row in range(len(scenes))])
    assert torch.equal(world.draw(again), world.draw(scenes))


@pytest.mark.parametrize("size", [33, 64, 96])
def test_drawing(size: int):
    scenes = world.sample(16, seed=2)
    images = world.draw(scenes, size)
    assert images.shape == (16, 3, size, size)
    assert images.min() >= 0 and images.max() <= 1
    corner = images[:, :, 0, 0]
    assert torch.allclose(corner, scenes.background[:, None].expand(-1, 3))


@pytest.mark.parametrize("shape", world.SHAPES)
def test_edges_are_smooth_and_areas_alike(shape: str):
    one = world.Scenes.of([world.Scene((world.Object("red", shape, 0.5, 0.5, 0.2),))])
    fine, coarse = (coverage(distance(one, 0, n), n).mean() for n in (512, 64))
    assert abs(fine - coarse) < 0.002
    assert 0.05 < fine < 0.14


def test_a_clip_follows_its_centres():
    scenes = world.sample(2, objects=2, seed=5)
    centres = scenes.centre[:, None].repeat(1, 3, 1, 1)
    centres[:, :, 0, 0] += torch.tensor([0.0, 0.1, 0.2])
    clip = world.draw(scenes, 32, centres)
    assert clip.shape == (2, 3, 3, 32, 32)
    assert torch.equal(clip[:, 0], world.draw(scenes, 32))
    assert not torch.equal(clip[:, 0], clip[:, 1])


def test_objects_keep_apart_and_inside():
    scenes = world.sample(500, objects=2, seed=4)
    apart = (scenes.centre[:, 0] - scenes.centre[:, 1]).norm(dim=1)
    assert (apart > scenes.radius.sum(1)).float().mean() > 0.98
    assert ((scenes.centre > 0.14) & (scenes.centre < 0.86)).all()


def test_the_splits():
    train = world.sample(2000, objects=(1, 2, 2), split="train", seed=6)
    held = world.sample(500, objects=3, split="heldout", seed=6)
    assert not shows_heldout(train.pair).any()
    assert shows_heldout(held.pair).all()
    assert len(world.heldout_combinations()) == 246


def test_heldout_prompts():
    prompts = world.heldout_prompts(400, 2, seed=1)
    assert len(set(prompts)) == 400 and prompts == world.heldout_prompts(400, 2, seed=1)
    assert all(world.is_heldout(*world.parse(prompt)) for prompt in prompts)
    assert world.heldout_prompts(5, 2, seed=2) != prompts[:5]
    assert len(world.heldout_prompts(600, 2)) == 600
    with pytest.raises(ValueError, match="every single one is trained"):
        world.heldout_prompts(5, 1)
    with pytest.raises(ValueError, match="two objects or more"):
        world.sample(5, objects=1, split="heldout")


def test_trained_prompts():
    prompts = world.trained_prompts(50, 3)
    assert all(len(world.parse(prompt)) == 3 for prompt in prompts)
    assert len(set(world.trained_prompts(100, 1))) == 48


def test_detector_on_drawn_pictures():
    scenes = world.sample(200, seed=11)
    prompts = [world.caption(pairs) for pairs in scenes.pairs()]
    assert world.exact(world.draw(scenes), prompts).float().mean() >= 0.99


def test_detector_is_strict():
    images = drawn(RED_CIRCLE, BLUE_SQUARE)
    assert world.exact(images, [BOTH]).all()
    for wrong in (
        "a red circle",
        "a blue circle and a red square",
        "a red circle and a blue ring",
        "a red circle, a blue square and a green ring",
    ):
        assert not world.exact(images, [wrong]).any()


def test_detector_refuses_an_object_too_many():
    twice = world.Object("red", "circle", 0.7, 0.25, 0.17)
    assert not world.exact(drawn(RED_CIRCLE, BLUE_SQUARE, twice), [BOTH]).any()


def test_detector_refuses_malformed_objects():
    source = torch.Generator().manual_seed(0)
    scenes = world.sample(200, objects=2, seed=source)
    kind = torch.arange(200) % KINDS
    images = draw_flawed(scenes, kind, 64, source)
    prompts = [world.caption(pairs) for pairs in scenes.pairs()]
    assert world.exact(images, prompts).float().mean() < 0.1


def test_log_prob_ranks_and_leads():
    images = drawn(RED_CIRCLE, BLUE_SQUARE).requires_grad_()
    right = world.log_prob(images, [BOTH])
    wrong = world.log_prob(images, ["a red circle and a green square"])
    assert -0.5 < right.item() <= 0 and wrong.item() < right.item() - 3
    (slope,) = torch.autograd.grad(wrong.sum(), images)
    assert slope.abs().sum() > 0


def test_detector_takes_pil_pictures():
    images = world.draw(world.sample(4, objects=2, seed=8))
    prompts = [world.caption(p) for p in world.sample(4, objects=2, seed=8).pairs()]
    pil: list[Image.Image] = [picture(image) for image in images]
    gap = world.log_prob(pil, prompts) - world.log_prob(images, prompts)
    assert world.exact(pil, prompts).all() and gap.abs().max() < 0.2


def test_detector_wants_a_prompt_per_picture():
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        world.exact(drawn(RED_CIRCLE), ["a red circle", "a red ring"])


def test_paths():
    assert "tiny-sd3" in assets.names()
    assert (assets.path("tiny-sd3") / "model_index.json").is_file()
    with pytest.raises(KeyError, match="tiny-sd3"):
        assets.path("tiny-sd9")


def test_another_folder_of_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny-own").mkdir()
    monkeypatch.setenv("ATTNCTL_ASSETS", str(tmp_path))
    assert assets.path("tiny-own") == tmp_path / "tiny-own"
    assert assets.path("tiny-sd3").is_dir()
    monkeypatch.setenv("ATTNCTL_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        assets.names()
