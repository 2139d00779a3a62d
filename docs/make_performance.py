"""Writes `docs/performance.md` from the files in `docs/measured/` that benches wrote.

Run `python docs/make_performance.py` after putting a file there; a test compares the page with
`page()`. To add figures of another machine, run one of the commands the page names and put its
JSON file into the folder: nothing is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "performance.md"
MEASURED = Path(__file__).parent / "measured"
INTRO = """\
# Performance

Written by `docs/make_performance.py` from the JSON files in `docs/measured/`, each as the bench
wrote it; do not edit by hand. Times are medians of runs in turn on one machine. What a control
does to pictures stands under [measured effects](effects.md), what it costs in rows and passes on
its own page.
"""

Data = dict[str, Any]


def page() -> str:
    """Return the page.

    Raises:
        ValueError: if a file is of no known bench.
    """
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(_files())}
    parts = [INTRO]
    for bench, (title, text, table) in BENCHES.items():
        mine = {path: data for path, data in files.items() if kind(path, data) == bench}
        if mine:
            parts += [f"## {title}\n", text]
            parts += [f"{table(d)}\nFile: `docs/measured/{p.name}`.\n" for p, d in mine.items()]
    return "\n".join(parts)


def _files() -> list[Path]:
    return list(MEASURED.glob("*.json"))


def kind(path: Path, data: Data) -> str:
    """Return which bench wrote a file."""
    found = data.get("bench", "cost" if "with CFG" in data else None)
    if found not in BENCHES:
        known = ", ".join(BENCHES)
        raise ValueError(f"{path}: bench is {found!r}, expected one of {known}")
    return str(found)


def cost(data: Data) -> str:
    """Return the table of `attnctl.apps.bench.cost`."""
    head = ("", "stock, ms", "neutral", "waiting", "SoftPAG, all heads", "one head a layer")
    rows = []
    for how in ("with CFG", "without CFG"):
        ratios = list(data[how]["ratios"].values())
        low, high = data[how]["quartiles"]["stock"]
        stock = f"{data[how]['milliseconds']['stock']:.1f} ({low:.1f} to {high:.1f})"
        rows.append([how, stock, *(f"{ratio:.3f}" for ratio in ratios[:4])])
    compiled = ", compiled" if data["compiled"] else ""
    where = f"**{data['model']}** on {data['device']}, torch {data['torch']}{compiled}"
    return f"{where}\n\n{_table(head, rows)}"


def attention(data: Data) -> str:
    """Return the table of `attnctl bench attention`."""
    head = ("case", "tokens", "kept", "backend", "ms", "times dense", "error")
    rows = [
        [
            row["case"], str(row["tokens"]), f"{row['density']:.3f}", row["backend"],
            f"{row['ms']:.2f}", f"{row['speedup']:.2f}",
            "" if row["error"] is None else f"{row['error']:.2f}",
        ]
        for row in data["rows"]
        if row["ms"] is not None
    ]  # fmt: skip
    return f"**{data['machine']}**\n\n{_table(head, rows)}"


def model(data: Data) -> str:
    """Return the table of `attnctl bench model`."""
    head = ("arm", "step, ms", "a block, ms", "times stock", "peak GiB")
    rows = [
        [
            f"`{row['arm']}`", f"{row['ms']:.0f}", f"{row['ms_layer']:.1f}",
            f"{row['speedup']:.2f}", f"{row['peak_gib']:.1f}" if row["peak_gib"] else "",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    size = data["size"]
    video = f"{size['frames']} frames of {size['height']} x {size['width']}"
    where = f"**{data['model']}** on {data['machine']}, {video}, {size['layers']} blocks"
    return f"{where}\n\n{_table(head, rows)}"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COST = """\
A denoiser with random weights, one forward. *Neutral* is a patch with scale 0, *waiting* one whose
window has not come, both over the stock forward (in brackets its quartiles). SoftPAG's time is
over that of the stock forward and one of the conditional rows alone: the work that it adds. Where
the quartiles are wide, a few percent say nothing ([more on these figures](effects.md#cost)).

```bash
python -m attnctl.apps.bench.cost --model sd3-small --out cost.json
```
"""
ATTENTION = """\
[Block-sparse attention](kernels.md#block-sparse-attention) beside torch's dense attention on the
same tensors. *Error* is over that of stock attention on the same rows, both against float64. The
reference is plain torch, for checking; it skips blocks but saves no time.

```bash
attnctl bench attention --out attention
```
"""
MODEL = """\
Real widths, random weights, a few blocks.

```bash
attnctl bench model --control radial:start=0,dense_layers=0 --out model
```
"""
BENCHES: dict[str, tuple[str, str, Callable[[Data], str]]] = {
    "cost": ("What a patch costs", COST, cost),
    "attention": ("Block-sparse attention", ATTENTION, attention),
    "model": ("A denoising step of a video model", MODEL, model),
}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
