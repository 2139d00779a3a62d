"""Training of the shipped models: every recipe runs, is resumed, adjusted and probed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from attnctl.assets.train import RECIPES, recipe
from attnctl.assets.train.__main__ import main
from attnctl.assets.train.latents import Pool
from attnctl.assets.train.loop import State, train
from attnctl.assets.train.recipe import Plan, Recipe, Run
from attnctl.assets.train.settings import changed, converted
from attnctl.assets.train.weights import rounded


@pytest.mark.parametrize("name", list(RECIPES))
def test_smoke_training(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main([name, "--smoke", "--seed", "1", "--out", str(tmp_path)])
    figures = json.loads(capsys.readouterr().out)
    assert figures["training"]["steps"] == 2 and figures["seed"] == 1
    assert "settings" not in figures and "probes" not in figures["training"]
    if (tmp_path / name / "model_index.json").exists():
        assert (tmp_path / name / "README.md").is_file()
        DiffusionPipeline.from_pretrained(tmp_path / name)


def test_a_checkpoint_is_taken_up(tmp_path: Path):
    run = Run(out=tmp_path, smoke=True)
    first = State(recipe("detector", run), recipe("detector", run).plan)
    first.step, first.losses, first.probes = 7, [0.5], [{"step": 3, "one": 0.25}]
    first.save()
    second = State(recipe("detector", run), recipe("detector", run).plan)
    second.load()
    assert second.step == 7 and second.losses == [0.5] and second.probes == first.probes
    pairs = zip(first.weights, second.weights, strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_training_names_what_there_is():
    with pytest.raises(KeyError, match="tiny-sd3"):
        recipe("tiny-sd9", Run())


@dataclass(frozen=True)
class Tune:
    objects: tuple[float, ...] = (1, 2)
    share: float = 0.5
    layers: int = 2
    fast: bool = True
    kind: str = "a"
    limit: float | None = None


class Line(Recipe):
    """One weight, and figures that show it."""

    name = "line"
    plan = Plan(steps=4, batch=2, lr=0.1)
    tune = Tune()

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.model = torch.nn.Linear(1, 1)
        self.probed: list[tuple[bool, bool, float]] = []

    def batch(self, size: int) -> tuple[torch.Tensor]:
        return (torch.ones(size, 1),)

    def loss(self, batch: Any) -> torch.Tensor:
        return (self.model(batch[0]) - 5).square().mean()

    def probe(self) -> dict[str, float]:
        weight = self.model.weight
        self.probed.append((self.model.training, torch.is_grad_enabled(), weight.item()))
        return {"weight": weight.item()}

    def write(self) -> Path:
        return self.run.out

    def figures(self, place: Path) -> dict[str, Any]:
        return {}


def test_settings_change_the_plan_and_the_tunables():
    made = Line(Run(settings=("steps=9", "objects=3, 1, 0.3", "share=1", "kind=x,y", "lr=2e-3")))
    assert (made.plan.steps, made.plan.batch, made.plan.lr) == (9, 2, 2e-3)
    assert made.tune == Tune(objects=(3, 1, 0.3), share=1.0, kind="x,y")
    assert isinstance(made.tune.share, float)
    assert made.settings["objects"] == (3, 1, 0.3) and made.settings["steps"] == 9
    assert Line.plan.steps == 4 and Line(Run()).tune == Tune() and not Line(Run()).settings


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", "no setting called 'stepz'; there are: average, batch, "),
        ("steps", "'steps' must read NAME=VALUE"),
        ("steps=2.5", r"steps=2.5 must be a value like 4 \(int\)"),
        ("fast=1", r"fast=1 must be a value like True \(bool\)"),
        ("layers=True", r"layers=True must be a value like 2 \(int\)"),
    ],
)
def test_wrong_settings_are_named(setting: str, message: str):
    with pytest.raises(ValueError, match=message):
        Line(Run(settings=(setting,)))


def test_values_of_settings():
    assert converted("x", "3", (1.0, 2.0)) == (3,)
    assert converted("x", "a,b", ("c",)) == ("a", "b")
    assert converted("x", "False", True) is False
    assert converted("x", "1e-3", None) == 1e-3
    assert changed([Tune()], ["limit=4", "limit=5"])[0] == [Tune(limit=5)]


def test_settings_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["detector", "--smoke", "--out", str(tmp_path), "--set", "lr=1e-4", "--set", "decay=0"])
    first = json.loads(capsys.readouterr().out)
    assert first["settings"] == {"lr": 1e-4, "decay": 0.0}


def test_a_new_measurement_remembers_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = ["--set", "channels=16,32", "--set", "objects=1,2"]
    main(["tiny-sd", "--smoke", "--out", str(tmp_path), *small])
    card = (tmp_path / "tiny-sd/README.md").read_text()
    assert "16 and 32 channels" in card and "--out out --set channels=16,32 --set obj" in card
    main(["tiny-sd", "--smoke", "--measure", "--out", str(tmp_path)])
    assert (tmp_path / "tiny-sd/README.md").read_text() == card
    assert '"settings"' in capsys.readouterr().out


def test_probes_see_the_average_and_leave_the_weights(tmp_path: Path):
    torch.manual_seed(0)
    quiet = Line(Run(out=tmp_path, smoke=False))
    torch.manual_seed(0)
    probed = Line(Run(out=tmp_path, smoke=False, probe=0))
    assert quiet.run.device.type == probed.run.device.type
    if quiet.run.device.type == "cuda":
        pytest.skip("the toy recipe lives on the CPU")
    train(quiet)
    done = train(probed)
    assert torch.equal(quiet.model.weight, probed.model.weight) and not quiet.probed
    assert len(probed.probed) == len(done["probes"]) == 4
    assert all(not training and not grad for training, grad, _ in probed.probed)
    assert probed.probed[-1][2] == pytest.approx(probed.model.weight.item())
    assert [row["step"] for row in done["probes"]] == [1, 2, 3, 4]


def test_a_pool_gives_batches_with_empty_prompts():
    pool = Pool(torch.zeros(4, 4, 2, 2).half(), torch.full((4, 3), 7, dtype=torch.int16))
    source = torch.Generator().manual_seed(0)
    latents, ids = pool.batch(1000, source, torch.zeros(1, 3, dtype=torch.int16), 0.1)
    assert latents.shape == (1000, 4, 2, 2) and latents.dtype == torch.float32
    assert ids.dtype == torch.int64 and 0.05 < (ids[:, 0] == 0).float().mean() < 0.15


def test_rounded_weights_are_laid_out_plainly():
    model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    saved = rounded(model)
    assert saved.weight.is_contiguous() and saved.weight.dtype == torch.float16
    assert not model.weight.is_contiguous()
