"""Measures VAR and PAI on heads that read the image and on others; tables of their pages.

    python -P docs/measure_placebo_heads.py measure [--n 400] [--seed 103] [--out FILE.json]
    python -P docs/measure_placebo_heads.py var|pai docs/measured/vlm/placebo-heads.json

The heads of the layers in which a control acts are ranked by the attention that the prompt's last
row gives to the image, in the stock model, on photos of another seed. The control acts in all of
them, in the half that reads the image most, in the other half, and in a half drawn at random. VAR
has sinks planted into tiny-llava to work on, and moves all of their attention; PAI is asked of the
model as it is. Questions of POPE's three splits, one a photo. Figures are percent, with paired
95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import attnctl
from attnctl import assets
from attnctl.apps.bench.planted import TAU
from attnctl.apps.bench.statistics import ratio_interval
from attnctl.apps.bench.tasks.answers import one_per_photo
from attnctl.apps.eval.estimate import Figure, Tally, difference, estimate, ratio
from attnctl.assets.train.measure_llava import Teller, says_yes
from attnctl.assets.world.pope import SPLITS, Case, pope
from attnctl.control import Control
from attnctl.kernels.group_attention import group_masses
from attnctl.processors.vlm.rows import tokens_of
from attnctl.records import AttentionCall
from attnctl.testing.vlms.planted import Planting, planted

LAYERS = {"var": range(1, 7), "pai": range(2, 8)}
"""Where the controls act: VAR from the layer of the planted sinks on but for the last, PAI from
its own first one."""
PICTURES, PICTURES_SEED = 50, 11
BASE = {"var": "planted", "pai": "stock"}
HALVES = ("all heads", "the half that reads most", "the other half", "a random half")
RIGHT = (Figure("right", "right", lambda s: ratio(s["right"], s["n"])),)
Head = tuple[int, int]


@dataclass(frozen=True)
class Watch(Control):
    """Notes the attention of a prompt's last row to the image, head by head; changes nothing.

    Args:
        found: [B, H] of every batch, by layer.
    """

    found: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    name: ClassVar[str] = "watch"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Note a layer's masses."""
        layer, last = call.site.layer, call.q.shape[2] - 1
        assert layer is not None
        row = call.queries_at(torch.tensor([last], device=call.q.device))
        image = tokens_of(row, self.name).keys("image")[:, None]
        masses = group_masses(row.q, row.k, image, row.mask, row.scale)
        self.found.setdefault(layer, []).append(masses[:, :, 0, 0].cpu())
        return call.proceed()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "var", "pai"))
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=103)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "measure":
        measure(given)
    else:
        print(table(json.loads(given.file.read_text()), given.what))


# -- asking ----------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> None:
    """Ask every arm about every split, and write the figures."""
    torch.set_grad_enabled(False)
    teller = Teller.load(assets.path("tiny-llava"), dtype=torch.float32)
    masses = read_image(teller)
    data: dict[str, Any] = {"n": given.n, "seed": given.seed, "torch": torch.__version__}
    data["reads"] = {
        name: {half: mean(masses, heads) for half, heads in halves(masses, layers).items()}
        for name, layers in LAYERS.items()
    }
    data["splits"] = {}
    tallies: dict[str, list[tuple[list[str], np.ndarray]]] = {}
    for kind in SPLITS:
        cases = one_per_photo(pope(kind, given.n, given.seed))
        right = {arm: answered(teller, cases, run()) for arm, run in arms(teller, masses).items()}
        for arm, values in right.items():
            tallies.setdefault(arm, []).append(([str(c.photo.number) for c in cases], values))
        data["splits"][kind] = figures({arm: [rows[-1]] for arm, rows in tallies.items()})
        data["splits"]["all"] = figures(tallies)
        if given.out:
            given.out.write_text(json.dumps(data, indent=1) + "\n")
        print(kind, flush=True)


def read_image(teller: Teller) -> dict[Head, float]:
    """Return the mean attention to the image of every head's answer row."""
    watch = Watch()
    cases = one_per_photo(pope("random", PICTURES, PICTURES_SEED))
    with attnctl.patch(teller.model, watch):
        teller.answers([(case.photo, case.question) for case in cases], length=1)
    return {
        (layer, head): float(value)
        for layer, seen in watch.found.items()
        for head, value in enumerate(torch.cat(seen).mean(0))
    }


def halves(masses: dict[Head, float], layers: Sequence[int]) -> dict[str, list[Head]]:
    """Return the heads of the arms."""
    heads = sorted((h for h in masses if h[0] in layers), key=lambda h: -masses[h])
    half = len(heads) // 2
    drawn = torch.randperm(len(heads), generator=torch.Generator().manual_seed(0))[:half]
    parts = (heads, heads[:half], heads[half:], [heads[i] for i in drawn.tolist()])
    return dict(zip(HALVES, parts, strict=True))


def mean(masses: dict[Head, float], heads: Sequence[Head]) -> float:
    """Return the mean attention to the image."""
    return round(sum(masses[head] for head in heads) / len(heads), 4)


def arms(
    teller: Teller, masses: dict[Head, float]
) -> dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Return what each arm patches."""
    model, planting = teller.model, Planting()
    made: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        "stock": contextlib.nullcontext,
        "planted": lambda: planted(model, planting),
    }
    for half, heads in halves(masses, LAYERS["var"]).items():
        var = attnctl.VAR(
            heads=text(heads), sink_dims=planting.dims, tau=TAU, rho_nonsink=0.0, p_moved=1.0
        )
        made[f"var, {half}"] = lambda var=var: planted(model, planting, var)  # type: ignore[misc]
    for half, heads in halves(masses, LAYERS["pai"]).items():
        pai = attnctl.PAI(heads=text(heads), alpha=0.5)
        made[f"pai, {half}"] = lambda pai=pai: attnctl.patch(model, pai)  # type: ignore[misc]
    return made


def text(heads: Sequence[Head]) -> list[str]:
    """Return heads as a selector."""
    return [f"L{layer}H{head}" for layer, head in sorted(heads)]


def answered(
    teller: Teller, cases: Sequence[Case], inside: contextlib.AbstractContextManager[Any]
) -> np.ndarray:
    """Return 1 for each right answer, 0 for each other."""
    with inside:
        told = teller.answers([(case.photo, case.question) for case in cases], length=1)
    return np.array(
        [says_yes(t) == (c.label == "yes") for t, c in zip(told, cases, strict=True)], float
    )


# -- figures ---------------------------------------------------------------------------------


def figures(right: dict[str, list[tuple[list[str], np.ndarray]]]) -> dict[str, Any]:
    """Return how many answers of each arm are right, its gains, and what VAR wins back."""
    tallies = {arm: joined(rows) for arm, rows in right.items()}
    found: dict[str, Any] = {}
    for arm, tally in tallies.items():
        row: dict[str, Any] = {"right": asdict(estimate(tally)["right"])}
        name, _, half = arm.partition(", ")
        if half:
            row["gain"] = asdict(difference(tally, tallies[BASE[name]])["right"])
            chance = tallies[f"{name}, {HALVES[-1]}"]
            row["over random half"] = asdict(difference(tally, chance)["right"])
        if name == "var":
            row["won back"] = asdict(won_back(tally, tallies["stock"], tallies["planted"]))
        found[arm] = row
    return found


def joined(rows: Sequence[tuple[list[str], np.ndarray]]) -> Tally:
    """Return the answers to the questions of some splits, by photo."""
    right = np.concatenate([values for _, values in rows])
    images = [photo for photos, _ in rows for photo in photos]
    return Tally(images, {"right": right, "n": np.ones_like(right)}, RIGHT)


def won_back(tally: Tally, stock: Tally, lost: Tally) -> Any:
    """Return the share of the answers lost to the planted sinks that an arm wins back."""
    sums = [one.by_image()[1]["right"] for one in (tally, stock, lost)]
    return ratio_interval(sums[0] - sums[2], sums[1] - sums[2])


# -- the tables ------------------------------------------------------------------------------


def table(data: dict[str, Any], name: str) -> str:
    """Return the page's table of a control."""
    key, factor = ("won back", 0) if name == "var" else ("gain", 1)
    splits = [*SPLITS, "all"]
    heads = ["in", "attention to the image", *splits, "all, points over the random half"]
    lines = [f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"]
    plain = ("stock", "planted") if name == "var" else ("stock",)
    for arm in plain:
        told = [f"{100 * data['splits'][one][arm]['right']['value']:.1f}" for one in splits]
        lines.append(f"| ({arm}) | | {' | '.join(told)} | |")
    for half in HALVES:
        rows = [data["splits"][one][f"{name}, {half}"] for one in splits]
        told = [interval(row[key], factor) for row in rows]
        reads = 100 * data["reads"][name][half]
        over = "" if half == HALVES[-1] else interval(rows[-1]["over random half"], 1)
        lines.append(f"| {half} | {reads:.0f} % | {' | '.join(told)} | {over} |")
    return "\n".join(lines)


def interval(one: dict[str, float], digits: int) -> str:
    """Return a figure in percent with its interval."""
    value, low, high = (round(100 * one[key], digits) + 0.0 for key in ("value", "low", "high"))
    sign = "+" if digits else ""
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


if __name__ == "__main__":
    main()
