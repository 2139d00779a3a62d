"""The cost bench of the search for noise, on a small UNet."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attnctl
from attnctl.apps.bench import cost, latent_cost, noise_search


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        cost.MODELS,
        "sd-small",
        lambda: cost._sd1(
            sample_size=16,
            cross_attention_dim=16,
            layers_per_block=1,
            block_out_channels=(16, 16, 16, 16),
            norm_num_groups=8,
        ),
    )


def test_a_look_is_what_one_more_of_them_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 2 s and a quarter of a second for each look; a stock step takes 100 ms."""
    now = [0.0]

    def run(pipe: object, looks: int | None, options: object) -> int:
        now[0] += 2 + 0.25 * (looks or 0)
        return 0

    monkeypatch.setattr(noise_search, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(noise_search, "peak_of", run)
    monkeypatch.setattr(noise_search, "search", lambda looks, **changed: looks)
    monkeypatch.setattr(noise_search, "call_of", lambda *args, **kwargs: {})
    unet, steps = (
        SimpleNamespace(device=torch.device("cpu")),
        SimpleNamespace(milliseconds=[100.0]),
    )
    pipe = SimpleNamespace(unet=unet, scheduler=steps)
    found = noise_search.measure(pipe, lambda n: {}, 2)
    assert found["look, all"] == {"ms": 250.0, "of a stock step": 2.5}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_search, "MANY", 3)
    out = tmp_path / "search.json"
    noise_search.main(["--rounds", "1", "--out", str(out)])
    found = json.loads(out.read_text())["sd-small"]
    assert list(found) == ["stock step", "look, all", "look, words' maps alone"]
    assert found["stock step"]["ms"] > 0
    step, look = found["stock step"]["ms"], found["look, all"]
    assert look["of a stock step"] == pytest.approx(look["ms"] / step, abs=1e-3)


@pytest.mark.parametrize("arm", noise_search.ARMS)
def test_a_search_takes_the_looks_that_it_says(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnctl.processors.latent.engine import Pass

    unet, inputs = latent_cost.build("sd-small", "cpu", torch.float32)
    pipe = latent_cost.pipelines(unet, inputs)[0]
    looks: list[int] = []
    stock = Pass.look

    def count(self: Pass, *arguments: object) -> object:
        looks.append(1)
        return stock(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Pass, "look", count)
    with attnctl.patch(pipe, noise_search.search(5, **noise_search.ARMS[arm])):
        pipe(**latent_cost.call_of(unet, inputs, 2))
    assert len(looks) == 5
