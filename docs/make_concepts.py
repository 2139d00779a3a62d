"""Draws the diagrams of `docs/concepts.md`: sites and planes, rows and roles, the stack.

Run `python docs/make_concepts.py` after a change; a test compares the files with `pictures()`.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
_PATH = runpy.run_path(str(Path(__file__).with_name("make_query_path.py")))
text, box, arrow, marker, cells = (
    _PATH[name] for name in ("text", "box", "arrow", "marker", "cells")
)
WAY_IN, WAY_BACK, OURS, STOCK, FAINT, PAPER, EDGE = (
    _PATH[name] for name in ("WAY_IN", "WAY_BACK", "OURS", "STOCK", "FAINT", "PAPER", "EDGE")
)

WIDTH = 940
BOLD = {"font_weight": "bold"}


def pictures() -> dict[str, str]:
    """Return every diagram by file name."""
    return {
        "planes.svg": svg("Sites and planes", 430, planes()),
        "rows.svg": svg("Rows and roles", 250, rows()),
        "stack.svg": svg("The stack", 240, stack()),
    }


def svg(title: str, height: int, parts: Iterable[str]) -> str:
    """Return a picture on its own light ground, so that it reads on any page."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" '
        'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">',
        f"<title>{title}</title>",
        f"<defs>{marker('in', WAY_IN)}{marker('back', WAY_BACK)}</defs>",
        box(1, 1, WIDTH - 2, height - 2, (PAPER, EDGE), 14),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def planes() -> Iterable[str]:
    """Return a run from outside to inside, and the plane of each level on the right."""
    levels = (
        ("a run: one call of pipe(...)", "step plane", "between(call): the latents"),
        ("a step: forwards of the denoiser", "denoiser plane", "denoise(call): inputs, rows"),
        ("a layer: its sites, self, cross or joint attention", "", ""),
        ("a site: its heads", "attention plane", "attend(call): q, k, v"),
    )  # fmt: skip
    for i, (name, plane, method) in enumerate(levels):
        x, y = 24 + 26 * i, 24 + 46 * i
        yield box(x, y, 606 - 52 * i, 310 - 68 * i, STOCK)
        yield text(x + 14, y + 26, name, 15, **BOLD)
        if plane:
            yield box(660, y, 256, 42, OURS)
            yield text(674, y + 18, plane, 15, **BOLD)
            yield text(674, y + 35, method, 13, fill=FAINT)
            yield arrow(658, y + 24, 606 - 26 * i + 26, y + 24, WAY_IN)
    for head in range(6):
        chosen = head in (1, 4)
        yield box(120 + 66 * head, 206, 56, 40, OURS if chosen else (PAPER, EDGE), 5)
        yield text(148 + 66 * head, 231, f"H{head}", 14, text_anchor="middle")
    yield text(
        24,
        366,
        "A selector names the heads (blue: L2H1 and L2H4 of layer 2); the schedule names",
        14,
    )
    yield text(
        24,
        386,
        "the steps. A language model has a fourth plane, decode(call): the logits of the next",
        14,
    )
    yield text(24, 406, "token, once for each forward of the whole model.", 14)


def rows() -> Iterable[str]:
    """Return the batch of a denoiser call with classifier-free guidance, two samples."""
    lines = (
        ("the pipeline gives 2 x [uncond, cond]", ("u 0", "u 1", "c 0", "c 1")),
        (
            "a guidance control adds the group softpag/0",
            ("u 0", "u 1", "c 0", "c 1", "p 0", "p 1"),
        ),
        ("the pipeline gets its own rows back", ("u 0", "u 1", "c 0", "c 1")),
    )
    for i, (words, names) in enumerate(lines):
        y = 34 + 56 * i
        yield text(24, y + 20, words, 14)
        yield from cells(420, y, names)
        if i < 2:
            yield arrow(438, y + 34, 438, y + 53, WAY_IN)
    yield text(
        24,
        212,
        'Rows are asked for by role, call.slice("cond"), never by position: the order differs',
        14,
    )
    yield text(
        24, 232, "between pipelines, and with CFG in two calls there is one role a call.", 14
    )


def stack() -> Iterable[str]:
    """Return the way of an attention call through two controls and back."""
    names = (
        ("model", "the site calls attention", STOCK),
        ("first control", "outermost", OURS),
        ("second control", "further in", OURS),
        ("attention backend", "call.primitive()", STOCK),
    )
    for i, (name, note, colors) in enumerate(names):
        x = 24 + 232 * i
        yield box(x, 60, 168, 84, colors)
        yield text(x + 84, 96, name, 15, text_anchor="middle", **BOLD)
        yield text(x + 84, 118, note, 13, text_anchor="middle", fill=FAINT)
        if i < 3:
            yield arrow(x + 170, 84, x + 229, 84, WAY_IN)
            yield arrow(x + 230, 122, x + 171, 122, WAY_BACK)
    for i in (1, 2):
        yield text(24 + 232 * i + 200, 50, "proceed()", 13, text_anchor="middle", fill=WAY_IN)
        yield text(24 + 232 * i + 200, 166, "output", 13, text_anchor="middle", fill=WAY_BACK)
    yield text(
        24,
        202,
        "Before proceed() a control changes the input of all that lies further in, after it the",
        14,
    )
    yield text(
        24,
        222,
        "output. A control that replaces the softmax has no proceed(): it has to stand last.",
        14,
    )


if __name__ == "__main__":
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")
