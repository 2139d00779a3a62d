"""tiny-sd3: it loads with diffusers alone and draws what its card says."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open

from attnctl import assets
from attnctl.assets import world
from attnctl.assets.train.measure import SEED, sets
from attnctl.assets.train.measure_sd3 import load_folded, pictures
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.tokenizer import learn, split
from attnctl.assets.train.zeros import FoldedZeros, log_count

FOLDER = assets.path("tiny-sd3")
ALONE = """
import importlib.util, sys, time
find, hidden = importlib.util.find_spec, ("accelerate", "attnctl", "peft")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.modules["attnctl"] = None
import torch
from diffusers import StableDiffusion3Pipeline
torch.set_num_threads(1)  # so that waiting threads cost nothing
start = time.process_time()
pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
image = pipe("a red circle and a blue square", num_inference_steps=20, guidance_scale=3).images[0]
assert image.size == (64, 64)
assert not [name for name in sys.modules if name.startswith(("attnctl.", "accelerate"))]
print(time.process_time() - start)
"""


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    made = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    made.set_progress_bar_config(disable=True)
    return made


def test_loads_and_draws_with_diffusers_alone():
    command = [sys.executable, "-P", "-c", ALONE, str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 20


def test_files():
    files = [FOLDER.parent / "detector.safetensors", *FOLDER.rglob("*")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 14e6
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                names = list(weights.keys())
                assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
        if file.suffix == ".json":
            assert "_name_or_path" not in file.read_text()


def test_loads_in_float32(pipe: StableDiffusion3Pipeline):
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}


def test_bfloat16_and_an_empty_prompt():
    half = StableDiffusion3Pipeline.from_pretrained(FOLDER).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    image = half(["", "a red ring"], num_inference_steps=1, output_type="pt").images
    assert image.shape == (2, 3, 64, 64) and image.isfinite().all()


def test_every_word_is_one_token(pipe: StableDiffusion3Pipeline):
    prompt = "a drawing of a red circle, a blue square and an orange ring on a grey background"
    ids = pipe.tokenizer(prompt)["input_ids"]
    assert len(ids) == 2 + len(prompt.replace(",", " ,").split())
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == prompt


def test_odd_prompts_are_encoded(pipe: StableDiffusion3Pipeline):
    odd = ["wörds nobody trained, 你好 <&>", "A " * 40]
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(odd, odd, odd)
    assert states.shape == (2, 20 + 256, 192) and states.isfinite().all()
    assert pooled.shape == (2, 192)


def test_the_third_encoder_is_silent(pipe: StableDiffusion3Pipeline):
    with torch.no_grad():
        states, *_ = pipe.encode_prompt("a red ring", None, None)
    assert states[:, :20].abs().sum() > 0 and not states[:, 20:].any()


def test_merges_of_words_with_common_parts():
    words = (
        "red",
        "green",
        "ring",
        "diamond",
        "and",
        "an",
        "a",
        "triangle",
        "orange",
        "background",
    )
    merges = learn(words)
    assert [split(word, merges) for word in words] == [[word + "</w>"] for word in words]


@pytest.mark.parametrize("count", [256, 3, 0])
def test_folded_zeros_are_the_stock_computation(count: int):
    painter = StableDiffusion3Pipeline.from_pretrained(FOLDER).transformer.double()
    source = torch.Generator().manual_seed(count)
    text, noisy = (
        torch.randn(*shape, generator=source).double() for shape in ((2, 20, 192), (2, 4, 16, 16))
    )
    rest = {"pooled_projections": text[:, 0], "timestep": torch.tensor([300.0, 900.0])}
    zeros = torch.zeros(2, count, 192, dtype=torch.double)
    with torch.no_grad():
        stock = painter(noisy, torch.cat([text, zeros], 1), **rest).sample
        painter.set_attn_processor(FoldedZeros())
        kwargs = {"log_zeros": log_count(torch.full((2,), count))}
        one = torch.cat([text, zeros.new_zeros(2, 1, 192)], 1)
        folded = painter(noisy, one, **rest, joint_attention_kwargs=kwargs).sample
    assert (folded - stock).norm() < 1e-6 * stock.norm()


def test_the_card_is_true():
    """One object at guidance 3 and 8 steps, with the first 48 of the card's prompts."""
    figures = json.loads((FOLDER / "figures.json").read_text())
    row = next(row for row in figures["exact"] if row["num_inference_steps"] == 8)
    assert row["prompts"] == "one object" and row["rate"] >= 0.9
    prompts = sets(500)["one object"][:48]
    options = {"guidance_scale": row["guidance_scale"], "num_inference_steps": 8}
    images = pictures(load_folded(FOLDER, torch.device("cpu")), prompts, SEED, **options)
    found = proportion(world.exact(images, prompts))
    assert found["rate"] >= 0.85 and found["high"] >= row["low"]


def test_the_card_shows_its_figures():
    figures = json.loads((FOLDER / "figures.json").read_text())
    card = (FOLDER / "README.md").read_text()
    assert all(f"{100 * row['rate']:.1f} %" in card for row in figures["exact"])
    assert str(figures["training"]["steps"]) in card
