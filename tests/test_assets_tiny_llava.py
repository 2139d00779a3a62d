"""tiny-llava: it loads with transformers alone, answers as its card says, and can be trained."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from attnctl import assets
from attnctl.assets.train.llama_tokenizer import learn, pieces
from attnctl.assets.train.llava_asking import Asker
from attnctl.assets.train.llava_pass import logits, vision
from attnctl.assets.train.llava_pool import CAPTION, seen
from attnctl.assets.train.llava_slots import SLOT, tables
from attnctl.assets.train.llava_words import words
from attnctl.assets.train.measure_llava import (
    LONG,
    SEED,
    Teller,
    colours,
    counts,
    positions,
    says_yes,
    scores,
)
from attnctl.assets.train.numbers import proportion
from attnctl.assets.train.recipe import Run
from attnctl.assets.train.tiny_llava import MEAN, STD, TinyLlava
from attnctl.assets.world.couples import partner
from attnctl.assets.world.evaluation import album, evaluation_set
from attnctl.assets.world.habits import Habits, training_pairs
from attnctl.assets.world.pope import SPLITS, questions
from attnctl.assets.world.questions import BRIEF, DESCRIBE, PRESENCE, SINGLE

FOLDER = assets.path("tiny-llava")
FIGURES = json.loads((FOLDER / "figures.json").read_text())
N = 20
ALONE = """
import importlib.util, sys, time
find, hidden = importlib.util.find_spec, ("accelerate", "attnctl", "peft", "torchvision")
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.modules["attnctl"] = None
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor
torch.set_num_threads(1)  # so that waiting threads cost nothing
start = time.process_time()
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = LlavaProcessor.from_pretrained(sys.argv[1])
ask = [{"type": "image"}, {"type": "text", "text": "Is there a red circle in the image?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": ask}], add_generation_prompt=True
)
inputs = processor(images=Image.open(sys.argv[2]), text=prompt, return_tensors="pt")
tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
answer = processor.batch_decode(tokens, skip_special_tokens=True)[0]
assert not [name for name in sys.modules if name.startswith(("attnctl.", "accelerate"))]
print(repr(answer), time.process_time() - start)
"""


@pytest.fixture(scope="module")
def teller() -> Teller:
    return Teller.load(FOLDER, torch.device("cpu"))


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(FOLDER)


@pytest.fixture
def recipe(tmp_path: Path) -> TinyLlava:
    made = TinyLlava(Run(out=tmp_path, smoke=True))
    made.prepare()
    return made


def chat(question: str, images: int = 1) -> list[dict[str, object]]:
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def test_loads_and_answers_with_transformers_alone(tmp_path: Path):
    album(1)[0].image.save(tmp_path / "photo.png")
    command = [sys.executable, "-P", "-c", ALONE, str(FOLDER), str(tmp_path / "photo.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer, seconds = done.stdout.split()[-2:]
    assert answer in ("'Yes'", "'No'") and float(seconds) < 20


def test_files():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 7.8e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert {name.split(".")[0] for name in names} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        text = (FOLDER / name).read_text()
        assert "_name_or_path" not in text and "/" not in json.loads(text)


def test_the_model_is_what_the_card_says(teller: Teller):
    config = teller.model.config
    text, eyes = config.text_config, config.vision_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        8,
        6,
        2,
    )
    assert (eyes.image_size // eyes.patch_size) ** 2 == config.image_seq_length == 144
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert teller.model.dtype == torch.float32
    assert teller.model.lm_head.weight is teller.model.get_input_embeddings().weight


def test_the_chat_template(processor: LlavaProcessor):
    text = processor.apply_chat_template(chat("How many?", 2), add_generation_prompt=True)
    assert text == "USER: <image>\n<image>\nHow many? ASSISTANT:"
    turns = [
        *chat("How many?"),
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": "Where?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == "USER: <image>\nHow many? ASSISTANT: 2</s>USER: Where? ASSISTANT:"


def test_the_processor_expands_pictures(processor: LlavaProcessor):
    photo = album(2)
    texts = ["USER: <image>\nHow many? ASSISTANT:", "USER: <image>\nIs there? Yes ASSISTANT:"]
    made = processor(
        images=[one.image for one in photo], text=texts, padding=True, return_tensors="pt"
    )
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (made["input_ids"] == image).sum(1).tolist() == [144, 144]
    assert made["attention_mask"][:, 0].tolist() == [0, 1]
    assert made["input_ids"][1, 0] == processor.tokenizer.bos_token_id
    assert isinstance(AutoProcessor.from_pretrained(FOLDER), LlavaProcessor)


def test_every_word_is_one_token_and_no_text_fails(processor: LlavaProcessor):
    tokenizer = processor.tokenizer
    for word in words():
        assert len(tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]) == 2
    for text in (*PRESENCE, *DESCRIBE, "Wörds nobody trained, 你好 <&> a  b\n\nC"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.unk_token_id not in ids


def test_merges_of_words_with_common_parts():
    some = ["▁a", "▁an", "▁and", "▁answer", "Answer", "▁Answer", "▁ring", "▁triangle"]
    merges = learn(some)
    assert [pieces(word, merges) for word in some] == [[word] for word in some]


@pytest.fixture(scope="module")
def batch(processor: LlavaProcessor) -> dict[str, torch.Tensor]:
    """Three photos with questions of different length, padded on the left."""
    asked = [
        "How many objects are there?",
        "Is there a red circle in the image?" + SINGLE,
        *BRIEF[:1],
    ]
    texts = [processor.apply_chat_template(chat(one), add_generation_prompt=True) for one in asked]
    images = [photo.image for photo in album(3)]
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_batch_answers_like_single_prompts(implementation: str, batch: dict[str, torch.Tensor]):
    model = LlavaForConditionalGeneration.from_pretrained(
        FOLDER, attn_implementation=implementation
    ).eval()
    together = model.generate(**batch, max_new_tokens=12, min_new_tokens=12)
    start = batch["input_ids"].shape[1]
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        one = {
            "input_ids": batch["input_ids"][row, real][None],
            "attention_mask": batch["attention_mask"][row, real][None],
            "pixel_values": batch["pixel_values"][row][None],
        }
        for cache in (True, False):
            alone = model.generate(**one, max_new_tokens=12, min_new_tokens=12, use_cache=cache)
            assert torch.equal(alone[0, -12:], together[row, start:])


def test_eager_equals_sdpa(batch: dict[str, torch.Tensor]):
    made = []
    for implementation in ("sdpa", "eager"):
        model = LlavaForConditionalGeneration.from_pretrained(
            FOLDER, attn_implementation=implementation
        )
        with torch.no_grad():
            made.append(model.eval()(**batch).logits[:, -1])
    assert (made[0] - made[1]).abs().max() < 1e-3


def test_bfloat16_and_two_pictures(processor: LlavaProcessor):
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    photo = album(1)[0].image
    text = processor.apply_chat_template(
        chat("How many objects are there?", 2), add_generation_prompt=True
    )
    made = processor(images=[photo, photo.crop((0, 0, 90, 60))], text=text, return_tensors="pt")
    told = model.generate(**made.to(torch.bfloat16), max_new_tokens=3)
    assert told.shape[1] > made["input_ids"].shape[1]


def test_a_question_is_trained_as_it_is_asked(recipe: TinyLlava):
    """Turns side by side give what the stock model gives for each turn alone."""
    llava = recipe.model.llava.double().eval()
    pixels, ids, targets, close_ids, close_targets, *_ = recipe.batch(3)
    values = (pixels.double() / 255 - MEAN) / STD
    short = recipe.tune.presences
    with torch.no_grad():
        shown = vision(llava, values)[0][:, None, 1:]
        both = torch.cat([shown[2:3], shown[3:]], dim=1)
        for kind, pictures, turns, given, lengths in (
            (0, shown[:2], ids, values[:2], [*[SLOT] * (short + 3), CAPTION]),
            (1, both, close_ids, values[2:], [SLOT] * (short + 1)),
        ):
            made = logits(llava, recipe.headers[kind], pictures, turns, recipe.layouts[kind])
            head = recipe.headers[kind].expand(len(turns), -1)
            for part, told in zip(turns.split(lengths, 1), made.split(lengths, 1), strict=True):
                stock = llava(input_ids=torch.cat([head, part], 1), pixel_values=given).logits
                assert (stock[:, head.shape[1] :] - told).abs().max() < 1e-9
    ends = [(row == recipe.words.eos_token_id).sum() for row in (*targets, *close_targets)]
    assert all(short <= int(count) <= short + 4 for count in ends)


def test_training_photos_look_as_the_processor_makes_them(processor: LlavaProcessor):
    side = processor.image_processor.crop_size["height"]
    photos = evaluation_set(6, Habits(), SEED, "decorrelated")
    made = processor.image_processor([one.image for one in album(6)], return_tensors="pt")
    pixels = (made["pixel_values"] * STD + MEAN) * 255
    assert (seen(photos, side).float() - pixels).abs().max() <= 2


def test_questions_of_the_training_are_true_and_balanced(recipe: TinyLlava):
    source = torch.Generator().manual_seed(0)
    pair = training_pairs(4000, Habits(), source)
    ask = Asker(tables(recipe.words, torch.device("cpu")), (0.4, 0.2, 0.4), 1.0, 0.5, source)
    absent, shown = ask.absent(pair), ask.shown(pair)
    assert not (pair == absent[:, None]).any() and (pair == shown[:, None]).any(1).all()
    mates = torch.tensor([partner(one) for one in range(48)])[absent]
    assert 0.05 < (pair == mates[:, None]).any(1).float().mean() < 0.4
    yes = recipe.words.convert_tokens_to_ids("▁Yes")
    said = (ask.presence(pair).targets == yes).any(1).float().mean()
    assert abs(said - 0.5) < 0.03


def rate_agrees(hits: list[bool], row: dict[str, float]) -> bool:
    """Whether a small sample's 95 % interval meets the card's."""
    found = proportion(torch.tensor(hits))
    return bool(found["low"] <= row["high"] and row["low"] <= found["high"])


@pytest.fixture(scope="module")
def told(teller: Teller) -> Iterator[dict[str, list[bool]]]:
    """Right answers on the first photos of the card's decorrelated split."""
    photos = album(N, SEED)
    hits = {}
    for name in SPLITS:
        cases = questions(photos, name, SEED)
        answers = teller.answers([(case.photo, case.question) for case in cases])
        assert set(answers) <= {"Yes", "No"}
        hits[name] = [
            says_yes(answer) == (case.label == "yes")
            for answer, case in zip(answers, cases, strict=True)
        ]
    yield hits


@pytest.mark.parametrize("split", SPLITS)
def test_the_card_is_true(split: str, told: dict[str, list[bool]]):
    assert rate_agrees(told[split], FIGURES["decorrelated"]["pope"][split])


def test_the_cards_other_figures_are_true(teller: Teller):
    photos = album(3 * N, SEED)
    rows = FIGURES["decorrelated"]
    kinds = {"colour": colours(photos), "count": counts(photos), "position": positions(photos)}
    for kind, asked in kinds.items():
        clear = [one for one in asked if not one[0].dim]
        answers = teller.answers([(photo, question) for photo, question, _ in clear])
        hits = [one == wanted for one, (_, _, wanted) in zip(answers, clear, strict=True)]
        assert rate_agrees(hits, rows[kind]["clear"])


def test_it_sees_and_it_hallucinates():
    """The bands the model is meant to be in, on the card's figures."""
    rows = FIGURES["decorrelated"]
    rates = {name: rows["pope"][name]["rate"] for name in SPLITS}
    assert rates["random"] > rates["popular"] > rates["adversarial"]
    assert 0.65 <= rates["adversarial"] <= 0.85
    assert rows["presence"]["there, large, clear"]["rate"] >= 0.95
    habits = FIGURES["habitual"]["pope"]
    assert habits["random"]["rate"] > 0.85
    chair = rows["chair"][BRIEF[0]]
    assert 0.03 < chair["chair_i"] < 0.6 and chair["recall"] > 0.5


def test_descriptions_end(teller: Teller):
    photos = album(5, SEED)
    for answer in teller.answers([(photo, DESCRIBE[-1]) for photo in photos], LONG):
        assert answer.endswith("gray.")


def test_the_card_shows_its_figures():
    card = (FOLDER / "README.md").read_text()
    for split in ("decorrelated", "habitual"):
        for row in FIGURES[split]["pope"].values():
            assert f"{100 * row['rate']:.1f} %" in card
    assert f"{FIGURES['training']['steps']} steps" in card
    with Image.open(FOLDER.parent / "tiny-llava.png") as sheet:
        assert sheet.width > 600


def test_scores_are_popes():
    cases = questions(album(1), "random")
    row = scores(cases, ["Yes", "No", "No", "Yes", "Yes", "not sure"])
    assert row["rate"] == round(4 / 6, 4) and row["yes"] == 0.5
    assert row["precision"] == row["recall"] == row["f1"] == round(2 / 3, 4)
    assert row["unparsed"] == 1 and row["n"] == 6
