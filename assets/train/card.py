"""Pieces that the models' cards share: tables and sentences made of figures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from attnctl.assets.train.numbers import percent
from attnctl.assets.train.settings import texts


def part_rows(millions: Mapping[str, float], classes: Mapping[str, str]) -> str:
    """Table rows of a model's parts, their classes and sizes."""
    return "\n".join(
        f"| {name} | {classes[name]} | {count:.2f} M |" for name, count in millions.items()
    )


def trained(figures: Mapping[str, Any]) -> str:
    """``85 s on one GPU (seed 0)``."""
    return f"{figures['training']['seconds']:.0f} s on one GPU (seed {figures['seed']})"


def again(figures: Mapping[str, Any], table: Callable[[Any], str]) -> str:
    """A section with the figures of a training with another seed, if there are any.

    Args:
        figures: of the model; ``again`` holds the other training's (see ``--beside``).
        table: makes a table of figures.
    """
    other = figures.get("again")
    if not other:
        return ""
    return f"\n### Trained again with seed {other['seed']}\n\n{table(other)}\n"


def settings_words(figures: Mapping[str, Any]) -> str:
    """The command line's part for changed settings, with a space before it; often empty."""
    return "".join(f" --set {text}" for text in texts(figures.get("settings", {})))


def exact_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table: a row per prompt set, a column per guidance scale and step count."""
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    found = {(row["prompts"], _setting(row)): percent(row) for row in rows}
    lines = [["prompts", "n", *(f"g {g:g}, {n} steps" for g, n in sorted(settings))]]
    lines.append(["---"] * len(lines[0]))
    for name in dict.fromkeys(row["prompts"] for row in rows):
        count = max(row["n"] for row in rows if row["prompts"] == name)
        cells = [found.get((name, setting), "") for setting in sorted(settings)]
        lines.append([name, str(count), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setting(row: dict[str, Any]) -> tuple[float, int]:
    return row["guidance_scale"], row["num_inference_steps"]


def parts_words(figures: dict[str, Any]) -> str:
    """What the detector and the autoencoder do, where their figures are known."""
    words = []
    if judge := figures.get("detector"):
        clean = ", ".join(percent(one) for one in judge["clean pictures"])
        malformed, doubled = (
            100 * judge[f"{what} refused"]["rate"] for what in ("malformed", "doubled")
        )
        words.append(
            f"The detector ({judge['millions']:.2f} M parameters) calls {clean} of drawn pictures "
            f"with one, two and three objects exact; it refuses {malformed:.1f} % of pictures "
            f"with a malformed object and {doubled:.1f} % with a doubled one."
        )
    if vae := figures.get("vae"):
        words.append(
            f"The autoencoder alone: {vae['psnr']} dB, {percent(vae['exact'])} still exact after "
            f"encoding and decoding."
        )
    return "\n\n".join(map(wrapped, words))


def wrapped(words: str) -> str:
    """A paragraph in lines of at most 98 letters."""
    return textwrap.fill(words, 98, break_on_hyphens=False)
