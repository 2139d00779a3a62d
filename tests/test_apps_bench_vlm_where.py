"""Tests of attnctl.apps.bench.vlm_where."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from attnctl.apps.bench import vlm_cost, vlm_where
from attnctl.hosts.vlm_discover import decoder_of

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 7,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def tiny() -> vlm_cost.Shape:
    small = vlm_cost.MODELS["small"]
    return dataclasses.replace(small, tokens=20, text={**small.text, **SIZES})


def test_what_takes_long_is_found_where_it_is() -> None:
    """Sleep in the embeddings, in an early layer, and in a late one, under a patch or always."""
    model = vlm_cost.build(tiny(), "cpu", torch.float32)
    inputs, pause = vlm_cost.prompt(tiny(), 1, "cpu"), 0.15
    layers: Any = decoder_of(model).layers
    always, long = [True], 500 * pause

    def sleep(*_: Any) -> None:
        if always[0] or "_attnctl" in decoder_of(model).__dict__:
            time.sleep(pause)

    for module, part in (
        (model.get_input_embeddings(), "before"), (layers[1], "first"), (layers[5], "layers"),
    ):  # fmt: skip
        handle, found = module.register_forward_pre_hook(sleep), {}
        for state in (True, False):
            always[0] = state
            found = vlm_where.measure(model, inputs, rounds=2, only=("pai",))
            added = found["stock" if state else "pai"]
            assert all((added[one] > long) is (one in (part, "total")) for one in vlm_where.PARTS)
            assert not state or max(found["pai"].values()) < long
        handle.remove()
        parts = sum(found["stock"][one] for one in vlm_where.PARTS[:-1])
        assert parts == pytest.approx(found["stock"]["total"], rel=0.5)
    assert not decoder_of(model)._forward_pre_hooks and not layers[0]._forward_pre_hooks


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(vlm_cost.MODELS, "small", tiny())
    out = tmp_path / "where.json"
    vlm_where.main(["--rounds", "2", "--out", str(out)])
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["ms", "stock", "pai", "var"]
    assert max(map(len, shown)) <= 80
    data = json.loads(out.read_text())
    assert {*data["arms"]} == {"stock", "pai", "var"} and data["device"] == "cpu"
    assert float(shown[1].split()[-1]) == round(data["arms"]["stock"]["total"], 3)
    with pytest.raises(SystemExit):
        vlm_where.main(["--arms", "eager"])
    assert "neutral, pai, var" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vlm_where.main(["--model", "llava-next-7b", "--tower"])
    assert "take llava-1.5-7b or small" in capsys.readouterr().err
