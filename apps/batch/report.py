"""The report of a batch: one HTML page without scripts, and contact sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files import write_whole
from ..pictures import png_bytes
from ..search_heads import duration
from .contact import contact_sheets
from .output import output_errors
from .plan import Planned

__all__ = ["write_report"]

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #111; background: #fff; }
table { border-collapse: collapse; } td, th { padding: .4rem .8rem; text-align: left;
vertical-align: top; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
img, video { width: 160px; image-rendering: pixelated; } .failed { color: #a00; }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #111; }
td, th { border-color: #444; } .failed { color: #f88; } }
"""

States = Mapping[str, Mapping[str, Any]]


def write_report(folder: Path, model: str, plan: Sequence[Planned], states: States) -> Path:
    """Write `report.html` and `contact-1.png` ... and return the page's path.

    Args:
        folder: the output folder.
        model: what the user calls the model.
        plan: every item, in order; each has a line in the manifest.
        states: the lines by key.

    Raises:
        OutputError: if they cannot be written.
    """
    done = [one for one in plan if states[one.key]["state"] == "done"]
    sheets = []
    with output_errors(folder):
        for number, sheet in enumerate(contact_sheets(folder, done), 1):
            sheets.append(f"contact-{number}.png")
            write_whole(folder / sheets[-1], png_bytes(sheet, {"files": [p.file for p in done]}))
        path = folder / "report.html"
        write_whole(path, _page(model, plan, states, sheets).encode())
    return path


def _page(model: str, plan: Sequence[Planned], states: States, sheets: Sequence[str]) -> str:
    failed = sum(states[one.key]["state"] == "failed" for one in plan)
    seconds = sum(float(states[one.key]["seconds"]) for one in plan)
    links = " ".join(f'<a href="{name}">{name}</a>' for name in sheets)
    rows = "\n".join(_row(one, states[one.key]) for one in plan)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>attnctl batch: {escape(model)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><h1>{escape(model)}</h1>
<p>{len(plan) - failed} done, {failed} failed, {duration(seconds)} of drawing. {links}</p>
<table><tr><th>result</th><th>prompt</th><th>settings</th><th>controls</th></tr>
{rows}
</table></body></html>
"""


def _row(one: Planned, line: Mapping[str, Any]) -> str:
    controls = "<br>".join(escape(str(chosen)) for chosen in one.chosen) or "none"
    prompt = escape(one.item.prompt)
    negative = one.arguments.get("negative_prompt")
    if negative:
        prompt += f"<br>without: {escape(str(negative))}"
    return (
        f"<tr><td>{_result(one, line)}</td><td>{prompt}</td><td>{escape(_settings(one))}</td>"
        f"<td>{controls}</td></tr>"
    )


def _result(one: Planned, line: Mapping[str, Any]) -> str:
    if line["state"] == "failed":
        where, reason = escape(str(line["where"])), escape(str(line["reason"]))
        return f'<span class="failed">{where}: {reason}</span>'
    link = quote(one.file)
    if one.file.endswith(".mp4"):
        return f'<video src="{link}" controls preload="none"></video><br><a href="{link}">file</a>'
    return f'<a href="{link}"><img src="{link}" alt="" loading="lazy"></a>'


def _settings(one: Planned) -> str:
    texts = ("prompt", "negative_prompt")
    values = {k.removeprefix("num_"): v for k, v in one.arguments.items() if k not in texts}
    values = {"seed": one.item.settings.seed, **values}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
