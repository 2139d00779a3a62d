"""Sampled answers: drawn from the softmax, the same in any batch and after any stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnctl import assets
from attnctl.apps import cli
from attnctl.apps.eval.answering import Answerer, chat
from attnctl.apps.eval.sampling import Draw, Sampling
from attnctl.assets.world.export import export
from attnctl.assets.world.pope import pope

pytestmark = pytest.mark.skipif("tiny-llava" not in assets.names(), reason="no tiny-llava here")
DRAWS = 4000


def test_draws_are_from_the_softmax() -> None:
    """Of the first token and of the next; a token that was cut off never comes."""
    logits = torch.tensor([1.0, -0.5, 2.0, -torch.inf, 0.3])
    draw = Draw([str(i) for i in range(DRAWS)])
    for _ in range(2):
        tokens = draw(torch.zeros(DRAWS, 1), logits.expand(DRAWS, -1)).argmax(dim=-1)
        share = torch.bincount(tokens, minlength=5) / DRAWS
        wanted = logits.softmax(dim=-1)
        assert share[3] == 0
        assert ((share - wanted).abs() < 4 * (wanted * (1 - wanted) / DRAWS).sqrt() + 1e-9).all()


def test_rows_have_their_own_noise() -> None:
    both, alone = Draw(["0/a", "0/b"]), Draw(["0/b"])
    zeros = torch.zeros(2, 7)
    first, second = both(zeros, zeros), both(zeros, zeros)
    assert torch.equal(first[1:], alone(zeros, zeros[:1]))
    assert torch.equal(second[1:], alone(zeros, zeros[:1]))
    assert len({tuple(row.tolist()) for row in [*first, *second]}) == 4


def replies(answerer: Answerer, size: int, how: Sampling | None) -> list[str]:
    cases = pope("adversarial", n_images=2, seed=0)[:6]
    told: list[str] = []
    for i in range(0, len(cases), size):
        part = cases[i : i + size]
        options = how.options([f"{i + k}" for k in range(len(part))]) if how else {}
        chats = [chat("Describe the image.")] * len(part)
        found = answerer.reply(chats, [[one.image] for one in part], 12, **options)
        told += [one.text for one in found]
    return told


def test_answers_of_a_model() -> None:
    """One draw an item, whatever the batch; near temperature 0 and top-p 0 they are greedy."""
    answerer = Answerer.load("tiny-llava", "cpu", "float32")
    drawn, greedy = replies(answerer, 6, Sampling(seed=1)), replies(answerer, 6, None)
    assert drawn == replies(answerer, 4, Sampling(seed=1))
    assert drawn != replies(answerer, 6, Sampling(seed=2)) and len({*drawn[:3]}) > 1
    assert drawn != greedy
    assert greedy == replies(answerer, 6, Sampling(temperature=1e-6))
    assert greedy == replies(answerer, 6, Sampling(top_p=1e-6))


def test_a_sampled_run_goes_on_where_it_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table says how answers were drawn, also when it is made again without the model."""
    data, out = export(tmp_path / "data", 2, seed=1), tmp_path / "out"
    words = [
        "eval", "pope", "--model", "tiny-llava", "--images", str(data / "val2014"),
        "--annotations", str(data / "pope/coco_pope_adversarial.json"), "--out", str(out),
        "--batch", "4", "--device", "cpu", "--max-new-tokens", "4", "--control", "vcd:alpha=0",
        "--sample", "--temperature", "3", "--top-p", "0.9", "--seed", "5",
    ]  # fmt: skip
    assert cli.run(words) == 0
    how = "sampled at temperature 3.0, top-p 0.9, seed 5"
    assert f"12 items, {how}" in " ".join(capsys.readouterr().out.split())
    files = sorted(out.glob("*.jsonl"))
    heads: list[dict[str, Any]] = [json.loads(p.read_text().splitlines()[0]) for p in files]
    assert [one["facts"]["decoding"] for one in heads] == [how, how]
    whole = [path.read_bytes() for path in files]
    for path, content in zip(files, whole, strict=True):
        path.write_bytes(content[: len(content) // 2])
    assert cli.run(words) == 0
    assert [path.read_bytes() for path in files] == whole
    capsys.readouterr()
    assert cli.run(["eval", "score", *map(str, files)]) == 0
    assert how in " ".join(capsys.readouterr().out.split())
