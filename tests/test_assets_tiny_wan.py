"""tiny-wan: it loads with diffusers alone, films what its card says, and can be trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors import safe_open

import attnctl
from attnctl import assets
from attnctl.assets import world
from attnctl.assets.train import recipe
from attnctl.assets.train.film import film
from attnctl.assets.train.measure_wan import SEED, load_pipeline, plain_transformer, sets
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.video_vae import build, psnr, round_trip
from attnctl.assets.train.wan_parts import LENGTH, Filmer, tokenizer, tokens
from attnctl.assets.train.whole_clip import decode_whole, encode_whole

ALONE = """
import importlib.util, sys, time
find, hidden = importlib.util.find_spec, ("attnctl", "peft")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.modules["attnctl"] = None
import torch
from diffusers import WanPipeline
torch.set_num_threads(1)  # so that waiting threads cost nothing
start = time.process_time()
pipe = WanPipeline.from_pretrained(sys.argv[1])
size = {"height": 64, "width": 64, "num_frames": 17}
options = {"num_inference_steps": 10, "guidance_scale": 3, "max_sequence_length": 32}
clip = pipe("a red circle moving left", **size, **options, output_type="pil").frames[0]
assert len(clip) == 17 and clip[0].size == (64, 64)
assert not [name for name in sys.modules if name.startswith("attnctl.")]
print(time.process_time() - start)
"""
SIZE = {"height": 64, "width": 64}
SHORT = {**SIZE, "num_frames": 5, "num_inference_steps": 1, "output_type": "pt"}
BOTH = "a video of a red circle moving left slowly and a blue square standing still"


@pytest.fixture(scope="module")
def folder() -> Path:
    return assets.path("tiny-wan")


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    made = load_pipeline(folder, torch.device("cpu"))
    made.set_progress_bar_config(disable=True)
    return made


def row_of(figures: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    return next(row for row in figures["moved"] if wanted.items() <= row.items())


def shaken(model: torch.nn.Module, seed: int = 0) -> Any:
    """The model in double precision with all weights random, so that every part matters."""
    source = torch.Generator().manual_seed(seed)
    for weight in model.double().parameters():
        noise = torch.randn(weight.shape, generator=source).double()
        weight.data = 0.2 * noise if weight.ndim < 2 else noise * weight[0].numel() ** -0.5
    return model.eval()


def test_loads_and_films_with_diffusers_alone(folder: Path):
    command = [sys.executable, "-P", "-c", ALONE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr
    assert float(done.stdout.split()[-1]) < 20


def test_files(folder: Path):
    files = list(folder.rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) < 10.5e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names = list(weights.keys())
                assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text()


def test_the_class_is_found_by_itself(folder: Path):
    made = DiffusionPipeline.from_pretrained(folder)
    assert type(made) is WanPipeline and type(made.scheduler) is UniPCMultistepScheduler
    assert {part.dtype for part in (made.transformer, made.vae, made.text_encoder)} == {
        torch.float32
    }
    assert made.vae_scale_factor_temporal == 2 and made.vae_scale_factor_spatial == 4


@pytest.mark.parametrize(("dtype", "frames"), [(torch.bfloat16, 5), (torch.float16, 1)])
def test_half_precision_with_some_parts_in_single(folder: Path, dtype: torch.dtype, frames: int):
    half = WanPipeline.from_pretrained(folder, dtype=dtype)
    assert half.transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert half.transformer.proj_out.weight.dtype == half.vae.dtype == dtype
    check_half(half, frames)


@pytest.mark.parametrize(("dtype", "frames"), [(torch.bfloat16, 5), (torch.float16, 1)])
def test_all_in_half_precision(folder: Path, dtype: torch.dtype, frames: int):
    check_half(load_pipeline(folder, torch.device("cpu")).to(dtype), frames)


def check_half(half: Any, frames: int):
    half.set_progress_bar_config(disable=True)
    options = SHORT | {"num_frames": frames, "max_sequence_length": 32}
    clips = half(["", "a red ring moving up"], **options).frames
    assert clips.shape == (2, frames, 3, 64, 64) and clips.isfinite().all()


def test_the_transformer_loads_without_accelerate(folder: Path, pipe: Any):
    plain, stock = plain_transformer(folder).state_dict(), pipe.transformer.state_dict()
    assert plain.keys() == stock.keys()
    assert all(torch.equal(plain[name], stock[name]) for name in stock)


def test_every_word_is_one_token(pipe: Any):
    ids = pipe.tokenizer(BOTH)["input_ids"]
    assert len(ids) == len(BOTH.split()) + 1 <= LENGTH
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True) == BOTH
    assert pipe.tokenizer.unk_token_id not in ids


def test_odd_prompts_are_encoded(pipe: Any):
    odd = ["wörds nobody trained, 你好 <&>", "A " * 600]
    states, empty = pipe.encode_prompt(odd, max_sequence_length=512)
    assert states.shape == empty.shape == (2, 512, 96)
    assert states.isfinite().all() and empty[:, :1].any() and not empty[:, 1:].any()


@pytest.mark.parametrize("length", [LENGTH, 32, 77])
def test_folded_padding_is_the_stock_computation(tmp_path: Path, length: int):
    words = tokenizer(tmp_path / "tokenizer")
    filmer = shaken(Filmer(words, 6, layers=2))
    stock = WanPipeline(words, filmer.text_encoder, build(), None, filmer.transformer)
    prompts, source = [BOTH, ""], torch.Generator().manual_seed(length)
    noisy = torch.randn(2, 6, 3, 4, 4, generator=source).double()
    sigma = torch.tensor([0.3, 0.9]).double()
    with torch.no_grad():
        states, _ = stock.encode_prompt(prompts, None, False, max_sequence_length=length)
        plain = filmer.transformer(noisy, 1000 * sigma, states, return_dict=False)[0]
        filmer.fold()
        ids = tokens(words, prompts).long()
        folded = filmer(noisy, sigma, ids, torch.tensor([length, length]))
        assert (filmer.encode(ids)[:, :LENGTH] - states[:, :LENGTH]).abs().max() < 1e-9
    assert plain.norm() > 1 and (folded - plain).norm() < 1e-6 * plain.norm()


def test_other_lengths_of_padding_differ(tmp_path: Path):
    """So the test above would notice a padding that is left out."""
    words = tokenizer(tmp_path / "tokenizer")
    filmer = shaken(Filmer(words, 6, layers=2))
    filmer.fold()
    noisy, sigma = torch.ones(2, 6, 1, 4, 4).double(), torch.tensor([0.5, 0.5]).double()
    ids = tokens(words, [BOTH, BOTH]).long()
    with torch.no_grad():
        short, long = filmer(noisy, sigma, ids, torch.tensor([32, 512]))
    assert (short - long).abs().max() > 1e-3


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_a_whole_clip_at_once_is_the_stock_autoencoder(frames: int):
    vae = shaken(build(latents=4, widths=(8, 8)))
    source = torch.Generator().manual_seed(frames)
    clips = torch.rand(2, 3, frames, 16, 24, generator=source).double() * 2 - 1
    with torch.no_grad():
        stock = vae.encode(clips).latent_dist.parameters
        latents = torch.cat(encode_whole(vae, clips), 1)
        assert latents.shape == (2, 8, 1 + (frames - 1) // 2, 4, 6)
        assert (latents - stock).norm() < 1e-9 * stock.norm()
        again = vae.decode(stock[:, :4]).sample
        whole = decode_whole(vae, stock[:, :4])
    assert whole.shape == clips.shape
    assert (whole.clamp(-1, 1) - again).norm() < 1e-9 * again.norm()


def test_sites_and_tokens(pipe: Any):
    seen: dict[str, set[tuple[Any, ...]]] = {"self": set(), "cross": set()}

    class Look(attnctl.Control):
        selector, name, kinds = "all", "look", ("self", "cross")

        def attend(self, call: attnctl.AttentionCall) -> torch.Tensor:
            seen[call.site.kind].add((call.spans.grid, tuple(call.q.shape[1:])))
            return call.proceed()

    options = SIZE | {"num_frames": 17, "num_inference_steps": 1, "output_type": "latent"}
    with attnctl.patch(pipe, Look()):
        latents = pipe("a red ring moving up", **options, guidance_scale=1).frames
    assert latents.shape[2:] == (9, 16, 16)
    assert seen["self"] == seen["cross"] == {((9, 16, 16), (3, 2304, 64))}


def test_longer_clips_and_other_sizes(pipe: Any):
    options = {"num_inference_steps": 1, "guidance_scale": 1, "max_sequence_length": 32}
    clip = film(pipe, ["a red ring moving up slowly"], frames=33, **options)
    assert clip.shape == (1, 33, 3, 64, 64) and clip.isfinite().all()
    wide = pipe("a red ring moving up", **SHORT | {"width": 96}, guidance_scale=1).frames
    assert wide.shape == (1, 5, 3, 64, 96) and wide.isfinite().all()


def test_training_begins_with_stills(tmp_path: Path):
    made: Any = recipe("tiny-wan", Run(out=tmp_path, smoke=True))
    made.prepare()
    clips, words = made.batch(2)
    many = made.tune.many
    assert clips.shape == (2 * many, made.vae.config.z_dim, 1, 16, 16)
    assert words.shape == (2 * many, LENGTH)
    made.done = 0.5
    clips, words = made.batch(2)
    assert clips.shape == (2, made.vae.config.z_dim, 3, 16, 16) and len(words) == 2


def test_the_autoencoder_is_as_good_as_its_figures(folder: Path, figures: dict[str, Any]):
    known = figures["video-vae"]
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    moving = world.sample_moving(8, objects=(1, 1), seed=93)
    clips = moving.draw()
    again = round_trip(vae, clips)
    assert known["psnr"] >= 33 and known["right"]["rate"] >= 0.97
    assert psnr(again, clips).mean() >= known["psnr"] - 1.5
    assert world.moved(again, moving.captions()).right.float().mean() >= 0.75


def test_the_aims(figures: dict[str, Any]):
    row = row_of(figures, prompts="one object", guidance_scale=3.0, num_inference_steps=12)
    assert row["rate"] >= 0.85 and min(row["objects"], row["direction"]) >= 0.85
    longer = [row for row in figures["moved"] if row["frames"] > 17]
    assert {row["frames"] for row in longer} == {33, 65}


def test_the_card_is_true(pipe: Any, figures: dict[str, Any]):
    """One object at guidance 3 and 8 steps, with the first six of the card's prompts."""
    options = {"guidance_scale": 3.0, "num_inference_steps": 8}
    row = row_of(figures, prompts="one object", frames=17, **options)
    prompts = sets(row["n"])["one object"][:6]
    clips = film(pipe, prompts, seed=SEED, batch=3, **options)
    assert proportion(world.moved(clips, prompts).right)["high"] >= row["low"]


def test_the_card_shows_its_figures(folder: Path, figures: dict[str, Any]):
    card = (folder / "README.md").read_text()
    assert all(f"{100 * row['rate']:.1f} %" in card for row in figures["moved"])
    assert str(figures["training"]["steps"]) in card
    assert "{" not in card.split("## What it is")[1]
