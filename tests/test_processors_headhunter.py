"""HeadHunter: exact on synthetic objectives, resumable, the same in any batch, slopes true."""

from __future__ import annotations

import dataclasses
import json
import math
import socket
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import attnctl
from attnctl.apps.bench.nursery import nursery
from attnctl.assets import path
from attnctl.assets.world import heldout_prompts
from attnctl.errors import OptionError
from attnctl.processors.headhunter import HeadHunter, HeadSet
from attnctl.processors.headhunter.gradient import STRAIGHT, TURNS, gradient, halfway
from attnctl.processors.headhunter.greedy import greedy
from attnctl.processors.headhunter.halving import (
    RIDGES,
    brief,
    corrected,
    effects,
    halving,
    turns,
)
from attnctl.processors.headhunter.headset import site_table_hash
from attnctl.processors.headhunter.objective import Custom, objective, objectives
from attnctl.processors.headhunter.rows import RowStrengths, strengths
from attnctl.processors.headhunter.thompson import Belief, thompson
from attnctl.processors.headhunter.trials import Trials

HEADS = [(layer, head) for layer in range(4) for head in range(6)]
CALL: dict[str, Any] = {
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
}
PROMPTS = ["a red circle and a blue square", "a green ring", "a pink cross and a cyan diamond"]


def additive(values: dict[tuple[int, int], float], noise: float = 0.0) -> Any:
    """An objective in which every head adds its value, with noise that pictures share or not."""

    def evaluate(candidates: Any, pictures: Any = None, steps: Any = None) -> torch.Tensor:
        drawn = list(range(8) if pictures is None else pictures)
        rows = []
        for heads in candidates:
            total = sum(values[h] for h in heads)
            own = [math.sin(99 * i + sum(7 * a + b for a, b in heads)) for i in drawn]
            rows.append(
                [total + 3 * math.cos(i) + noise * x for i, x in zip(drawn, own, strict=True)]
            )
        return torch.tensor(rows, dtype=torch.float64)

    return evaluate


def shuffled_values() -> dict[tuple[int, int], float]:
    order = torch.randperm(len(HEADS), generator=torch.Generator().manual_seed(3)).tolist()
    return {head: float(value) for head, value in zip(HEADS, order, strict=True)}


# -- strategies on synthetic objectives ----------------------------------------------------


def test_greedy_finds_the_best_heads_of_an_additive_objective() -> None:
    values = shuffled_values()
    rounds = greedy(additive(values), HEADS, 3, 2)
    wanted = sorted(HEADS, key=lambda h: -values[h])[:6]
    assert [h for one in rounds for h in one.chosen] == wanted
    assert [len(one.scores) for one in rounds] == [24, 22, 20]


def test_ties_go_to_the_lower_layer_then_head() -> None:
    flat = dict.fromkeys(HEADS, 1.0)
    (found,) = greedy(additive(flat), list(reversed(HEADS)), 1, 3)
    assert found.chosen == ((0, 0), (0, 1), (0, 2))


def test_rounds_find_a_synergy_that_one_round_misses() -> None:
    """Heads (0,0) and (3,5) are worth much together; (3,5) alone is worth little."""

    def evaluate(candidates: Any, pictures: Any = None, steps: Any = None) -> torch.Tensor:
        single = {(0, 0): 5.0, (1, 1): 4.0, (3, 5): 1.0}
        rows = [
            sum(single.get(h, 0.0) for h in heads) + 9.0 * ({(0, 0), (3, 5)} <= set(heads))
            for heads in candidates
        ]
        return torch.tensor(rows)[:, None]

    one = greedy(evaluate, HEADS, 1, 2)
    two = greedy(evaluate, HEADS, 2, 1)
    assert one[0].chosen == ((0, 0), (1, 1))
    assert [r.chosen[0] for r in two] == [(0, 0), (3, 5)]


def each_of(evaluate: Any, spent: list[int]) -> Any:
    """The same objective, a set on a picture each."""

    def each(candidates: Any, pictures: Any, steps: int) -> torch.Tensor:
        spent.append(len(candidates))
        pairs = zip(candidates, pictures, strict=True)
        return torch.tensor([float(evaluate([heads], [i])[0, 0]) for heads, i in pairs]).double()

    return each


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_halving_finds_them_within_its_budget(noise: float) -> None:
    values = shuffled_values()
    spent: list[int] = []
    each = each_of(additive(values, noise), spent)
    rounds = halving(each, HEADS, 2, 3, count=96, pictures=8, steps=10)
    wanted = sorted(HEADS, key=lambda h: -values[h])
    chosen = {*rounds[0].chosen, *rounds[1].chosen}
    assert len(chosen & set(wanted[:6])) >= 5 and chosen <= set(wanted[:8])
    assert spent == [8] + [16] * 6
    assert set(rounds[0].scores) == set(HEADS)
    assert set(rounds[1].scores) == set(HEADS) - set(rounds[0].chosen)


def test_halving_is_not_led_astray_by_a_picture_that_falls_apart() -> None:
    values = shuffled_values()
    wanted = sorted(HEADS, key=lambda h: -values[h])[:6]

    def broken(candidates: Any, pictures: Any) -> torch.Tensor:
        scores = additive(values)(candidates, pictures)
        for row, heads in zip(scores, candidates, strict=True):
            row -= 5000.0 * (sum(7 * a + b for a, b in heads) % 17 == 0 and len(heads) > 0)
        return scores

    each = each_of(broken, [])
    (only,) = halving(each, HEADS, 1, 6, count=240, pictures=8, steps=9)
    assert len(set(only.chosen) & set(wanted)) >= 5


def test_effects_are_those_of_the_explicit_regression() -> None:
    source = torch.Generator().manual_seed(2)
    inside = (torch.rand(54, 5, generator=source) < 0.4).double()
    true = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]).double()
    torch.testing.assert_close(effects(inside, inside @ true + 7)[0], true, atol=5e-3, rtol=0)
    gains = inside @ true + 7 + torch.randn(54, generator=source).double()
    x, y = inside - inside.mean(0), gains - gains.mean()
    eye = torch.eye(5).double()
    errors = {}
    for ridge in RIDGES:
        solve = torch.linalg.inv(x.T @ x + ridge * eye) @ x.T
        own = (x @ solve).diagonal()
        errors[ridge] = float((((y - x @ (solve @ y)) / (1 - own)) ** 2).mean())
    ridge = min(errors, key=lambda r: errors[r])
    inverse = torch.linalg.inv(x.T @ x + ridge * eye)
    mean, root = effects(inside, gains)
    torch.testing.assert_close(mean, inverse @ x.T @ y, atol=1e-10, rtol=0)
    torch.testing.assert_close(root @ root.T, errors[ridge] * inverse)


def test_scores_correct_what_slopes_have_told() -> None:
    """The posterior against its textbook form."""
    source = torch.Generator().manual_seed(4)
    heads = HEADS[:5]
    mean = torch.randn(5, generator=source).double()
    root = torch.rand(5, 5, generator=source).double() * 0.2
    inside = (torch.rand(31, 5, generator=source) < 0.5).double()
    gains = inside @ mean + 0.3 * torch.randn(31, generator=source).double()
    told = Belief(dict(zip(heads, mean.tolist(), strict=True)), root)
    found, spread = corrected(told)(inside, gains)
    x, y = inside - inside.mean(0), gains - gains.mean()
    noise = (y - x @ mean).square().mean()
    prior = torch.linalg.inv(root @ root.T)
    inverse = torch.linalg.inv(prior + x.T @ x / noise)
    wanted = inverse @ (prior @ mean + x.T @ y / noise)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(spread @ spread.T, inverse)
    assert (found - mean).abs().max() > 0.05


def test_halving_verifies_the_heads_that_slopes_are_not_sure_of() -> None:
    """Slopes overrate three heads, underrate three others, and know where they may be wrong."""
    values = shuffled_values()
    order = sorted(HEADS, key=lambda h: -values[h])
    off = {**dict.fromkeys(order[3:6], -6.0), **dict.fromkeys(order[6:9], 4.0)}
    scores = {h: values[h] + off.get(h, 0.0) for h in HEADS}
    errors = [5.0 if h in off else 0.1 for h in HEADS]
    known = Belief(scores, torch.tensor(errors).double().diag())
    assert not set(sorted(HEADS, key=lambda h: -scores[h])[:6]) & set(order[3:6])
    seen: list[Any] = []

    def each(candidates: Any, pictures: Any, steps: int) -> torch.Tensor:
        seen.extend(heads for heads in candidates if heads)
        return each_of(additive(values, 3.0), [])(candidates, pictures, steps)

    (only,) = halving(
        each, HEADS, 1, 6, count=90, pictures=8, steps=9, screened=known
    )  # fmt: skip
    assert set(only.chosen) == set(order[:6])
    often = [sum(h in heads for heads in seen) for h in order]
    assert len(seen) == 90 and min(often[:3]) > 75 and sum(often[12:]) == 0


def test_fewer_heads_take_part_in_every_turn() -> None:
    assert turns(64, 8) == [64, 46, 32, 23, 16, 12]
    assert turns(6, 6) == [6] * 6 and turns(576, 15)[0] == 576
    assert (brief(20), brief(28), brief(5)) == (6, 9, 5)


def test_sets_are_drawn_by_what_is_known_and_how_surely() -> None:
    """The last turns hold the surely best heads always, and the hopeless ones never."""
    values = {head: float(i) for i, head in enumerate(HEADS)}
    seen: list[tuple[Any, ...]] = []

    def look(sets: Any, pictures: Any) -> torch.Tensor:
        seen.extend(sets)
        return torch.zeros(len(sets))

    def believe(inside: torch.Tensor, looks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert inside.shape == (len(looks), 24) and bool((inside.sum(1) == 4).all())
        assert [tuple(HEADS[i] for i in row.nonzero().flatten()) for row in inside] == seen
        mean = torch.tensor([values[head] for head in HEADS]).double()
        return mean, torch.eye(24).double() * 0.7

    found = thompson(look, believe, HEADS, 4, [24, 24, 5], 300, 7).scores
    assert found == values and len(seen) == 300
    often = [[sum(h in s for s in part) for h in HEADS] for part in (seen[:100], seen[100:])]
    assert max(often[0]) - min(often[0]) <= 2  # random sets, every head as often
    assert often[1][-1] > 195 and 60 < often[1][-4] < 180 and 20 < often[1][-5] < 140
    assert sum(often[1][:16]) == 0
    turns = [{h for s in part for h in s} for part in (seen[100:200], seen[200:])]
    assert turns[0] > set(HEADS[-5:]) and turns[1] <= set(HEADS[-5:])


def test_gradient_sees_harm_at_full_strength_and_bears_pictures_that_fall_apart() -> None:
    """Three heads are steepest where they are not in the set, and harmful where they are."""
    values = shuffled_values()
    order = sorted(HEADS, key=lambda h: -values[h])
    wrong = order[:3]
    spent: list[int] = []

    def slopes(sets: Any, pictures: Any) -> torch.Tensor:
        spent.append(len(sets))
        rows = [
            [-900.0 if h in wrong and h in heads else values[h] - 11.5 for h in HEADS]
            for heads in sets
        ]
        found = torch.tensor(rows, dtype=torch.float64)
        found[[i % 7 == 3 for i in range(len(rows))]] *= -1e5
        return found

    found = gradient(slopes, HEADS, 2, 2, every=HEADS, count=90, pictures=6)
    assert {h for one in found for h in one.chosen} == set(order[3:7])
    assert [len(one.scores) for one in found] == [24, 22] and sum(spent) == 90
    assert len(spent) == TURNS and max(spent) - min(spent) <= 1


def test_gradient_asks_what_a_head_does_beside_the_best() -> None:
    """Four heads are worth more than any other beside the leader, and do harm without it."""
    leader, *team = sorted(HEADS, key=lambda h: (7 * h[0] + 3 * h[1]) % 24)[:5]
    near: list[bool] = []
    noise = torch.Generator().manual_seed(4)

    def slopes(sets: Any, pictures: Any) -> torch.Tensor:
        near.extend(leader in heads for heads in sets)
        own = [
            [2.0 if h == leader else 1.0 * (leader in heads) - 0.4 if h in team else 0.1
             for h in HEADS]
            for heads in sets
        ]  # fmt: skip
        return torch.tensor(own).double() + torch.randn(len(own), 24, generator=noise) / 4

    (found,) = gradient(slopes, HEADS, 1, 5, every=HEADS, count=120, pictures=6)
    assert found.chosen[0] == leader and set(found.chosen[1:]) == set(team)
    # at sets drawn blindly the team's mean slope is below the others'
    assert sum(near[:15]) < 5 and (sum(near[:15]) / 15) - 0.4 < 0.1
    assert all(near[15:])


def test_slopes_are_read_off_halfway() -> None:
    """A regression with a ridge on the difference alone, against its normal equations."""
    source = torch.Generator().manual_seed(6)
    inside = (torch.rand(21, 3, generator=source) < 0.3).double()
    slopes = torch.randn(21, 3, generator=source).double()
    found, error = halfway(inside, slopes)
    for p in range(3):
        design = torch.stack([torch.ones(21), inside[:, p] - 0.5], 1).double()
        normal = design.T @ design + torch.diag(torch.tensor([0.0, STRAIGHT])).double()
        want = torch.linalg.solve(normal, design.T @ slopes[:, p])
        rest = (slopes[:, p] - design @ want).square().mean()
        torch.testing.assert_close(found[p], want[0])
        torch.testing.assert_close(error[p, p], (rest * torch.linalg.inv(normal)[0, 0]).sqrt())
    assert int(error.count_nonzero()) == 3
    many = torch.tensor([[1.0]] * 1000 + [[0.0]] * 9000).double()
    # steep outside, harmful inside: the integral is that of the straight line between
    ends = torch.where(many > 0, -3.0, 1.0).double()
    assert halfway(many, ends)[0].item() == pytest.approx(-1, abs=0.01)


# -- head sets -----------------------------------------------------------------------------


def test_a_head_set_survives_its_files(tmp_path: Path) -> None:
    rounds = greedy(additive(shuffled_values()), HEADS, 2, 2)
    heads = tuple(h for one in rounds for h in one.chosen)
    found = HeadSet(
        heads, model="m", table="t", options={"u": 0.5, "scale": 2.0}, objective="world",
        strategy="greedy", prompts=("a",), seeds=(4,), call={"num_inference_steps": 3},
        forwards=9, rounds=tuple(rounds),
    )  # fmt: skip
    assert HeadSet.load(found.save(tmp_path / "a.json")) == found
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")
    official = found.save(tmp_path / "a.txt")
    assert official.read_text().splitlines()[0] == "{},{}".format(*heads[0])
    assert HeadSet.load(official).heads == heads
    control = found.control(u=0.25)
    assert control == attnctl.SoftPAG(heads=heads, u=0.25, scale=2.0)
    assert found.first(1).heads == heads[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2\n3;4\n", "line 2"),
        ("", "at least one"),
        ("1,2\n1,2\n", "twice"),
        ('{"format": "other"}', "expected 'attnctl head set 1'"),
        ('{"format": "attnctl head set 1", "heads": [[1]]}', "broken"),
        ('{"form', "no valid JSON"),
    ],
)
def test_broken_head_sets_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "heads"
    file.write_text(text)
    with pytest.raises(OptionError, match=message):
        HeadSet.load(file)


def test_a_head_set_knows_its_model() -> None:
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    sites = attnctl.sites(pipe)
    HeadSet(((0, 0),), table=site_table_hash(sites)).check(sites)
    with pytest.raises(OptionError, match="do not carry over"):
        HeadSet(((0, 0),), model="other", table="0" * 16).check(sites)


def test_a_head_set_makes_the_control_for_its_model(tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    table = site_table_hash(attnctl.sites(pipe))
    found = HeadSet(((6, 4), (6, 2)), table=table, options={"u": 1.0, "scale": 2.0})
    file = found.save(tmp_path / "heads.json")
    for heads in (found, file, str(file)):
        made = attnctl.SoftPAG.for_model(pipe, heads=heads, u=0.5)
        assert made == attnctl.SoftPAG(heads=((6, 4), (6, 2)), scale=2.0, u=0.5)
    # another guidance takes the heads, not the options that were tuned for SoftPAG
    assert attnctl.SEG.for_model(pipe, heads=found).scale == attnctl.SEG().scale
    assert attnctl.SoftPAG.for_model(pipe, heads="L3").heads == "L3"
    other = HeadSet(((6, 4),), table="0" * 16)
    with pytest.raises(OptionError, match="do not carry over"):
        attnctl.SoftPAG.for_model(pipe, heads=other)


def test_the_shipped_set_is_the_preset_of_its_name() -> None:
    pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    preset = attnctl.SoftPAG.for_model(pipe, preset="tiny-sd3-redness")
    folder = Path(str(resources.files("attnctl.presets")))
    shipped = HeadSet.load(folder / "heads" / "tiny-sd3-redness.json")
    shipped.check(attnctl.sites(pipe))
    chosen = attnctl.sites(pipe).select(preset.selector, preset.kinds)
    heads = [(i, h) for i, mask in chosen.items() for h in mask.nonzero().flatten().tolist()]
    assert sorted(heads) == sorted(shipped.heads)
    assert (preset.scale, preset.u) == (shipped.options["scale"], shipped.options["u"])
    assert attnctl.SoftPAG.for_model(pipe).heads == "all"  # by name only


# -- objectives ----------------------------------------------------------------------------


def test_pixel_objectives() -> None:
    source = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 5, 7, generator=source)
    r, g, b = images.double().unbind(1)
    grey = 0.2126 * r + 0.7152 * g + 0.0722 * b
    dx = grey[:, :4, 1:] - grey[:, :4, :6]
    dy = grey[:, 1:, :6] - grey[:, :4, :6]
    wanted = {
        "redness": (r - g / 2 - b / 2).mean((1, 2)),
        "brightness": grey.mean((1, 2)),
        "edges": (dx**2 + dy**2).sqrt().mean((1, 2)),
    }
    for name, value in wanted.items():
        found = objective(name).score(images, [""] * 3)
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


def test_objectives_by_name_and_by_function() -> None:
    assert {"world", "redness", "clip", "pickscore", "hpsv2", "aesthetic"} <= set(objectives())
    mine = objective(lambda images, prompts: [float(len(p)) for p in prompts])
    assert mine.score(torch.zeros(2, 3, 4, 4), ["a", "bb"]).tolist() == [1.0, 2.0]
    assert str(objective("math:sqrt")) == "math:sqrt"
    for wrong, message in (
        ("rednes", "redness"),
        ("clip", "expected clip:FOLDER"),
        ("redness:3", "expected redness"),
        ("no.such:thing", "cannot be imported"),
        ("clip:/nowhere", "no folder of a CLIP model"),
    ):
        with pytest.raises(OptionError, match=message):
            objective(wrong)
    with pytest.raises(OptionError, match=r"shape \(1,\) for 2"):
        Custom(lambda images, prompts: [1.0], "short").score(torch.zeros(2, 3, 4, 4), ["", ""])


def test_clip_scores_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    source = path("tiny-sd3") / "tokenizer"
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    pipe_words = json.loads((source / "vocab.json").read_text())
    text = {
        **small, "num_attention_heads": 2, "vocab_size": len(pipe_words),
        "max_position_embeddings": 20, "eos_token_id": pipe_words["<|endoftext|>"],
    }  # fmt: skip
    vision = {**small, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    words = DiffusionPipeline.from_pretrained(path("tiny-sd3")).tokenizer(
        PROMPTS[:2], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(pixel_values=(images - mean) / std, **words).logits_per_image.diagonal()
        scale = model.logit_scale.exp()
    pick = objective(f"pickscore:{tmp_path}").score(images, PROMPTS[:2])
    clip = objective(f"clip:{tmp_path}").score(images, PROMPTS[:2])
    torch.testing.assert_close(pick, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(clip, 100 * logits / scale, rtol=1e-4, atol=1e-4)
    head = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1))
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "head.pth")
    with torch.no_grad():
        seen = model.visual_projection(
            model.vision_model(pixel_values=(images - mean) / std).pooler_output
        )
        wanted = head.eval()(seen / seen.norm(dim=-1, keepdim=True)).squeeze(-1)
    found = objective(f"aesthetic:{tmp_path}+{tmp_path / 'head.pth'}").score(images, ["", ""])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_hps_scores_are_those_of_open_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint's form and open_clip's own code, a small model under the big one's name."""
    open_clip = pytest.importorskip("open_clip")
    small = {"layers": 1, "width": 16}
    config = {
        "embed_dim": 12,
        "vision_cfg": {**small, "image_size": 224, "head_width": 8, "patch_size": 56},
        "text_cfg": {**small, "context_length": 77, "vocab_size": 49408, "heads": 2},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", config)
    model = open_clip.create_model("ViT-H-14", pretrained=None).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "hps.pt")
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(x)[:, None, None]
        for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    words = open_clip.get_tokenizer("ViT-H-14")(PROMPTS[:2])
    with torch.no_grad():
        seen, read = model((images - mean) / std, words)[:2]
    found = objective(f"hpsv2:{tmp_path / 'hps.pt'}").score(images, PROMPTS[:2])
    torch.testing.assert_close(found, 100 * (seen @ read.T).diagonal(), rtol=1e-4, atol=1e-4)


# -- on tiny-sd3 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
    made.set_progress_bar_config(disable=True)
    return made


def trials(pipe: Any, **more: Any) -> Trials:
    options: dict[str, Any] = {"batch": 4, **more}
    return Trials(
        pipe, attnctl.SoftPAG(scale=2.0, u=0.7), objective("redness"), PROMPTS, [3, 1, 4],
        call=dict(CALL), **options,
    )  # fmt: skip


def test_every_row_gets_its_own_heads(pipe: Any) -> None:
    sets: list[tuple[tuple[int, int], ...]] = [((0, 1), (5, 2)), (), ((7, 7),)]
    together = trials(pipe).draw(sets, [0, 0, 0])
    for image, heads in zip(together, sets, strict=True):
        noise = [torch.Generator().manual_seed(3)]
        stack = [attnctl.SoftPAG(scale=2.0, u=0.7, heads=heads)] if heads else []
        with attnctl.patch(pipe, *stack) if stack else torch.no_grad():
            alone = pipe([PROMPTS[0]], generator=noise, output_type="pt", **CALL).images[0]
        assert (image - alone).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("heads", [(), ((1, 3), (6, 0))])
def test_slopes_are_those_of_finite_differences(pipe: Any, heads: Any) -> None:
    """Through the whole run, on top of nothing and of a set."""
    one = trials(pipe)
    found = one.slopes([heads, ((0, 0),), heads], [0, 1, 2], 2)
    assert found.shape == (3, 64) and one.forwards == 3 * 2 * 2 * 3
    sites = one.sites
    for head in ((1, 3), (4, 4)):
        scores = []
        for step in (0.01, -0.01):
            u = strengths([heads] * 2, 0.7, sites)
            site = next(s for s in sites if s.layer == head[0])
            u.setdefault(site.index, torch.zeros(2, site.heads))[:, head[1]] += step
            with attnctl.patch(pipe, RowStrengths(one.guidance, u)):
                noise = [torch.Generator().manual_seed(i) for i in (3, 4)]
                call = {**CALL, "num_inference_steps": 2, "output_type": "pt"}
                drawn = pipe([PROMPTS[0], PROMPTS[2]], generator=noise, **call).images
            scores.append(objective("redness").score(drawn.double(), ["", ""]).double())
        wanted = (scores[0] - scores[1]) / 0.02
        mine = found[[0, 2], one.pool.index(head)]
        torch.testing.assert_close(mine, wanted, rtol=0.03, atol=2e-5)
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    assert type(pipe) is StableDiffusion3Pipeline and not hasattr(pipe, "_attnctl")


def test_checkpointing_gives_the_same_slopes_for_another_pass(pipe: Any) -> None:
    plain, saving = trials(pipe), trials(pipe)
    wanted = plain.slopes([((2, 1),)], [1], 2)
    pipe.transformer.enable_gradient_checkpointing()
    try:
        found = saving.slopes([((2, 1),)], [1], 2)
    finally:
        pipe.transformer.disable_gradient_checkpointing()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert saving.forwards == plain.forwards * 4 // 3


def test_the_batch_does_not_matter(pipe: Any) -> None:
    candidates = [((0, 0),), ((3, 3), (4, 4)), ()]
    small = trials(pipe, batch=2).score(candidates)
    large = trials(pipe, batch=9).score(candidates)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)
    assert small.shape == (3, 3)


def test_forwards_are_counted_as_they_happen(pipe: Any) -> None:
    rows: list[int] = []
    hook = pipe.transformer.pos_embed.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    one = trials(pipe)
    try:
        one.score([((0, 0),), ((1, 1),)])
    finally:
        hook.remove()
    assert sum(rows) == one.forwards == 2 * 3 * 3 * 2


SEARCH: dict[str, Any] = {"rounds": 2, "top_k": 1, "pool": "L2H0-3", "batch": 3}


@pytest.mark.parametrize(
    ("strategy", "budget", "gradients", "killed_in"),
    [
        ("greedy", 1, None, ["scores"]),
        ("halving", 0.5, None, ["scores"]),
        ("halving", 0.9, True, ["slopes", "scores"]),
        ("gradient", 1, None, ["slopes"]),
    ],
)
def test_a_killed_search_goes_on_to_the_same_result(
    pipe: Any,
    strategy: Any,
    budget: float,
    gradients: bool | None,
    killed_in: list[str],
    tmp_path: Path,
) -> None:
    """Killed once in each of its stages, all with one journal."""
    call = {**CALL, "num_inference_steps": 1}
    file = tmp_path / "scores.jsonl"
    judged: list[str] = []

    def search(stage: str, **more: Any) -> HeadSet:
        seen: list[str] = []

        def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            seen.append("slopes" if images.requires_grad else "scores")
            if seen.count(stage) == 3:
                raise KeyboardInterrupt
            judged.extend(prompts)
            return objective("redness").score(images, prompts)

        judge = Custom(red, "r", gradients)
        guidance = attnctl.SoftPAG(scale=3.0)
        hunter = HeadHunter(judge, guidance, strategy, budget=budget, **SEARCH)
        return hunter.search(pipe, PROMPTS, progress=False, **more, **call)

    for stage in killed_in:
        with pytest.raises(KeyboardInterrupt):
            search(stage, journal=file)
        with file.open("ab") as torn:
            torn.write(b'{"values": {"torn')  # the line that was being written
    resumed = search("never", journal=file)
    with_kills = len(judged)
    fresh = search("never")
    assert with_kills == len(judged) - with_kills  # nothing is drawn twice
    assert resumed.heads == fresh.heads and resumed.rounds == fresh.rounds
    assert resumed.forwards == fresh.forwards
    assert not hasattr(pipe, "_attnctl") and "encode_prompt" not in pipe.__dict__
    with pytest.raises(OptionError, match="other settings \\(seeds\\)"):
        search("never", seeds=[9, 9, 9], journal=file)


TOGETHER = """
import os
os.environ.update(launched)
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from attnctl import HeadHunter, SoftPAG
from attnctl.assets import path
pipe = DiffusionPipeline.from_pretrained(path("tiny-sd3"))
search = dict(rounds=2, top_k=1, pool="L2H0-3", batch=2)
call = dict(num_inference_steps=2, guidance_scale=1.0, max_sequence_length=8, progress=False)
prompts = ["a red circle", "a green ring"]
hunter = HeadHunter("redness", SoftPAG(scale=3.0), "greedy", **search)
hunter.search(pipe, prompts, journal=place + ".jsonl", **call).save(place + name + ".json")
hunter = HeadHunter("redness", SoftPAG(scale=3.0), "halving", budget=1, **search)
hunter.search(pipe, prompts, **call).save(place + name + "-screened.json")
"""


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Over gloo on the CPU, told of each other as by `accelerate launch` and torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
              "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    pair = []
    for rank in ("0", "1"):
        launched = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        told = {"launched": launched, "place": str(tmp_path / "two"), "name": rank}
        pair.append(nursery().Process(target=exec, args=(TOGETHER, told)))
        pair[-1].start()
    exec(TOGETHER, {"launched": {}, "place": str(tmp_path / "one"), "name": ""})
    try:
        for process in pair:
            process.join(timeout=240)
        assert [process.exitcode for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    for kind, strategy in (("", "greedy"), ("-screened", "halving")):
        names = (f"{name}{kind}.json" for name in ("two0", "two1", "one"))
        first, second, alone = (HeadSet.load(tmp_path / name) for name in names)
        assert first == second == alone and alone.strategy == strategy
    lines = (tmp_path / "two.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4 + 3  # settings; batches of two for 8 and 6 pictures


@pytest.mark.parametrize("strategy", ["greedy", "halving", "gradient"])
def test_a_plan_says_what_the_search_takes(pipe: Any, strategy: Any) -> None:
    hunter = HeadHunter("redness", strategy=strategy, budget=0.8, **SEARCH)
    plan = hunter.plan(pipe, PROMPTS, **CALL)
    found = hunter.search(pipe, PROMPTS, progress=False, **CALL)
    assert plan.greedy == (4 + 3) * 3 * 3 * 2
    assert found.forwards <= plan.forwards <= plan.greedy
    assert found.forwards >= 0.5 * plan.forwards  # the same set on a picture is drawn once
    assert found.objective == "redness" and found.prompts == tuple(PROMPTS)


@pytest.mark.parametrize(("slopes", "gradients"), [(0.75, True), (0.75, None), (0.0, True)])
def test_halving_screens_where_gradients_are_known(
    pipe: Any, slopes: float, gradients: bool | None
) -> None:
    """Two thirds of a slope's three passes are its backward."""
    with_gradients: list[bool] = []

    def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        with_gradients.append(images.requires_grad)
        return objective("redness").score(images, prompts)

    call = {**CALL, "num_inference_steps": 2}
    judge = Custom(red, "red", gradients)
    hunter = HeadHunter(judge, strategy="halving", budget=0.9, slopes=slopes, **SEARCH)
    plan = hunter.plan(pipe, PROMPTS, **call)
    found = hunter.search(pipe, PROMPTS, progress=False, **call)
    # 74 of 84 forwards; of them 55 for slopes of 12 each, and 4 for each score
    first = 4 if slopes and gradients else 0
    assert 0 < sum(with_gradients) <= first if first else not any(with_gradients)
    assert plan.greedy == 84 and plan.forwards == first * 12 + (74 - first * 12) // 4 * 4
    assert found.forwards <= plan.forwards
    small = dataclasses.replace(hunter, budget=0.4).plan(pipe, PROMPTS, **call)
    assert small.forwards <= 0.4 * plan.greedy
    if first:
        larger = dataclasses.replace(hunter, batch=5).search(pipe, PROMPTS, progress=False, **call)
        assert larger.heads == found.heads and larger.forwards == found.forwards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"slopes": 1.0}, "slopes"),
        ({"strategy": "magic"}, "magic"),
        ({"budget": 0.0}, "budget"),
        ({"guidance": attnctl.SoftPAG(u=0.0)}, "perturbs nothing"),
        ({"rounds": 40, "top_k": 40}, "the pool has 64"),
    ],
)
def test_wrong_searches_are_refused(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        HeadHunter("redness", **options).plan(pipe, PROMPTS)


def test_a_blind_objective_has_no_slopes(pipe: Any) -> None:
    class Blind(Custom):
        differentiable = False

    hunter = HeadHunter(Blind(lambda images, prompts: [0.0] * len(images)), strategy="gradient",
                        **SEARCH)  # fmt: skip
    with pytest.raises(OptionError, match="no gradients"):
        hunter.search(pipe, PROMPTS, progress=False, **CALL)


def test_row_strengths_refuse_heads_that_are_not_there(pipe: Any) -> None:
    with pytest.raises(OptionError, match="no head L9H0"):
        strengths([[(9, 0)]], 1.0, attnctl.sites(pipe))
    assert RowStrengths(attnctl.SoftPAG()).kinds == ("self", "joint")


def test_the_shipped_heads_redden_pictures_more_with_more_u(pipe: Any) -> None:
    """On held-out prompts and other seeds than those of its search; random heads do not."""
    folder = Path(str(resources.files("attnctl.presets")))
    shipped = HeadSet.load(folder / "heads" / "tiny-sd3-redness.json")
    call = {**CALL, "num_inference_steps": 8}
    prompts = heldout_prompts(6, 2, seed=9)
    means = []
    for u in (0.25, 0.5, 1.0):
        guidance = attnctl.SoftPAG(scale=3.0, u=u)
        one = Trials(pipe, guidance, objective("redness"), prompts, range(70, 76), 12, call=call)
        stock, chosen = one.score([(), shipped.heads])
        means.append(float((chosen - stock).mean()))
    assert (chosen > stock).all()
    assert 0 < means[0] < means[1] < means[2]
    random = tuple((layer, (layer * 5 + 3) % 8) for layer in range(8))
    assert not set(random) & set(shipped.heads)
    stock, other = one.score([(), random])
    assert means[2] > 3 * abs(float((other - stock).mean()))
