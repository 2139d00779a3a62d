"""Writes the tables of `docs/steering_effects.md` from `docs/measured/steering/*.json`.

Run `python docs/make_steering.py` after putting a file there that
`python -m attnctl.apps.bench.steering_table` wrote; a test compares the page with `page()`.
A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, NAME being the file's.
Between `<!-- pooled: NAME NAME ... -->` and `<!-- end of pooled -->` stands what several files say
together of the controls that all of them have, and between `<!-- over CONTROL: NAME NAME ... -->`
and `<!-- end of over -->` what others gain over one of them, which may be at several settings. The
intervals there resample different prompts, each with all its pictures, because a prompt may come
again from other noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from attnctl.apps.bench.statistics import ratio_interval

PAGE = Path(__file__).parent / "steering_effects.md"
MEASURED = Path(__file__).parent / "measured" / "steering"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
POOLED = re.compile(r"(<!-- pooled: ([\w -]+) -->\n).*?(<!-- end of pooled -->)", re.DOTALL)
OVER = re.compile(r"(<!-- over (\S+): ([\w -]+) -->\n).*?(<!-- end of over -->)", re.DOTALL)
HEAD = (
    "arm", "exact, %", "gain, points", "won:lost", "all there, %", "colours bound, %",
    "log-probability", "objects off", "clipped, %",
)  # fmt: skip
POOLED_HEAD = ("arm", "exact, %", "gain, points", "won:lost")


def page(text: str) -> str:
    """Return the page with its tables written anew.

    Args:
        text: the page as it is.
    """
    text = TABLE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)
    text = POOLED.sub(lambda found: f"{found[1]}{pooled(found[2].split())}{found[3]}", text)
    return OVER.sub(lambda found: f"{found[1]}{over(found[2], found[3].split())}{found[4]}", text)


def table(name: str) -> str:
    """Return the table of a file of `docs/measured/steering`, with a line on its settings."""
    data = _read(name)
    stock, *rows = data["rows"]
    lines = [HEAD, ["---"] * len(HEAD), _cells(stock, "stock", ""), *map(_arm, rows)]
    set_to = data["settings"]
    kind = {"heldout": "held-out"}.get(set_to["kind"], set_to["kind"])
    where = (
        f"{data['model']}, {set_to['n']} {kind} prompts of {set_to['objects']} objects, "
        f"seed {set_to['seed']}, {set_to['steps']} steps, guidance {set_to['guidance_scale']:g}, "
        f"{data['device']}, torch {data['versions']['torch']}. {_presets(rows)}"
        f"File: `docs/measured/steering/{name}.json`."
    )
    hits = {row["arm"]: _hits(row) for row in rows if "hits" in row}
    return f"{_lined(lines)}\n{_over_placebos(hits)}{where}\n\n"


def pooled(names: Sequence[str]) -> str:
    """Return the table of several files together, with a line on what they are.

    Controls count as the same by their options, not by the name of a preset, which may change.

    Raises:
        ValueError: if the files differ in more than prompts and noise.
    """
    files = [_read(name) for name in names]
    settings = [{**data["settings"], "model": data["model"]} for data in files]
    if len({str({**one, "n": 0, "seed": 0}) for one in settings}) > 1:
        raise ValueError(f"{names}: files of other models or settings cannot be pooled")
    prompts, hits = _prompts(files), _every(files)
    stock = hits.pop("stock")
    lines = [POOLED_HEAD, ["---"] * 4, ["stock", f"{100 * stock.mean():.1f}", "", ""]] + [
        [f"`{arm}`", f"{100 * mine.mean():.1f}", *_over(mine, stock, prompts)]
        for arm, mine in hits.items()
    ]
    of = f"{len(stock)} pictures of {len(set(prompts))} different prompts, guidance "
    where = f"{of}{settings[0]['guidance_scale']:g}: {', '.join(f'`{name}`' for name in names)}."
    return f"{_lined(lines)}\n{_over_placebos(hits, prompts)}{where}\n\n"


def over(arm: str, names: Sequence[str]) -> str:
    """Return what other controls gain over one on the same pictures, by file and in all of them.

    Args:
        arm: a control with its options, as a pooled table names it.
        names: of the files.
    """
    files = [_read(name) for name in names]
    groups = [[data] for data in files] + ([files] if len(files) > 1 else [])
    titles = [f"guidance {data['settings']['guidance_scale']:g}" for data in files]
    head = [f"less `{arm}`", *titles, "together"][: 1 + len(groups)]
    lines = [head, ["---"] * len(head)]
    for other in _every(files):
        if other in ("stock", arm) or other.startswith("placebo "):
            continue
        cells = [
            ", ".join(_over(hits[other], hits[arm], _prompts(group)))
            for group, hits in ((group, _every(group)) for group in groups)
        ]
        lines.append([f"`{other}`", *cells])
    return f"{_lined(lines)}\nFrom {', '.join(f'`{name}`' for name in names)}.\n\n"


def _prompts(files: Sequence[dict[str, Any]]) -> list[str]:
    """Return the prompt of every picture of files, one file after another."""
    return [prompt for data in files for prompt in data["prompts"]]


def _every(files: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return which pictures are exact, in that order, of every arm that all the files have."""
    each = [{_label(row): _hits(row) for row in data["rows"]} for data in files]
    return {
        arm: np.concatenate([one[arm] for one in each])
        for arm in each[0]
        if all(arm in one for one in each)
    }


def _read(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
    return data


def _lined(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _label(row: dict[str, Any]) -> str:
    """Return the arm with the options that its presets had."""
    if not row["arm"].startswith("placebo "):
        return " + ".join(row["controls"]) or row["arm"]
    kind, _, rest = row["arm"].partition(": ")
    return f"{kind}: {rest.split(':')[0]}:{row['controls'][0].partition(':')[2]}"


def _hits(row: dict[str, Any]) -> np.ndarray:
    return np.array([*row["hits"]], int)


def _over_placebos(hits: Mapping[str, np.ndarray], prompts: Sequence[str] = ()) -> str:
    """Return what arms gain over their placebos on the same pictures, where files can tell."""
    said = [
        f"`{arm}` less its placebo `{placebo}`: {', '.join(_over(hits[arm], found, prompts))}."
        for placebo, found in hits.items()
        if placebo.startswith("placebo ") and (arm := placebo.split(": ", 1)[1]) in hits
    ]
    return f"Paired, {' '.join(said)}\n\n" if said else ""


def _over(one: np.ndarray, other: np.ndarray, prompts: Sequence[str]) -> tuple[str, str]:
    """Return the paired gain, and won:lost.

    Args:
        one: whether each picture of an arm is exact [n].
        other: that of another arm.
        prompts: of the pictures, to be resampled; none for pictures of prompts that all differ.
    """
    _, which = np.unique([*prompts] or range(len(one)), return_inverse=True)
    gain = ratio_interval(np.bincount(which, one - other), np.bincount(which))
    return _percent(asdict(gain), "+"), f"{(one > other).sum()}:{(one < other).sum()}"


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
