"""tiny-sd: it loads with diffusers alone, draws what its card says, and fails where it should."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open

import attnctl
from attnctl import assets
from attnctl.assets import world
from attnctl.assets.train.measure import SEED, sets
from attnctl.assets.train.measure_sd import load_pipeline, pictures
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.sd_parts import scheduler

ALONE = """
import importlib.util, sys, time
find, hidden = importlib.util.find_spec, ("accelerate", "attnctl", "peft")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.modules["attnctl"] = None
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)  # so that waiting threads cost nothing
start = time.process_time()
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe("a red circle and a blue square", num_inference_steps=20, guidance_scale=5).images[0]
assert image.size == (64, 64)
assert not [name for name in sys.modules if name.startswith(("attnctl.", "accelerate"))]
print(time.process_time() - start)
"""
FAST = 10
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.path("tiny-sd")


@pytest.fixture(scope="module")
def rows(folder: Path) -> Rows:
    found: Rows = json.loads((folder / "figures.json").read_text())["exact"]
    return found


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    made = load_pipeline(folder, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


def row_of(rows: Rows, prompts: str, steps: int, guidance: float) -> dict[str, Any]:
    wanted = {"prompts": prompts, "num_inference_steps": steps, "guidance_scale": guidance}
    return next(row for row in rows if wanted.items() <= row.items())


def test_loads_and_draws_with_diffusers_alone(folder: Path):
    command = [sys.executable, "-P", "-c", ALONE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "safety" not in done.stderr and "deprecat" not in done.stderr
    assert float(done.stdout.split()[-1]) < 20


def test_files(folder: Path):
    files = list(folder.rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) < 9.6e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names = list(weights.keys())
                assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text()


def test_the_class_is_found_by_itself_without_warnings(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = DiffusionPipeline.from_pretrained(folder)
    assert type(made) is StableDiffusionPipeline
    assert {part.dtype for part in (made.unet, made.vae, made.text_encoder)} == {torch.float32}
    assert made.safety_checker is None and not made.config.requires_safety_checker
    assert made.vae.config.shift_factor is None


def test_the_noise_levels_are_those_of_training(pipe: Any):
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert torch.equal(pipe.scheduler.alphas_cumprod, scheduler().alphas_cumprod)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert not pipe.scheduler.config.clip_sample


def test_bfloat16_and_an_empty_prompt(folder: Path):
    half = StableDiffusionPipeline.from_pretrained(folder).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    image = half(["", "a red ring"], num_inference_steps=2, output_type="pt").images
    assert image.shape == (2, 3, 64, 64) and image.isfinite().all()


def test_odd_prompts_are_encoded(pipe: Any):
    odd = ["wörds nobody trained, 你好 <&>", "A " * 40]
    with torch.no_grad():
        states, empty = pipe.encode_prompt(odd, "cpu", 1, True)
    width = pipe.unet.config.cross_attention_dim
    assert states.shape == empty.shape == (2, 20, width) and states.isfinite().all()


def test_attention_at_two_resolutions(pipe: Any):
    grids: dict[str, set[tuple[int, ...]]] = {"self": set(), "cross": set()}

    class Look(attnctl.Control):
        selector, name, kinds = "all", "look", ("self", "cross")

        def attend(self, call: attnctl.AttentionCall) -> torch.Tensor:
            grids[call.site.kind].add((*call.spans.grid, call.q.shape[1]))
            return call.proceed()

    with attnctl.patch(pipe, Look()):
        pipe("a red ring", num_inference_steps=1, output_type="latent")
    assert grids["self"] == grids["cross"] == {(1, 16, 16, 8), (1, 8, 8, 8)}


def test_in_the_band(rows: Rows):
    """One object is drawn reliably; two often fail, but far from always."""
    best = max(row_of(rows, "one object", 20, g)["rate"] for g in (3.0, 5.0, 7.5))
    assert best >= 0.97
    assert 0.4 <= row_of(rows, "two objects", 20, 5.0)["rate"] <= 0.75


@pytest.mark.parametrize(("prompts", "n"), [("one object", 24), ("two objects", 48)])
def test_the_card_is_true(pipe: Any, rows: Rows, prompts: str, n: int):
    """The first of the card's prompts, at guidance 5 and ten steps."""
    row = row_of(rows, prompts, FAST, 5.0)
    chosen = sets(row["n"])[prompts][:n]
    images = pictures(pipe, chosen, SEED, guidance_scale=5.0, num_inference_steps=FAST)
    found = proportion(world.exact(images, chosen))
    assert found["low"] <= row["high"] and row["low"] <= found["high"]


def test_the_card_shows_its_figures(folder: Path, rows: Rows):
    card = (folder / "README.md").read_text()
    assert all(f"{100 * row['rate']:.1f} %" in card for row in rows)
    assert all(len(line) < 100 for line in card.splitlines() if not line.startswith("|"))
    assert "{" not in card and (folder.parent / "tiny-sd.png").is_file()


def test_every_version_of_transformers_finds_the_text_encoder_s_weights():
    file = assets.path("tiny-sd") / "text_encoder" / "model.safetensors"
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
    assert len(names) > 50 and all(name.startswith("text_model.") for name in names)
