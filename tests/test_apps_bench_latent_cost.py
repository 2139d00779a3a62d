"""The cost bench of latent controls and heat maps: every arm does what it says, on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attnctl
from attnctl.apps.bench import cost, latent_cost

SCALE = 3e3


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    unet, inputs = latent_cost.build("sd-small", "cpu", torch.float32)
    return latent_cost.pipelines(unet, inputs), inputs


def test_every_arm_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        cost.MODELS,
        "sd-small",
        lambda: cost._sd1(
            sample_size=8,
            cross_attention_dim=16,
            layers_per_block=1,
            block_out_channels=(16, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
        ),
    )
    out = tmp_path / "cost.json"
    command = ["--steps", "2", "--rounds", "1", "--pictures", "2", "--counts", "--out", str(out)]
    latent_cost.main(command)
    found = json.loads(out.read_text())["sd-small, 2 pictures"]
    arms, counts = found["arms"], found["a step"]
    assert list(arms) == list(counts) == list(latent_cost.arms(2))
    assert set(arms) - set(latent_cost.arms()) == {"a-star, all at once"}
    assert all(row["step_ms"] == row["second_ms"] > 0 for row in arms.values())
    # a gradient pass is not free, checkpointing adds to it, and two passes are more than one
    order = ("stock", "attend-and-excite", "a-star", "a-star, checkpointed", "diffusers")
    launches = [counts[name]["launches"] for name in order]
    assert launches == sorted(set(launches)) and counts["a-star, replayed"] != counts["stock"]
    assert all(0 < row["launches"] < row["operations"] for row in counts.values())
    assert all(0 <= row["behind_ms"] < row["step_ms"] for row in arms.values())
    for name in ("a-star", "a-star, checkpointed", "attend-and-excite"):
        got = arms[name]["step_ms"] / arms["diffusers"]["step_ms"]
        assert arms[name]["step / diffusers"] == pytest.approx(got, abs=1e-3)
    assert "step / diffusers" not in arms["stock"] and "peak_gib" not in arms["stock"]


def test_our_arm_and_that_of_diffusers_do_the_same(small: Any) -> None:
    """The latents of both after two steps of a size at which random weights move them far."""
    (stock, theirs), inputs = small
    options = latent_cost.call_of(stock.unet, inputs, 2)
    want = theirs(**options, **latent_cost.moving(2), scale_factor=SCALE).images
    plain = stock(**options).images
    mine = dataclasses.replace(latent_cost.arms()["attend-and-excite"], scale=SCALE)
    with attnctl.patch(stock, mine):
        got = stock(**options).images
    moved = (want - plain).norm()
    assert (got - want).norm() < 1e-2 * moved and moved > 1e-3 * plain.norm()
    assert len(stock.scheduler.milliseconds) == 1


def test_a_unet_that_needs_more_than_text_gets_it() -> None:
    """As SDXL's: the rows of both passes get pooled embeddings, in either pipeline."""
    unet, inputs = cost._sd1(
        sample_size=16,
        cross_attention_dim=16,
        layers_per_block=1,
        block_out_channels=(16, 16, 16, 16),
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
    )
    seen: list[int] = []

    def pooled(n: int) -> dict[str, Any]:
        seen.append(n)
        added = {"text_embeds": torch.ones(n, 12), "time_ids": torch.ones(n, 6)}
        return {**inputs(n), "added_cond_kwargs": added}

    both = latent_cost.pipelines(unet.eval(), pooled)
    options = latent_cost.call_of(unet, pooled, 1)
    seen.clear()
    both[1](**options, **latent_cost.moving(1))
    assert seen == [1, 2]
    with attnctl.patch(both[0], latent_cost.arms()["a-star"]) as handle:
        both[0](**options)
        assert handle.report().lines


def test_figures() -> None:
    spent = {name: [2.0, 4.0] for name in latent_cost.arms()}
    spent["diffusers"] = [8.0]
    peaks = {name: 3 * 2**30 for name in spent} | {"stock": 2**30, "diffusers": 5 * 2**30}
    found = latent_cost._figures(spent, peaks)
    assert found["a-star"]["step / diffusers"] == 3 / 8
    assert found["a-star"]["extra / diffusers"] == 0.5
    assert found["heatmap"]["step / stock"] == 1 and "extra / diffusers" not in found["heatmap"]
