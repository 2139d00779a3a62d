"""The cost bench of latent controls and heat maps: every arm does what it says, on a CPU."""

from __future__ import annotations

import dataclasses
import json
import runpy
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import attnctl
from attnctl.apps.bench import cost, latent_cost
from attnctl.processors.latent import recordable

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
    assert launches == sorted(set(launches))
    assert all(0 < row["launches"] < row["operations"] for row in counts.values())
    assert all(0 <= row["behind_ms"] < row["step_ms"] for row in arms.values())
    for name in ("a-star", "a-star, checkpointed", "attend-and-excite"):
        got = arms[name]["step_ms"] / arms["diffusers"]["step_ms"]
        assert arms[name]["step / diffusers"] == pytest.approx(got, abs=1e-3)
    assert "step / diffusers" not in arms["stock"] and "peak_gib" not in arms["stock"]


def test_replayed_arms_come_on_a_gpu_only_and_are_replayed_or_fail(small: Any) -> None:
    more = [name for name in latent_cost.arms(cuda=True) if name not in latent_cost.arms()]
    assert more == ["a-star, replayed", "attend-and-excite, replayed"]
    for name in more:
        with pytest.raises(attnctl.HostError, match="cannot be recorded"):
            latent_cost._run(*small, name, 1, 1)


def test_what_the_command_measures_is_known_code() -> None:
    """Classes of a module that runs as a command belong to `__main__`, and are not recorded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module has been imported before
        command = runpy.run_module(latent_cost.__name__, run_name="command")
    unet, inputs = _with_pooled_embeddings([])
    both = command["pipelines"](unet, inputs)
    assert command["Clock"].__module__ == "command"
    assert type(both[0].unet).__module__ == "attnctl.apps.bench.pooled"
    assert not recordable.unknown({}, both[0].unet)


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


def _with_pooled_embeddings(seen: list[int]) -> tuple[Any, Any]:
    """Return a small UNet of SDXL's kind, and what makes its arguments and notes the rows."""
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

    def pooled(n: int) -> dict[str, Any]:
        seen.append(n)
        added = {"text_embeds": torch.ones(n, 12), "time_ids": torch.ones(n, 6)}
        return {**inputs(n), "added_cond_kwargs": added}

    return unet.eval(), pooled


def test_a_unet_that_needs_more_than_text_gets_it() -> None:
    """As SDXL's: the rows of both passes get pooled embeddings, in either pipeline."""
    seen: list[int] = []
    unet, pooled = _with_pooled_embeddings(seen)
    both = latent_cost.pipelines(unet, pooled)
    options = latent_cost.call_of(unet, pooled, 1)
    seen.clear()
    both[1](**options, **latent_cost.moving(1))
    assert seen == [1, 2]
    with attnctl.patch(both[0], latent_cost.arms()["a-star"]) as handle:
        both[0](**options)
        assert handle.report().lines
        # nothing of the bench's own is in the way of a recording
        assert not recordable.unknown({}, both[0].unet)
    assert seen == [1, 2]


def test_nothing_of_one_run_is_in_the_next_ones_peak(small: Any) -> None:
    """Diffusers' pipeline keeps maps, with the graph of the gradient pass that made them."""
    both, inputs = small
    both[1](**latent_cost.call_of(both[1].unet, inputs, 1), **latent_cost.moving(1))
    kept = both[1].attention_store.attention_store
    (held, *_) = (weakref.ref(one) for maps in kept.values() for one in maps)
    assert held().grad_fn is not None
    del kept
    latent_cost._run(both, inputs, "stock", 1, 1)
    assert held() is None


def test_arms_can_be_left_out(small: Any) -> None:
    both, inputs = small
    some = [n for n in latent_cost.arms() if n not in ("stock", "a-star", "diffusers")]
    found = latent_cost.measure(both, inputs, steps=2, rounds=1, without=some)
    assert list(found) == ["stock", "a-star", "diffusers"]
    with pytest.raises(SystemExit):
        latent_cost.main(["--without", "a-tsar"])


def test_figures() -> None:
    spent = {name: [2.0, 4.0] for name in latent_cost.arms()}
    spent["diffusers"] = [8.0]
    gib = 2**30
    peaks = {name: (3 * gib, 4 * gib) for name in spent}
    peaks |= {"stock": (gib, gib), "diffusers": (5 * gib, 13 * gib)}
    found = latent_cost._figures(spent, peaks)
    assert found["a-star"]["step / diffusers"] == 3 / 8
    assert found["a-star"]["extra / diffusers"] == 0.5
    assert found["a-star"]["extra reserved / diffusers"] == 0.25
    assert found["a-star"]["peak_gib"] == 3 and found["a-star"]["reserved_gib"] == 4
    assert found["heatmap"]["step / stock"] == 1 and "extra / diffusers" not in found["heatmap"]
