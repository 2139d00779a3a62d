"""Where the words of an answer look: equal to transformers' own maps, through every control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import attnctl
from attnctl.apps import cli
from attnctl.apps.answer_heatmap import captions, words_shown
from attnctl.apps.eval.answering import Answerer, chat
from attnctl.apps.pictures import read_metadata
from attnctl.assets.world.pope import pope
from attnctl.hosts.vlm_tokens import image_ids
from attnctl.processors.analysis.answer_map import AnswerMap, AnswerSums
from attnctl.processors.analysis.asking import image_grid, picture_seen, words_of
from attnctl.processors.vlm.var import reads_image, redistribution
from attnctl.testing import oracles
from attnctl.testing.vlms import VLMS, FamilyUnavailable, generate
from attnctl.testing.vlms.planted import Planting, planted

pytest.importorskip("transformers")
QUESTION = "Describe the image."
PLANT, TAU = Planting(), 4.0


@pytest.fixture(scope="module")
def teller() -> Answerer:
    return Answerer.load("tiny-llava", "cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return pope("adversarial", n_images=1, seed=0)[0].image


def mapped(teller: Answerer, photo: Image.Image, *controls: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 6, **options}
    return attnctl.answer_maps(
        teller.model, teller.processor, photo, QUESTION, *controls, **options
    )


# ---- against the model's own maps


def of_transformers(model: Any, inputs: dict[str, Any], tokens: int) -> Tensor:
    """Return transformers' weights of the predicting rows, [T, L, B, H, n image tokens]."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens,
            output_attentions=True, return_dict_in_generate=True,
        )  # fmt: skip
    ids = inputs["input_ids"]
    image = torch.isin(ids, torch.tensor(image_ids(model.config))).any(0)
    steps = []
    for t, layers in enumerate(out.attentions):
        total, rows = ids.shape[1] + t, []
        for a in layers:
            row = a[:, :, -1].double()  # a sliding window has lost its first keys
            row = torch.nn.functional.pad(row, (max(0, total - row.shape[-1]), 0))
            rows.append(row[..., : ids.shape[1]][..., image])
        steps.append(torch.stack(rows))
    return torch.stack(steps)


@pytest.mark.parametrize("name", VLMS)
def test_weights_are_those_that_transformers_returns(name: str) -> None:
    try:
        model, eager = VLMS[name].build(), VLMS[name].build(attention="eager")
    except FamilyUnavailable as error:
        pytest.skip(str(error))
    inputs = VLMS[name].inputs()
    stock = generate(model, inputs, 4)
    runs: list[AnswerSums] = []
    with attnctl.patch(model, AnswerMap(runs.append)) as handle:
        assert torch.equal(generate(model, inputs, 4), stock)
        assert handle.report().calls == 4 * len(attnctl.sites(model))
    assert torch.equal(generate(model, inputs, 4), stock)
    want = of_transformers(eager, inputs, 4)
    got = runs[0].done()
    torch.testing.assert_close(got.tokens().double(), want.mean((1, 3)), rtol=1e-3, atol=1e-6)
    for (layer, head), heat in got.by_head().items():
        mean = want[:, layer, :, head].mean(0)
        torch.testing.assert_close(heat.double(), mean, rtol=1e-3, atol=1e-6)


def test_heads_are_selected_and_a_run_without_a_cache_is_the_same() -> None:
    model, inputs = VLMS["llava"].build(), VLMS["llava"].inputs()
    runs: list[AnswerSums] = []
    for options in ({}, {"use_cache": False}):
        with attnctl.patch(model, AnswerMap(runs.append, "L1H0-1")):
            generate(model, inputs, 3, **options)
    with attnctl.patch(model, AnswerMap()) as handle:
        generate(model, inputs, 3)
        assert handle.report().calls == 0  # nobody takes the maps
    few, plain = (one.done() for one in runs)
    assert list(few.by_head()) == [(1, 0), (1, 1)]
    torch.testing.assert_close(few.tokens(), plain.tokens(), rtol=1e-4, atol=1e-6)
    mean = torch.stack(list(few.by_head().values())).mean(0)
    torch.testing.assert_close(few.tokens().mean(0), mean)


# ---- what other controls do


class Inner(attnctl.Control):
    """Notes the last row's weights in float64 as they reach it, the last call of a step wins."""

    name = "inner"
    kinds = ("causal",)

    def __init__(self) -> None:
        object.__setattr__(self, "found", dict[tuple[int, int], Tensor]())

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        tokens = call.spans.tokens
        assert tokens is not None and call.site.layer is not None
        if call.v.shape[-1] == call.q.shape[-1]:  # not the reading of the maps itself
            few = call.queries_at(torch.tensor([call.q.shape[2] - 1]))
            k = few.repeat_kv(few.k)
            weights = oracles.softmax_map(few.q, k, few.mask, few.scale)
            self.found[call.step.index, call.site.layer] = weights[:, :, 0]
        return call.proceed()


def steps_of(inner: Inner, image: Tensor, change: Any = lambda layer, a: a) -> Tensor:
    """Return the mean over layers and heads by step, [T, n]."""
    steps = 1 + max(step for step, _ in inner.found)
    return torch.stack(
        [
            torch.stack([change(j, a)[0] for (i, j), a in inner.found.items() if i == step]).mean(
                (0, 1)
            )[: len(image)][image]
            for step in range(steps)
        ]
    )


def inputs_of(teller: Answerer, photo: Image.Image) -> tuple[dict[str, Any], Tensor]:
    prompt = teller.processor.apply_chat_template(chat(QUESTION), add_generation_prompt=True)
    made = dict(teller.processor(text=[prompt], images=[photo], return_tensors="pt"))
    return made, made["input_ids"][0] == teller.model.config.image_token_index


def tokens_read(teller: Answerer, inputs: dict[str, Any], *controls: Any) -> Tensor:
    runs: list[AnswerSums] = []
    with attnctl.patch(teller.model, AnswerMap(runs.append), *controls), torch.no_grad():
        teller.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return runs[0].done().tokens()[:, 0]


def test_the_map_shows_raised_logits(teller: Answerer, photo: Image.Image) -> None:
    """PAI adds to the logits: what reaches a control further in is the truth."""
    (inputs, image), inner = inputs_of(teller, photo), Inner()
    got = tokens_read(teller, inputs, attnctl.PAI(alpha=0.7), inner)
    torch.testing.assert_close(got.double(), steps_of(inner, image), rtol=1e-4, atol=1e-7)
    assert got.sum() > 1.05 * tokens_read(teller, inputs).sum()


def test_the_map_shows_redistributed_weights(teller: Answerer, photo: Image.Image) -> None:
    """VAR changes the weights themselves: the formula on the weights that it starts from."""
    (inputs, image), inner = inputs_of(teller, photo), Inner()
    var = attnctl.VAR(sink_dims=PLANT.dims, tau=TAU, rho_nonsink=0.0)
    with planted(teller.model, PLANT):
        sinks = attnctl.sink_map(teller.model, inputs, PLANT.dims).sinks(TAU)[:, 0]
        got = tokens_read(teller, inputs, inner, var)
        unread = tokens_read(teller, inputs)

    def redistributed(layer: int, a: Tensor) -> Tensor:
        if layer == len(sinks) - 1 or not (sinks[layer] & image).any():
            return a
        n = a.shape[-1] - len(image)  # written tokens are no sinks
        here, there = (torch.nn.functional.pad(x, (0, n)) for x in (sinks[layer], image))
        groups = torch.stack([here & ~there, here & there, there & ~here]).to(a.dtype)
        masses = a @ groups.T
        factors = redistribution(masses, reads_image(masses, 0.0, 0.2), 0.6)
        return a * (factors @ groups + (1 - groups.sum(0)))

    want = steps_of(inner, image, redistributed)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)
    assert got[:, list(PLANT.tokens)].sum() < 0.8 * unread[:, list(PLANT.tokens)].sum()


def test_weights_that_cannot_be_read_from_further_in_are_refused(
    teller: Answerer, photo: Image.Image
) -> None:
    var = attnctl.VAR(sink_dims=(0,), tau=TAU)
    with attnctl.patch(teller.model, var), pytest.raises(attnctl.HostError, match="itself"):
        mapped(teller, photo)
    with attnctl.patch(teller.model, attnctl.PAI(alpha=0.7)):
        outside = mapped(teller, photo)
    torch.testing.assert_close(outside.maps, mapped(teller, photo, attnctl.PAI(alpha=0.7)).maps)


# ---- the function and its pictures


def test_the_answer_is_the_stock_one_and_words_lie_on_objects(
    teller: Answerer, photo: Image.Image
) -> None:
    (reply,) = teller.reply([chat(QUESTION)], [[photo]], 24)
    found = mapped(teller, photo, max_new_tokens=24)
    assert found.answer == reply.text == " ".join(found.words)
    assert found.maps.shape == (len(found.words), 144) and found.grid == (12, 12)
    assert (found.maps >= 0).all() and (found.shares() <= 1).all()
    assert len(found.heads) == 48 and not found.sinks.any()
    every = torch.stack(list(found.heads.values())).mean(0)
    assert every.shape == (144,) and float(every.sum()) < 1
    # words for things look at things: no grey
    pixels = torch.from_numpy(np.array(found.image)).float()
    coloured = (pixels.amax(-1) - pixels.amin(-1) > 60).float()
    cells = coloured.unfold(0, 6, 6).unfold(1, 6, 6).mean((-1, -2)).flatten() > 0.1
    for i in words_shown(found)[:4]:
        heat = found.maps[i]
        assert heat[cells].mean() > 2 * heat[~cells].mean(), found.words[i]


def test_sinks_are_framed_and_do_not_stretch_the_map(teller: Answerer, photo: Image.Image) -> None:
    plain = mapped(teller, photo)
    assert plain.overlay(0).size == plain.plain().size == (72, 72)
    with planted(teller.model, PLANT):
        found = mapped(teller, photo, tau=TAU)
    assert found.sinks.nonzero()[:, 0].tolist() == list(PLANT.tokens)
    drawn = found.overlay(0)
    assert drawn.size == found.plain().size == (360, 360)
    pixels = np.array(drawn)
    for cell in PLANT.tokens:
        row, column = divmod(cell, 12)
        assert (pixels[row * 30, column * 30 : column * 30 + 30] == 255).all()
    assert not (pixels[5 * 30, 5 * 30 : 6 * 30] == 255).all()
    # the hottest of the others is as hot as a sink
    heat = found.maps[0]
    assert heat[found.sinks].min() > heat[~found.sinks].max()
    row, column = divmod(int(heat.masked_fill(found.sinks, 0).argmax()), 12)
    assert pixels[row * 30 + 15, column * 30 + 15].max() > 200
    assert "sinks " in captions(found, [0])[0] and "sinks" not in captions(plain, [0])[0]


def test_words_of_an_answer(teller: Answerer) -> None:
    tokenizer = teller.processor.tokenizer
    ids = tokenizer("There is a cyan diamond, two rings.", add_special_tokens=False).input_ids
    ids = [*ids, tokenizer.eos_token_id]
    found = words_of(tokenizer, ids)
    assert [word for word, _ in found] == ["There", "is", "a", "cyan", "diamond,", "two", "rings."]
    assert sorted(i for _, at in found for i in at) == [*range(len(ids) - 1)]
    assert words_of(tokenizer, []) == []


def test_a_grid_is_told_only_where_there_is_one(photo: Image.Image) -> None:
    from types import SimpleNamespace as Bag

    one, qwen = torch.zeros(1, 3, 8, 8), Bag(config=Bag(vision_config=Bag(spatial_merge_size=2)))
    assert image_grid(None, {"pixel_values": one}, 16) == (4, 4)
    assert image_grid(None, {"pixel_values": one}, 15) is None
    assert image_grid(None, {"pixel_values": one.expand(4, -1, -1, -1)}, 16) is None
    grid = {"image_grid_thw": torch.tensor([[1, 6, 10]])}
    assert image_grid(qwen, grid, 15) == (3, 5) and image_grid(qwen, grid, 16) is None
    assert picture_seen(None, {}, photo).size == photo.size
    assert max(picture_seen(None, {}, photo.resize((4000, 20))).size) == 1024
    lost = attnctl.AnswerMaps("", ("a",), torch.zeros(1, 15), {}, torch.zeros(15) > 0, None, photo)
    with pytest.raises(attnctl.HostError, match="no one grid"):
        lost.overlay(0)
    with pytest.raises(attnctl.OptionError, match="has 1"):
        lost.overlay(1)


# ---- the command


def test_the_command(
    tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    command = ["heatmap", "--image", str(tmp_path / "in.png"), "--control", "pai:alpha=0.5"]
    assert cli.run([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "176 attention calls at 8 sites" in " ".join(said.split())
    data = read_metadata(out)
    assert data["answer"].startswith("There is a") and data["controls"][0]["name"] == "pai"
    assert data["words"][:2] == ["cyan", "diamond"]
    few = [*command, "--words", "diamond", "--heads", "L2", "--out", str(out)]
    assert cli.run(few) == 0
    assert set(read_metadata(out)["words"]) == {"diamond"}
    for more, message in (
        (["--words", "unicorn"], "no word 'unicorn'"),
        (["a prompt"], "PROMPT has no meaning"),
        (["--steps", "3"], "--steps has no meaning"),
        (["--model", "tiny-sd"], "holds no model of transformers"),
    ):
        assert cli.run([*command, *more, "--out", str(tmp_path / "no.png")]) == cli.BAD_INPUT
        assert message in capsys.readouterr().err
    assert cli.run(["heatmap", "--question", "Why?"]) == cli.BAD_INPUT
    assert "--image" in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
