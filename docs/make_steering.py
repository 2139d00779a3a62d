"""Writes the tables of `docs/steering_effects.md` from `docs/measured/steering/*.json`.

Run `python docs/make_steering.py` after putting a file there that
`python -m attnctl.apps.bench.steering_table` wrote; a test compares the page with `page()`.
A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME being the file's.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from attnctl.apps.bench.statistics import paired_interval

PAGE = Path(__file__).parent / "steering_effects.md"
MEASURED = Path(__file__).parent / "measured" / "steering"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEAD = (
    "arm", "exact, %", "gain, points", "won:lost", "all there, %", "colours bound, %",
    "log-probability", "objects off", "clipped, %",
)  # fmt: skip


def page(text: str) -> str:
    """Return the page with its tables written anew.

    Args:
        text: the page as it is.
    """
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def table(name: str) -> str:
    """Return the table of a file of `docs/measured/steering`, with a line on its settings."""
    data = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
    stock, *rows = data["rows"]
    lines = [HEAD, ["---"] * len(HEAD), _cells(stock, "stock", ""), *map(_arm, rows)]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    set_to = data["settings"]
    kind = {"heldout": "held-out"}.get(set_to["kind"], set_to["kind"])
    where = (
        f"{data['model']}, {set_to['n']} {kind} prompts of {set_to['objects']} objects, "
        f"seed {set_to['seed']}, {set_to['steps']} steps, guidance {set_to['guidance_scale']:g}, "
        f"{data['device']}, torch {data['versions']['torch']}. {_presets(rows)}"
        f"File: `docs/measured/steering/{name}.json`."
    )
    return f"{body}\n{_over_placebos(rows)}{where}\n\n"


def _over_placebos(rows: list[dict[str, Any]]) -> str:
    """Return what arms gain over their placebos on the same pictures, where files can tell."""
    hits = {row["arm"]: np.array([*row["hits"]], int) for row in rows if "hits" in row}
    said = [
        f"`{arm}` less its placebo `{placebo}`: {_over(hits[arm], hits[placebo])}."
        for placebo in hits
        if placebo.startswith("placebo ") and (arm := placebo.split(": ", 1)[1]) in hits
    ]
    return f"Paired, {' '.join(said)}\n\n" if said else ""


def _over(one: np.ndarray, other: np.ndarray) -> str:
    gain, won = paired_interval(one, other), int((one > other).sum())
    return f"{_percent(asdict(gain), '+')}, {won}:{int((one < other).sum())}"


def _presets(rows: list[dict[str, Any]]) -> str:
    """Return what the presets were when a table was made; they may have changed since."""
    found = [row["controls"][0] for row in rows if row["arm"] == row["controls"][0].split(":")[0]]
    return f"Presets were {', '.join(f'`{one}`' for one in found)}. " if found else ""


def _arm(row: dict[str, Any]) -> list[str]:
    return _cells(row, f"`{row['arm']}`", f"{row['won']}:{row['lost']}")


def _cells(row: dict[str, Any], name: str, wins: str) -> list[str]:
    figures = {key: found["value"] for key, found in row["figures"].items()}
    gain = _percent(row["gains"]["exact"], "+") if wins else ""
    return [
        name, _percent(row["figures"]["exact"]), gain, wins,
        f"{100 * figures['present']:.1f}", f"{100 * figures['unmixed']:.1f}",
        f"{figures['log_prob']:.2f}", f"{figures['miscounted']:.2f}",
        f"{100 * figures['clipped']:.2f}",
    ]  # fmt: skip


def _percent(found: dict[str, float], sign: str = "") -> str:
    value, low, high = (f"{100 * found[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
