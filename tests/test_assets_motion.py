"""The shape world in motion: captions, sampling, drawing, the held-out split, the judge."""

import pytest
import torch

from attnctl.assets import world
from attnctl.assets.world.heldout import shows_heldout
from attnctl.assets.world.motion import (
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    SPEEDS,
    STILL,
    is_heldout_motion,
    shows_heldout_motion,
)
from attnctl.assets.world.palette import COLOUR_NAMES
from attnctl.assets.world.sampling import smallest_gap
from attnctl.assets.world.watch import tracks, wanted

BOTH = "a red circle moving left slowly and a blue square standing still"


@pytest.fixture(scope="module")
def moving() -> world.Moving:
    return world.sample_moving(48, objects=(1, 1), seed=5)


@pytest.fixture(scope="module")
def clips(moving: world.Moving) -> torch.Tensor:
    return moving.draw()


def turned(prompt: str) -> str:
    """The prompt with every direction turned round."""
    swap = {"left": "right", "right": "left", "up": "down", "down": "up"}
    return " ".join(swap.get(word, word) for word in prompt.split())


def goes(prompt: str) -> bool:
    return any(motion != STILL for _, motion in world.parse_motion(prompt))


def test_captions_come_back(moving: world.Moving):
    for row, prompt in zip(moving.moved(), moving.captions(), strict=True):
        assert world.parse_motion(prompt) == row
        assert world.parse_motion(world.motion_caption(row, "a video of {}")) == row
        assert world.parse(prompt) == tuple(pair for pair, _ in row)


def test_caption_reads_as_english():
    row = [(("red", "circle"), world.Motion("left", "slowly")), (("blue", "square"), STILL)]
    assert world.motion_caption(row) == BOTH
    assert world.parse_motion(f"A video of {BOTH.upper()}, please") == tuple(row)
    assert str(world.Motion("up", "")) == "moving up"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a dog moving left", "no object"),
        ("a red circle", "moving left slowly"),
        ("a red circle and a blue square moving up", "not every object"),
        ("a red ring moving up and a red ring moving down", "twice"),
    ],
)
def test_prompts_that_do_not_say_enough(prompt: str, message: str):
    with pytest.raises(ValueError, match=message):
        world.parse_motion(prompt)


def test_a_caption_needs_an_object():
    with pytest.raises(ValueError, match="at least one"):
        world.motion_caption([])


def test_objects_stay_inside_and_keep_apart():
    moving = world.sample_moving(400, objects=(1, 2), seed=6)
    there, radius = moving.scenes.there, moving.scenes.radius
    edge = radius[:, None, :, None]
    inside = (moving.centres > edge) & (moving.centres < 1 - edge)
    assert inside.all(-1).logical_or(~there[:, None]).all()
    assert (smallest_gap(moving.centres, there, radius) > 0).float().mean() > 0.99
    colour = moving.scenes.colour
    assert (colour[:, 0] != colour[:, 1])[there[:, 1]].all()


def test_ways_are_those_of_the_words(moving: world.Moving):
    ways = moving.centres[:, -1] - moving.centres[:, 0]
    for way, row in zip(ways, moving.moved(), strict=True):
        for (x, y), (_, motion) in zip(way.tolist(), row, strict=False):
            unit = DIRECTIONS.get(motion.direction, (0.0, 0.0))
            along = x * unit[0] + y * unit[1]
            assert abs(x * unit[1]) + abs(y * unit[0]) < 1e-6
            assert along == pytest.approx(SPEEDS[motion.speed] * any(unit), rel=0.09)


def test_clips_are_the_scenes_frame_by_frame(moving: world.Moving, clips: torch.Tensor):
    assert clips.shape == (48, FRAMES, 3, 64, 64)
    assert torch.equal(clips[:, 0], world.draw(moving.scenes))
    assert moving[:2].draw(32).shape == (2, FRAMES, 3, 32, 32)


def test_the_splits():
    train = world.sample_moving(1000, objects=(1, 1), split="train", seed=7)
    held = world.sample_moving(100, objects=(1, 1), split="heldout", seed=7)
    assert not shows_heldout_motion(train.scenes.pair, train.motion).any()
    assert not shows_heldout(train.scenes.pair).any()
    assert shows_heldout_motion(held.scenes.pair, held.motion).all()
    number = sum(is_heldout_motion(pair, way) for pair in world.PAIRS for way in (*DIRECTIONS, ""))
    assert number == 26


def test_prompts():
    prompts = world.moving_prompts(300, 1, seed=1)
    assert len(set(prompts)) == 300 and prompts == world.moving_prompts(300, 1, seed=1)
    assert world.moving_prompts(5, 1, seed=2) != prompts[:5]
    rows = [world.parse_motion(prompt)[0] for prompt in prompts]
    assert not any(is_heldout_motion(pair, motion.direction) for pair, motion in rows)
    assert {motion for _, motion in rows} == set(MOTIONS)
    for prompt in world.moving_prompts(50, 1, split="heldout"):
        ((pair, motion),) = world.parse_motion(prompt)
        assert is_heldout_motion(pair, motion.direction)
    slow = world.moving_prompts(20, 2, speeds=("slowly",))
    assert all(prompt.count("slowly") == 2 for prompt in slow)


def test_the_judge_on_drawn_clips(moving: world.Moving, clips: torch.Tensor):
    seen = world.moved(clips, moving.captions())
    assert seen.right.float().mean() >= 0.98
    assert seen.score.mean() > 0.85


def test_the_judge_refuses_what_runs_backwards(moving: world.Moving, clips: torch.Tensor):
    prompts = moving.captions()
    rows = [i for i, prompt in enumerate(prompts) if goes(prompt)]
    seen = world.moved(clips[rows].flip(1), [prompts[i] for i in rows])
    assert seen.objects.float().mean() >= 0.98 and not seen.direction.any()
    again = world.moved(clips[rows].flip(1), [turned(prompts[i]) for i in rows])
    assert again.right.float().mean() >= 0.98


def test_the_judge_refuses_other_words(clips: torch.Tensor, moving: world.Moving):
    rows = [i for i, prompt in enumerate(moving.captions()) if goes(prompt)][:12]
    prompts = [moving.captions()[i] for i in rows]
    quick = [prompt.replace(" slowly", " fast") for prompt in prompts]
    changed = [i for i, (one, two) in enumerate(zip(prompts, quick, strict=True)) if one != two]
    seen = world.moved(clips[rows], quick)
    assert changed and not seen.speed[changed].any() and seen.direction.all()
    colours = dict(zip(COLOUR_NAMES, (*COLOUR_NAMES[1:], COLOUR_NAMES[0]), strict=True))
    other = [" ".join(colours.get(word, word) for word in prompt.split()) for prompt in prompts]
    assert not world.moved(clips[rows], other).right.any()


def test_the_judge_refuses_jumps_and_lost_objects():
    moving = world.sample_moving(6, objects=1, seed=8)
    clips, prompts = moving.draw(), moving.captions()
    lost = clips.clone()
    lost[:, ::2] = moving.scenes.background[:, None, None, None, None]
    seen = world.moved(lost, prompts)
    assert not seen.objects.any() and not seen.direction.any()
    order = torch.arange(FRAMES).roll(FRAMES // 2)
    rows = [i for i, prompt in enumerate(prompts) if "fast" in prompt or prompt.endswith("up")]
    assert rows and not world.moved(clips[rows][:, order], [prompts[i] for i in rows]).right.any()


def test_tracks_measure_the_way(moving: world.Moving, clips: torch.Tensor):
    colour, _ = wanted(moving.captions(), clips.device)
    line = tracks(clips, colour.clamp(min=0))
    there = moving.scenes.there
    way = (moving.centres[:, -1] - moving.centres[:, 0])[there]
    assert (line.way[there] - way).abs().max() < 0.02
    assert line.unsteady[there].max() < 0.01 and (line.seen[there] == 1).all()


def test_longer_clips_are_judged_by_the_same_speeds():
    moving = world.sample_moving(4, objects=1, seed=9, frames=33)
    slow = [i for i, prompt in enumerate(moving.captions()) if "fast" not in prompt]
    prompts = [moving.captions()[i] for i in slow]
    assert slow and world.moved(moving.draw()[slow], prompts).right.all()


def test_the_judge_wants_clips():
    with pytest.raises(ValueError, match="at least two frames"):
        world.moved(torch.zeros(1, 1, 3, 64, 64), [BOTH])
    with pytest.raises(ValueError, match="for 1 prompts"):
        world.moved(torch.zeros(2, 5, 3, 64, 64), [BOTH])
