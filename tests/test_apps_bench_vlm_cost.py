"""Tests of attnctl.apps.bench.vlm_cost and of its table."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attnctl

pytest.importorskip("transformers")
from attnctl.apps.bench import vlm_cost

DOCS = Path(__file__).parent.parent / "docs"
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def table(data: dict[str, Any]) -> str:
    spec = importlib.util.spec_from_file_location("make_performance", DOCS / "make_performance.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page.vlm(data)


def test_every_arm_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = vlm_cost.MODELS["small"]
    tiny = dataclasses.replace(small, tokens=20, text={**small.text, **SIZES})
    monkeypatch.setitem(vlm_cost.MODELS, "small", tiny)
    seen, times = [], vlm_cost._times

    def noted(model: Any, *args: Any) -> tuple[float, float]:
        first = model.model.language_model.layers[2].self_attn
        seen.append((model.config.text_config._attn_implementation, type(first).__name__))
        return times(model, *args)

    monkeypatch.setattr(vlm_cost, "_times", noted)
    out = tmp_path / "vlm.json"
    vlm_cost.main(["--tokens", "2", "--rounds", "5", "--seconds", "0", "--out", str(out)])
    data = json.loads(out.read_text())
    arms = data["arms"]
    assert list(arms) == list(vlm_cost.arms()) and data["written_tokens"] == 2
    assert len({tuple(seen[i : i + 5]) for i in range(0, 20, 5)}) > 1  # orders of the rounds
    assert sum(kind == "eager" for kind, _ in seen) == 4  # a warm round, and three
    for found in arms.values():
        reading, writing = found["rounds_prefill_ms"], found["rounds_decode_ms"]
        assert len(reading) == len(writing) == 3 and min(reading + writing) > 0
        low, high = found["tokens_per_second / stock, interval"]
        assert low <= found["tokens_per_second / stock"] <= high and "peak_gib" not in found
    shown = table(data)
    assert all(f"| {name} | " in shown for name in arms)
    vlm_cost.main(["--tokens", "1", "--rounds", "1", "--arms", "pai", "--out", str(out)])
    assert list(json.loads(out.read_text())["arms"]) == ["stock", "pai"]


def test_a_prompt_that_begins_with_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tower's image tokens are told apart too: some are sinks, and VAR acts on them."""
    small = vlm_cost.MODELS["small"]
    eyes, text = {**small.eyes, "image_size": 140}, {**small.text, **SIZES, "hidden_size": 64}
    tiny = dataclasses.replace(small, tokens=100, text=text, eyes=eyes)
    monkeypatch.setitem(vlm_cost.MODELS, "small", tiny)
    read: list[int] = []
    times = vlm_cost._times

    def noted(model: Any, *args: Any) -> tuple[float, float]:
        hook = lambda _, given: read.append(given[0].shape[-1])  # noqa: E731
        handle = model.model.vision_tower.register_forward_pre_hook(hook)
        found = times(model, *args)
        handle.remove()
        return found

    monkeypatch.setattr(vlm_cost, "_times", noted)
    out = tmp_path / "vlm.json"
    vlm_cost.main(
        ["--tower", "--tokens", "1", "--rounds", "1", "--arms", "var", "--out", str(out)]
    )
    data = json.loads(out.read_text())
    assert read == [140] * 4 and data["tower"]
    assert "100 image tokens from its vision tower" in table(data)
    model = vlm_cost.build(tiny, "cpu", torch.float32, tower=True)
    inputs = vlm_cost.prompt(tiny, 1, "cpu", tower=True)
    with torch.no_grad():
        stock = model(**inputs).logits
        with attnctl.patch(model, *vlm_cost.arms()["var"]):
            assert (model(**inputs).logits - stock).abs().max() > 1e-4
    with pytest.raises(SystemExit):
        vlm_cost.main(["--tower", "--model", "qwen2.5-vl-7b"])
    assert "take llava-1.5-7b or small" in capsys.readouterr().err


def test_ratios_are_those_within_a_round() -> None:
    """The host gets ten times as slow from round to round; an arm stays at 1.25 and .5."""
    stock = [(4.0, 10.0), (40.0, 100.0), (400.0, 1000.0)]
    arm = [(5.0, 20.0), (50.0, 200.0), (500.0, 2000.0)]
    found = vlm_cost._figures({"stock": stock, "arm": arm}, {"stock": 2.0, "arm": 3.0}, 8)["arm"]
    for key, ratio in (("prefill_ms", 1.25), ("tokens_per_second", 0.5)):
        assert found[f"{key} / stock"] == found[f"{key} / stock, least times"] == ratio
        assert found[f"{key} / stock, interval"] == [ratio, ratio]
    assert found["tokens_per_second"] == 40 and found["peak_gib / stock"] == 1.5
    uneven = [(5.0, 20.0), (60.0, 200.0), (300.0, 2000.0)]
    found = vlm_cost._figures({"stock": stock, "arm": uneven}, {}, 8)["arm"]
    assert found["prefill_ms / stock, interval"] == [0.75, 1.5]
    data = {"model": "m", "device": "d", "image_tokens": 1, "torch": "2", "transformers": "5",
            "batch": 1, "arms": {"arm": found}}  # fmt: skip
    assert "| 1.250 [0.750, 1.500]; 1.250 |" in table(data)


def test_figures_without_intervals_are_shown() -> None:
    """Those of a run before there were any."""
    figures = {"prefill_ms": 2.0, "tokens_per_second": 3.0, "rounds_prefill_ms": [1.0, 4.0],
               "prefill_ms / stock": 1.5, "tokens_per_second / stock": 0.75}  # fmt: skip
    data = {"model": "m", "device": "d", "image_tokens": 1, "torch": "2", "transformers": "5",
            "batch": 1, "arms": {"arm": figures}}  # fmt: skip
    assert "| arm | 2.0 (1.0 to 4.0) | 1.500 | 3.0 | 0.750 |  |" in table(data)


def test_missed_goals_are_named() -> None:
    met = {"prefill_ms": 1.0, "tokens_per_second": 1.0, "rounds_prefill_ms": [1.0],
           "prefill_ms / stock": 1.05, "tokens_per_second / stock": 0.97,
           "peak_gib / stock": 1.02}  # fmt: skip
    data = {"model": "m", "device": "d", "image_tokens": 1, "torch": "2", "transformers": "5",
            "batch": 1, "arms": {"pai": met, "var": met}}  # fmt: skip
    assert "Missed" not in table(data)
    slow = {**met, "prefill_ms / stock": 1.06, "prefill_ms / stock, interval": [1.055, 1.07],
            "prefill_ms / stock, least times": 1.06, "peak_gib / stock": 1.03,
            "tokens_per_second / stock": 0.96, "tokens_per_second / stock, least times": 0.96,
            "tokens_per_second / stock, interval": [0.9, 0.98]}  # fmt: skip
    data["arms"] = {"pai": met, "var": slow, "eager": slow}
    assert table(data).splitlines()[-1] == (
        "Missed: var's prompt (1.060, goal 1.05); var's written tokens (0.960, goal 0.97, which "
        "the interval includes); var's peak memory (1.030, goal 1.02)."
    )
