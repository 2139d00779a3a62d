"""Drawing from Python: seeds, comparisons, presets, the record, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

import attnctl
from attnctl import presets
from attnctl.apps.generate import Settings, choose, generate
from attnctl.apps.models import load
from attnctl.apps.pictures import read_metadata

PROMPT = "a red circle and a blue square"
QUICK = Settings(steps=2)
MILD = "softpag:u=0.5,scale=2"


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = load("tiny-sd3", device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and ImageChops.difference(a, b).getbbox() is None


def test_the_same_seed_gives_the_same_pixels(pipe: Any) -> None:
    first, again = (generate(PROMPT, model=pipe, settings=QUICK).picture() for _ in range(2))
    other = generate(PROMPT, model=pipe, settings=Settings(steps=2, seed=1)).picture()
    assert first.tobytes() == again.tobytes()
    assert not same(first, other)


def test_comparing_draws_both_from_the_same_noise(pipe: Any) -> None:
    stock = generate(PROMPT, model=pipe, settings=QUICK).images["stock"]
    alone = generate(PROMPT, MILD, model=pipe, settings=QUICK)
    both = generate(PROMPT, MILD, model=pipe, settings=QUICK, compare=True)
    assert list(alone.images) == ["controlled"]
    assert list(both.images) == ["stock", "controlled"]
    assert same(both.images["stock"], stock)
    assert same(both.images["controlled"], alone.images["controlled"])
    assert not same(both.images["stock"], both.images["controlled"])
    assert same(alone.picture(), alone.images["controlled"])
    assert min(both.picture().size) > 320


def test_neutral_controls_draw_the_stock_picture(pipe: Any) -> None:
    both = generate(PROMPT, "softpag:u=0", model=pipe, settings=QUICK, compare=True)
    assert same(both.images["stock"], both.images["controlled"])


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    before = type(pipe), type(pipe.scheduler), dict(pipe._progress_bar_config)
    generate(PROMPT, MILD, model=pipe, settings=QUICK, compare=True)
    with pytest.raises(attnctl.SelectorError):
        generate(PROMPT, "softpag:heads=L99", model=pipe, settings=QUICK)
    assert (type(pipe), type(pipe.scheduler), dict(pipe._progress_bar_config)) == before


def test_a_patched_pipeline_can_be_drawn_with(pipe: Any) -> None:
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=2.0, u=0.5)):
        patched = generate(PROMPT, model=pipe, settings=QUICK)
    assert same(patched.picture(), generate(PROMPT, MILD, model=pipe, settings=QUICK).picture())
    assert patched.metadata["pipeline"] == "StableDiffusion3Pipeline"


def test_the_report_counts_what_was_touched(pipe: Any) -> None:
    report = generate(PROMPT, "softpag:heads=L1H0-1,scale=2", model=pipe, settings=QUICK).report
    assert report is not None
    (line,) = report.lines
    assert (line.sites, line.heads, line.forwards, line.steps) == (1, 2, 2, (0, 1))
    assert line.calls == 2
    assert generate(PROMPT, model=pipe, settings=QUICK).report is None


def test_the_record_says_how_it_was_made(pipe: Any, tmp_path: Path) -> None:
    settings = Settings(steps=2, seed=7, guidance_scale=2.5, negative_prompt="green")
    control = attnctl.SoftPAG(heads=[(1, 0), (1, 1)], scale=2.0)
    result = generate(PROMPT, control, model=pipe, settings=settings, compare=True)
    result.save(tmp_path / "a.png")
    data = read_metadata(tmp_path / "a.png")
    assert data == json.loads(json.dumps(result.metadata))
    assert data["prompt"] == PROMPT
    assert data["model"] == "tiny-sd3"
    assert (data["seed"], data["steps"], data["guidance_scale"]) == (7, 2, 2.5)
    assert data["negative_prompt"] == "green"
    assert (data["width"], data["height"]) == (64, 64)
    assert data["pictures"] == ["stock", "controlled"]
    assert set(data["versions"]) >= {"attnctl", "torch", "diffusers"}
    (control_data,) = data["controls"]
    assert control_data["options"]["heads"] == [[1, 0], [1, 1]]
    assert control_data["options"]["u"] == 0.5
    assert control_data["text"] == "softpag:heads=L1H0,L1H1,scale=2"
    assert data["report"][0]["steps"] == [0, 1]


def test_defaults_are_written_out(pipe: Any) -> None:
    data = generate(PROMPT, model=pipe, settings=QUICK).metadata
    assert data["guidance_scale"] is not None
    assert data["controls"] == data["report"] == []


def test_settings_reach_the_pipeline(pipe: Any) -> None:
    wide = generate(PROMPT, model=pipe, settings=Settings(steps=1, height=32, width=64))
    assert wide.picture().size == (64, 32)


def test_text_without_options_takes_the_models_preset(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets.find("softpag", pipe)
    chosen = choose(pipe, "softpag")
    assert chosen.preset == preset
    assert chosen.control == attnctl.SoftPAG(**preset.options)
    assert choose(pipe, "softpag:u=0.5") == choose(pipe, attnctl.SoftPAG(u=0.5))

    def none(*_: object) -> None:
        raise attnctl.OptionError("no preset fits")

    monkeypatch.setattr(presets, "find", none)
    plain = choose(pipe, "softpag")
    assert plain.preset is None
    assert plain.control == attnctl.SoftPAG()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "outside 0"),
        ({"steps": 0}, "steps 0"),
        ({"height": 0}, "height 0"),
        ({"width": -8}, "width -8"),
        ({"guidance_scale": float("nan")}, "guidance scale nan"),
        ({"guidance_scale": float("inf")}, "guidance scale inf"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], part: str) -> None:
    with pytest.raises(attnctl.OptionError, match=part):
        Settings(**options)


def test_comparing_needs_a_control(pipe: Any) -> None:
    with pytest.raises(attnctl.OptionError, match="at least one control"):
        generate(PROMPT, model=pipe, compare=True)


def test_pipelines_that_draw_otherwise_are_refused() -> None:
    class Scheduler:
        pass

    class Video:
        config = scheduler = Scheduler()

        def __call__(self, prompt: str, num_inference_steps: int = 1, num_frames: int = 1) -> None:
            raise AssertionError

    class Upscaler(Video):
        def __call__(self, image: Any) -> None:
            raise AssertionError

    class Distilled(Video):
        def __call__(self, prompt: str, num_inference_steps: int = 1) -> None:
            raise AssertionError

    for pipeline, part in ((Video(), "videos"), (Upscaler(), "does not draw from a prompt")):
        with pytest.raises(attnctl.HostError, match=part):
            generate(PROMPT, model=pipeline)
    with pytest.raises(attnctl.OptionError, match="Distilled takes no negative prompt"):
        generate(PROMPT, model=Distilled(), settings=Settings(negative_prompt="blue"))


def test_negative_prompts_without_effect_are_refused(pipe: Any) -> None:
    settings = Settings(steps=1, guidance_scale=1.0, negative_prompt="blue")
    with pytest.raises(attnctl.OptionError, match=r"changes nothing .* at guidance 1; .*nag"):
        generate(PROMPT, model=pipe, settings=settings)
