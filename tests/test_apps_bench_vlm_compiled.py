"""Tests of attnctl.apps.bench.vlm_compiled."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from attnctl.apps.bench import vlm_compiled, vlm_cost

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def test_every_arm_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = vlm_cost.MODELS["small"]
    tiny = dataclasses.replace(small, tokens=60, text={**small.text, **SIZES})
    monkeypatch.setitem(vlm_cost.MODELS, "small", tiny)
    torch._dynamo.reset()
    counted = torch._dynamo.utils.counters["stats"]
    before, out = counted["unique_graphs"], tmp_path / "compiled.json"
    vlm_compiled.main(
        ["--tokens", "3", "--rounds", "5", "--seconds", "0", "--arms", "var,eager,var_eager",
         "--backend", "eager", "--out", str(out)]
    )  # fmt: skip
    data = json.loads(out.read_text())
    arms = data["arms"]
    assert list(arms) == ["stock", "var", "eager", "var_eager"]
    assert (data["layers"], data["backend"], data["written_tokens"]) == (3, "eager", 3)
    assert counted["unique_graphs"] == before + 2  # both compiled, once
    for found in arms.values():
        assert len(found["rounds_token_ms"]) == 3 and min(found["rounds_token_ms"]) > 0
        for ratio, rounds in (
            ("tokens_per_second / stock", "rounds_token_ms"),
            ("all tokens / stock", "rounds_total_ms"),
        ):  # more than 1 where it is faster than stock
            pairs = zip(arms["stock"][rounds], found[rounds], strict=True)
            wanted = statistics.median(stock / mine for stock, mine in pairs)
            assert found[ratio] == pytest.approx(wanted, rel=1e-2)
        low, high = found["tokens_per_second / stock, interval"]
        assert low <= found["tokens_per_second / stock"] <= high
    assert arms["stock"]["logits, largest difference to eager"] < 1e-4
    assert arms["var"]["logits, largest difference to eager"] < 1e-4
    assert arms["var"]["logits, largest effect"] > 1e-3
    torch._dynamo.reset()
