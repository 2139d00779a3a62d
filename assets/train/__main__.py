"""``python -m attnctl.assets.train NAME``: train a shipped model anew and print its figures."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from attnctl.assets.train import RECIPES, recipe
from attnctl.assets.train.loop import train
from attnctl.assets.train.numbers import figures_path
from attnctl.assets.train.recipe import Recipe, Run
from attnctl.assets.train.settings import texts


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m attnctl.assets.train", description=__doc__)
    parser.add_argument("name", choices=list(RECIPES), help="what to train")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument("--minutes", type=float, help="wall-clock limit of the training")
    parser.add_argument("--prompts", type=int, default=500, help="prompts per figure")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="change a field of the recipe's plan or tunables, e.g. steps=3000 or objects=3,1,0.3",
    )
    parser.add_argument("--probe", type=float, metavar="SECONDS", help="measure on the way, often")
    parser.add_argument("--resume", action="store_true", help="take up the last checkpoint")
    parser.add_argument("--measure", action="store_true", help="no training, only new figures")
    parser.add_argument(
        "--beside", type=Path, metavar="FILE", help="figures.json of another seed, for the card"
    )
    parser.add_argument("--smoke", action="store_true", help="two tiny steps on the CPU")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train, save, measure, write the card, and print the figures as JSON."""
    chosen = options().parse_args(arguments)
    prompts = 2 if chosen.smoke else chosen.prompts
    run = Run(chosen.seed, chosen.out, chosen.smoke, chosen.minutes, prompts, probe=chosen.probe)
    known = remembered(run, chosen.name) if chosen.measure else {}
    run = replace(run, settings=(*texts(known.get("settings", {})), *chosen.settings))
    run.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    made = recipe(chosen.name, run)
    figures = known if chosen.measure else fresh(made, chosen.resume)
    place = run.find(chosen.name) if chosen.measure else made.write()
    figures |= made.figures(place)
    if chosen.beside:
        figures["again"] = other_seed(chosen.beside)
    made.card(place, figures)
    text = json.dumps(figures, indent=1)
    figures_path(run, made.name).write_text(text + "\n")
    print(text)


def fresh(made: Recipe, resume: bool) -> dict[str, Any]:
    """Train; returns what the training was, and the settings that were not the usual ones."""
    figures = {"name": made.name, "seed": made.run.seed, "training": train(made, resume)}
    return figures | ({"settings": made.settings} if made.settings else {})


def other_seed(path: Path) -> dict[str, Any]:
    """Figures of another training of the same model, without those it quotes itself."""
    figures: dict[str, Any] = json.loads(path.read_text())
    return {name: value for name, value in figures.items() if name != "again"}


def remembered(run: Run, name: str) -> dict[str, Any]:
    """Figures of an earlier training in ``run.out``."""
    figures: dict[str, Any] = json.loads(figures_path(run, name).read_text())
    return figures


if __name__ == "__main__":
    main()
