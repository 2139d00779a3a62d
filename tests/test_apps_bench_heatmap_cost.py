"""The cost bench of heat maps: every arm does what it says, on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import attnctl
from attnctl.apps.bench import cost, heatmap_cost, latent_cost
from attnctl.kernels.lse import columns

ROOT = Path(__file__).parent.parent / "docs"


def tiny():
    sizes = {"block_out_channels": (16,) * 4, "norm_num_groups": 8, "cross_attention_dim": 16}
    return cost._sd1(sample_size=16, layers_per_block=1, **sizes)


def test_every_arm_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.MODELS, "sd-small", tiny)
    out = tmp_path / "cost.json"
    heatmap_cost.main(["--steps", "3", "--rounds", "1", "--pictures", "2", "--out", str(out)])
    found = json.loads(out.read_text())["sd-small, 2 pictures"]["arms"]
    assert list(found) == list(heatmap_cost.arms())
    for row in found.values():
        assert row["step / stock"] == pytest.approx(
            row["step_ms"] / found["stock"]["step_ms"], abs=1e-3
        )
        assert 0 < row["least_ms"] <= row["step_ms"] and "peak_gib" not in row
        assert row["paired range"] == [row["paired / stock"]] * 2  # of one round
    spec = importlib.util.spec_from_file_location("make_performance", ROOT / "make_performance.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    data = json.loads(out.read_text())
    sides = {"16": {"stock": 1.0, "every site": 1.25, "more": 0.25}}
    data["sd-small, 2 pictures"]["memory by side of the latents"] = sides
    assert page.kind(out, data) == "heat map cost"
    shown = page.heatmap_cost(data)
    assert all(f"| {name} | " in shown for name in found)
    assert "| stock | " in shown and "1.000 (1.000 to 1.000)" in shown
    assert "| 16 | 1.0000 | 1.2500 | 0.2500 |" in shown
    with pytest.raises(SystemExit):
        heatmap_cost.main(["--steps", "2"])


def test_ratios_are_those_within_a_round() -> None:
    """The host gets ten times as slow from round to round; an arm stays at 1.25 and 1.5."""
    stock = [[2.0, 4.0, 9.0], [20.0, 40.0, 41.0], [200.0, 400.0, 500.0]]
    arm = [[3.0, 5.0, 6.0], [30.0, 50.0, 90.0], [300.0, 500.0, 501.0]]
    found = heatmap_cost.figures({"stock": stock, "arm": arm})
    assert found["arm"]["paired / stock"] == 1.25 and found["arm"]["paired range"] == [1.25, 1.25]
    assert found["arm"]["least paired / stock"] == 1.5
    assert found["arm"]["step_ms"] == 50 and found["arm"]["step / stock"] == 50 / 40
    assert found["stock"]["paired / stock"] == 1.0


def test_the_order_of_the_arms_changes() -> None:
    orders = [heatmap_cost.order(list("abc"), turn) for turn in range(6)]
    assert {one[0] for one in orders} == {one[-1] for one in orders} == set("abc")
    assert all(sorted(one) == list("abc") for one in orders)
    assert orders[0] == list("abc") and orders[1] == list("cba")


def test_arms_read_where_they_say_and_leave_the_latents_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cost.MODELS, "sd-small", tiny)
    unet, inputs = latent_cost.build("sd-small", "cpu", torch.float32)
    pipe, _ = latent_cost.pipelines(unet, inputs)
    options = latent_cost.call_of(unet, inputs, 2)
    cross = len(attnctl.sites(unet).select(kinds=("cross",)))
    calls, stock = {}, pipe(**options).images
    for name, control in heatmap_cost.arms().items():
        if control is not None:
            with attnctl.patch(pipe, control) as handle:
                assert torch.equal(pipe(**options).images, stock)
                calls[name] = handle.report().calls
    assert calls["every site"] == calls["tap"] == calls["torch"] == 2 * cross
    assert 0 < calls["up"] < 2 * cross
    before = columns.kernels_on
    with heatmap_cost.without_kernel(True):
        assert columns.kernels_on(torch.device("cuda", 0), "any") is None
    assert columns.kernels_on is before
