"""VAR against sinks that were planted into tiny-llava, beside its placebos.

    python -m attnctl.apps.bench.planted --n 3000 --kind adversarial --out planted.json

POPE questions about photos of the shape world are asked of the stock model, of the model with
planted sinks, and of that with VAR, with random image tokens taken for its sinks, and with VAR
in all heads; `--var p_moved=1,image_mass=0.5` adds an arm. Each arm comes with the share of the
lost right answers that it wins back, and with a paired 95 % bootstrap interval of its
difference to the planted model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnctl
from attnctl import assets
from attnctl.apps.control_syntax import split_control
from attnctl.apps.eval.estimate import Figure, Tally, estimate, ratio
from attnctl.assets.train.measure_llava import Teller, says_yes
from attnctl.assets.world.pope import SPLITS, Case, pope
from attnctl.testing.vlms.planted import Planting, planted, quiet_dims

from .placebo import other_tokens
from .statistics import mean_interval, paired_interval
from .tasks.answers import one_per_photo

__all__ = ["arms", "measure"]

TAU = 4.3
"""20 / sqrt(4096) of this model's sqrt(width), the largest phi there is."""

UNPLANTED = "VAR, nothing planted"


def arms(
    planting: Planting, sites: Any, seed: int, more: Sequence[str] = ()
) -> dict[str, attnctl.Control]:
    """Return the controls by name.

    With the paper's rho of 0.5 no head is chosen whose image attention is mostly on sinks,
    which the planted ones are; so rho is 0 except in the arm that says otherwise.

    Args:
        planting: what is planted.
        sites: the model's.
        seed: of the random tokens.
        more: options of further arms, as text.
    """
    options: dict[str, Any] = {"sink_dims": planting.dims, "tau": TAU, "rho_nonsink": 0.0}
    var, whole = attnctl.VAR(**options), attnctl.VAR(**options, p_moved=1.0)
    random, random_whole = (other_tokens(one, sites, seed) for one in (var, whole))
    assert random is not None and random_whole is not None
    return {
        "VAR": var,
        "VAR, all of it moved": whole,
        "VAR, rho 0.5": attnctl.VAR(**{**options, "rho_nonsink": 0.5}),
        "VAR, every head": attnctl.VAR(**options, image_mass=0.0),
        "random tokens for sinks": random,
        "random tokens, all of it moved": random_whole,
        **{f"VAR, {text}": _given(text, options) for text in more},
    }


def _given(text: str, options: dict[str, Any]) -> attnctl.Control:
    return attnctl.control("var", **{**options, **split_control(f"var:{text}")[1]})


def measure(
    teller: Teller,
    cases: Sequence[Case],
    planting: Planting,
    seed: int = 0,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the figures of all arms.

    Args:
        teller: model and processor.
        cases: questions.
        planting: what to plant.
        seed: of the random tokens.
        more: options of further arms, as text.
    """
    model = teller.model
    found = {"stock": _right(teller, cases, contextlib.nullcontext())}
    found["planted"] = _right(teller, cases, planted(model, planting))
    for name, control in arms(planting, attnctl.sites(model), seed, more).items():
        found[name] = _right(teller, cases, planted(model, planting, control))
    var = attnctl.VAR(sink_dims=planting.dims, tau=TAU, rho_nonsink=0.0)
    found[UNPLANTED] = _right(teller, cases, attnctl.patch(model, var))
    return {
        name: {
            "right": asdict(mean_interval(right)),
            "to_planted": asdict(paired_interval(right, found["planted"])),
            "to_stock": asdict(paired_interval(right, found["stock"])),
            "won_back": _part(name, found),
        }
        for name, right in found.items()
    }


def _part(name: str, found: dict[str, np.ndarray]) -> dict[str, float] | None:
    """Return the part of the loss that an arm with planted sinks wins back."""
    lost = found["stock"] - found["planted"]
    if name in ("stock", "planted", UNPLANTED) or lost.sum() <= 0:
        return None
    part = Figure("part", "", lambda sums: ratio(sums["won"], sums["lost"]))
    counts = {"won": found[name] - found["planted"], "lost": lost}
    asked = [str(i) for i in range(len(lost))]  # one question a photo
    return asdict(estimate(Tally(asked, counts, [part]))["part"])


def _right(teller: Teller, cases: Sequence[Case], inside: Any) -> np.ndarray:
    with inside:
        answers = teller.answers([(case.photo, case.question) for case in cases], length=1)
    right = [says_yes(a) == (c.label == "yes") for a, c in zip(answers, cases, strict=True)]
    return np.array(right, float)


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| arm | right, % | to planted, points | won back |", "|---|---|---|---|"]
    for name, row in figures.items():
        right, gain = row["right"], row["to_planted"]
        back = _percent(row["won_back"])
        lines.append(
            f"| {name} | {100 * right['value']:.1f} [{100 * right['low']:.1f}, "
            f"{100 * right['high']:.1f}] | {100 * gain['value']:+.1f} "
            f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] | {back} |"
        )
    return "\n".join(lines)


def _percent(part: dict[str, float] | None) -> str:
    if part is None:
        return ""
    value, low, high = (100 * part[key] for key in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}] %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--n", type=int, default=500, help="questions, on as many photos")
    parser.add_argument("--kind", choices=SPLITS, default="adversarial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bonus", type=float, default=Planting.bonus)
    parser.add_argument("--quiet", action="store_true", help="dimensions that values read least")
    parser.add_argument("--var", action="append", default=[], metavar="OPTIONS")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = assets.path(given.model) if given.model in assets.names() else Path(given.model)
    cases = one_per_photo(pope(given.kind, given.n, given.seed))
    teller = Teller.load(folder, device)
    dims = quiet_dims(teller.model) if given.quiet else Planting.dims
    planting = Planting(dims=dims, bonus=given.bonus)
    figures = measure(teller, cases, planting, given.seed, given.var)
    print(table(figures))
    if given.out:
        facts = {"model": given.model, "kind": given.kind, "n": len(cases), "seed": given.seed}
        data = {**facts, "planting": asdict(planting), "arms": figures}
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
