"""The table of the docs: steering controls alone, together, and their placebos.

    python -m attnctl.apps.bench.steering_table --model tiny-sd --n 400 --out steering.json

Every arm draws the same held-out prompts from the same noise as `attnctl bench effect` with these
settings. Arms are those of `ARMS`, or given with `--arm`, in text form:

    regulation                                     the preset for the model, else the defaults
    preset a-star:retain=0                         the preset with an option changed
    attend-and-excite + regulation:strength=0.5    two controls at once
    placebo random words: attend-and-excite        a placebo of the control after the colon

Figures of an arm: the share of pictures that are exact; of those in which every prompted object
is there, whatever else is; of those without a mixture, an object with the colour of one prompted
object and the shape of another; log-probability, objects off and clipped pixels as quality.
In a file, "hits" says of every prompt whether its picture is exact, so that any two arms can be
paired, and "prompts" which they are, so that files can be pooled (`docs/make_steering.py`).
`--shard 2/8` runs the second eighth of the arms, `--join` puts the files of all into one, or those
of other arms on the same pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attnctl
from attnctl.apps.chosen import Chosen, choose
from attnctl.apps.control_syntax import split_control
from attnctl.apps.record import versions
from attnctl.assets.world import detector, parse
from attnctl.assets.world.palette import pair_index
from attnctl.errors import OptionError

from . import placebo_latent, placebo_steering  # noqa: F401  (register their placebos)
from .placebo import KINDS
from .statistics import Interval, mcnemar, mean_interval, paired_interval
from .tasks import Request, Task, find_task, open_task
from .trials import parts

__all__ = ["ARMS", "arms_of", "controls_of", "joined", "measure", "seen"]

SITES = {"unet": "L1-2", "transformer": "L4,L6-7"}
"""Where the maps of tiny-sd and of tiny-sd3 show the objects, by what the pipeline calls its
denoiser."""
ARMS: tuple[str, ...] = (
    "attend-and-excite",
    "placebo random words: attend-and-excite",
    "placebo neighbour's gradient: attend-and-excite",
    "a-star",
    "preset a-star:retain=0",
    "preset a-star:segregate=0",
    "placebo random words: a-star",
    "placebo neighbour's gradient: a-star",
    "conform:heads={sites},keep_norm=true,updates=0,scale=1",
    "conform:heads={sites},keep_norm=true,updates=0,scale=4",
    "syngen:heads={sites},keep_norm=true,scale=1",
    "syngen:heads={sites},keep_norm=true,scale=4",
    "divide-and-bind:heads={sites},keep_norm=true,updates=0,scale=0.5",
    "divide-and-bind:heads={sites},keep_norm=true,updates=0,scale=2",
    "disendiff:heads={sites},keep_norm=true,stop=0.5,scale=4",
    "disendiff:heads={sites},keep_norm=true,stop=0.5,scale=16",
    "regulation",
    "regulation:strength=1",
    "placebo other prompt tokens: regulation",
    "attend-and-excite + regulation",
    "a-star + regulation",
    "attend-and-excite + conform:heads={sites},keep_norm=true,updates=0,scale=1",
)
"""Arms beside stock, for any model; `regulation:strength=1` is as published."""
CROSS: tuple[str, ...] = (
    "spacetime",
    "placebo everywhere: spacetime",
    "placebo neighbour's descriptions: spacetime",
    "placebo worst fit: spacetime",
    "spacetime + regulation",
    "spacetime + attend-and-excite",
    "spacetime + attend-and-excite + regulation",
)
"""More of them, for models with cross-attention."""
RATES = ("exact", "present", "unmixed")
SLACK = 0.02
"""By how much rates of the same pictures may differ from one process to another: rounding on a
GPU may depend on what else it does. Gains are taken within a process."""
FIGURES = (*RATES, "log_prob", "miscounted", "clipped", "saturation")


def arms_of(pipe: Any) -> list[str]:
    """Return the arms of the docs for tiny-sd or tiny-sd3."""
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    every = [*ARMS, *(CROSS if denoiser == "unet" else ())]
    return [arm.format(sites=SITES[denoiser]) for arm in every]


def controls_of(pipe: Any, arm: str, seed: int = 0) -> tuple[attnctl.Control, ...]:
    """Return the controls of an arm in text form; see the module.

    Raises:
        OptionError: if the text is wrong, or the placebo does not apply.
    """
    if not arm.startswith("placebo "):
        return tuple(_control(pipe, part) for part in arm.split(" + "))
    kind, _, rest = arm.removeprefix("placebo ").partition(": ")
    if kind not in KINDS:
        raise OptionError(f"{arm!r}: there is no placebo {kind!r}, but {', '.join(KINDS)}")
    made = KINDS[kind](_control(pipe, rest), attnctl.sites(pipe), seed)
    if made is None:
        raise OptionError(f"the placebo {kind!r} is not one of {rest}")
    return (made,)


def _control(pipe: Any, text: str) -> attnctl.Control:
    bare = text.strip().removeprefix("preset ")
    if bare == text.strip():
        return choose(pipe, text).control
    name, options = split_control(bare)
    kept = choose(pipe, name).changed
    return attnctl.control(name, **{**kept, **options})


def seen(pictures: torch.Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return which pictures [n, 3, H, W] show every prompted object, and which no mixture."""
    with torch.inference_mode():
        found = (detector(pictures.device)(pictures).presence > 0).cpu()
    present, unmixed = [], []
    for row, prompt in zip(found, prompts, strict=True):
        pairs = parse(prompt)
        mixtures = {(a[0], b[1]) for a in pairs for b in pairs} - set(pairs)
        present.append(all(row[pair_index(*pair)] for pair in pairs))
        unmixed.append(not any(row[pair_index(*pair)] for pair in mixtures))
    return {"present": np.array(present, float), "unmixed": np.array(unmixed, float)}


def measure(
    task: Task, arms: Sequence[str], show: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """Return one row of plain values an arm, stock first.

    Args:
        task: pictures of the shape world.
        arms: in text form.
        show: is called with each row as it comes.
    """
    rows: list[dict[str, Any]] = []
    stock: dict[str, np.ndarray] = {}
    for arm in ("", *arms):
        begun = time.perf_counter()
        controls = controls_of(task.model, arm) if arm else ()
        scores = _scores(task, controls)
        stock = stock or scores
        row = _row(arm or "stock", scores, stock)
        row["controls"] = [str(Chosen(control)) for control in controls]
        row["seconds"] = round(time.perf_counter() - begun, 1)
        rows.append(row)
        show(row)
    return rows


def _scores(task: Task, controls: tuple[attnctl.Control, ...]) -> dict[str, np.ndarray]:
    patched = attnctl.patch(task.model, *controls) if controls else contextlib.nullcontext()
    with patched:
        drawn = np.concatenate([task.run(*part) for part in parts(len(task.prompts), task.batch)])
    pictures = torch.from_numpy(drawn).float() / 255
    return {**task.score(drawn), **seen(pictures, task.prompts)}


def _row(arm: str, scores: dict[str, np.ndarray], stock: dict[str, np.ndarray]) -> dict[str, Any]:
    hit, was = scores["exact"] > 0, stock["exact"] > 0
    won, lost = int((hit & ~was).sum()), int((was & ~hit).sum())
    return {
        "arm": arm,
        "figures": {key: _plain(mean_interval(scores[key])) for key in FIGURES},
        "gains": {key: _plain(paired_interval(scores[key], stock[key])) for key in FIGURES},
        "won": won,
        "lost": lost,
        "p": float(f"{mcnemar(won, lost):.3g}"),
        "hits": "".join(map(str, hit.astype(int))),
    }


def _plain(interval: Interval) -> dict[str, float]:
    return {key: round(value, 5) for key, value in asdict(interval).items()}


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """Return the shards of one table as one, or several tables of the same prompts and noise.

    Arms are in the order in which they were asked for; stock is that of the first file.

    Raises:
        OptionError: if their settings differ, or their stock does by more than `SLACK`.
    """
    every = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    first = every[0]
    stock = first["rows"][0]
    for file, data in zip(files, every, strict=True):
        apart = [
            abs(data["rows"][0]["figures"][key]["value"] - stock["figures"][key]["value"])
            for key in RATES
        ]
        if data["settings"] != first["settings"] or max(apart) > SLACK:
            raise OptionError(f"{file}: its settings or its stock differ from {files[0]}")
    rows = [row for data in every for row in data["rows"][1:]]
    arms = list(dict.fromkeys(arm for data in every for arm in data["arms"]))
    by_arm = sorted(rows, key=lambda row: arms.index(row["arm"]))
    return {**first, "arms": arms, "rows": [stock, *by_arm]}


def line(row: dict[str, Any]) -> str:
    """Return a row for the terminal."""
    gain = {key: 100 * value for key, value in row["gains"]["exact"].items()}
    rates = " ".join(f"{100 * row['figures'][key]['value']:5.1f}" for key in RATES)
    log_prob, off = (row["figures"][key]["value"] for key in ("log_prob", "miscounted"))
    return (
        f"{rates}  {gain['value']:+5.1f} [{gain['low']:+5.1f}, {gain['high']:+5.1f}]  "
        f"{row['won']}:{row['lost']}  {log_prob:.2f} {off:.2f}  {row['seconds']:.0f} s  "
        f"{row['arm']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = _arguments(arguments)
    if given.join:
        _write(given.out, joined(given.join))
        return
    kind, folder = find_task(given.model)
    keys = ("n", "objects", "seed", "steps", "guidance_scale", "batch", "device")
    options = {key: getattr(given, key) for key in keys}
    task = open_task(kind, Request(given.model, folder, **options))
    arms = given.arm or arms_of(task.model)
    data: dict[str, Any] = {
        "bench": "steering",
        "model": given.model,
        "settings": {**task.settings, "n": given.n, "seed": given.seed},
        "device": torch.cuda.get_device_name() if task.model.device.type == "cuda" else "cpu",
        "dtype": str(task.model.dtype).removeprefix("torch."),
        "versions": versions(),
        "prompts": task.prompts,
        "arms": arms,
        "rows": [],
    }

    def show(row: dict[str, Any]) -> None:
        data["rows"].append(row)
        _write(given.out, data)  # after every arm: a run that is cut off keeps what it has
        print(line(row), flush=True)

    print(f"{given.model}: {given.n} {task.describe()}, seed {given.seed}")
    index, count = (int(part) for part in given.shard.split("/"))
    measure(task, arms[index - 1 :: count], show)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--objects", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--arm", action="append", help="in place of the arms of the docs")
    parser.add_argument("--shard", default="1/1", metavar="I/N")
    parser.add_argument("--join", type=Path, nargs="+", help="files of shards")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def _write(out: Path, data: dict[str, Any]) -> None:
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
