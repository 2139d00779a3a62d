"""The command `attnctl bench effect`: check everything, run the arms, judge, report, save."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

import attnctl
from attnctl.apps.chosen import Chosen, choose
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.pictures import PictureError, check_output, write_png
from attnctl.apps.quiet import hush, notes
from attnctl.apps.record import control_data, line_data, versions
from attnctl.apps.tables import terminal_width
from attnctl.errors import OptionError

from .cache import Cache, hash_of_files
from .compare import Pair, compare, mean, sentences
from .montage import montage
from .report import report_text
from .tasks import Request, Task, find_task, open_task
from .trials import Outcome, Trial, run_trial, trials

__all__ = ["Order", "Result", "bench_effect", "measure", "output_base"]

Say = Callable[[str], None]
_WIDEST = 100


@dataclass(frozen=True)
class Order:
    """What the command line asks for.

    Args:
        control: the control that is judged, in text form; None for stock alone.
        against: other controls, in text form.
        model: a shipped model or a folder.
        settings: options of `tasks.Request`.
        placebo: whether to run the placebos.
        cache: whether to keep stock outputs on disk and use those that are there.
        out: folder, or base name without suffix; None for the next free default name.
        overwrite: whether files of that name may be replaced.
    """

    control: str | None
    against: tuple[str, ...]
    model: str
    settings: dict[str, Any]
    placebo: bool = True
    cache: bool = True
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Result:
    """What the bench found.

    Args:
        task: the task.
        outcomes: the arms, stock first.
        pairs: every arm against stock, and the control against every other.
        repeats: cases per prompt.
    """

    task: Task
    outcomes: tuple[Outcome, ...]
    pairs: tuple[Pair, ...]
    repeats: int


def bench_effect(order: Order, say: Say) -> None:
    """Run the bench, print the report, write the JSON file and the picture.

    Args:
        order: what to measure.
        say: is given notes for the user.

    Raises:
        AttnctlError: if something in the order cannot be done; told before anything slow.
    """
    kind, request, base = _checked(order)
    hush(say)
    task = open_task(kind, request)
    control = choose(task.model, order.control) if order.control else None
    against = [choose(task.model, text) for text in order.against]
    for chosen in (control, *against):  # refuses selectors that match nothing
        if chosen is not None:
            attnctl.patch(task.model, chosen.control).undo()
    with notes(say):
        found = measure(
            task, request, control, against, placebo=order.placebo, cache=order.cache, say=say
        )
    data = _data(order, request, found)
    head = f"{order.model}: {len(task.prompts)} {task.describe()}, seed {request.seed}"
    width = min(terminal_width(), _WIDEST)
    print(report_text(task, head, found.outcomes, found.pairs, width, found.repeats))
    print(f"\nwrote {' and '.join(_write(base, found, data, head))}")


def measure(
    task: Task,
    request: Request,
    control: Chosen | None,
    against: Sequence[Chosen] = (),
    *,
    placebo: bool = True,
    cache: bool = True,
    say: Say = lambda text: None,
) -> Result:
    """Run every arm of a task and compare them.

    Args:
        task: the task, as `tasks.open_task` returns it.
        request: what it was opened with.
        control: the control that is judged; None for stock alone.
        against: other controls.
        placebo: whether to run the control's placebos.
        cache: whether to keep stock outputs on disk and use those that are there.
        say: is given notes for the user.
    """
    kept = Cache(_facts(task, request)) if cache else None
    arms = [Trial("stock", "stock")]
    if control is not None:
        arms = trials(task, control, against, request.seed, placebo, say)
    found = [run_trial(task, arm, kept if arm.role == "stock" else None) for arm in arms]
    for outcome in found:
        _warn_idle(outcome, say)
    metric, repeats = task.figures[0].key, request.repeats
    stock, *others = found
    pairs = [compare(one, stock, metric, repeats) for one in others]
    pairs += [compare(others[0], one, metric, repeats) for one in others[1:]]
    return Result(task, tuple(found), tuple(pairs), repeats)


def _warn_idle(outcome: Outcome, say: Say) -> None:
    lines = outcome.report.lines if outcome.report else ()
    if any(not line.forwards and not line.calls for line in lines):
        say(f"{outcome.trial.name} did nothing: its options are neutral or its steps none")


# ---- checks


def _checked(order: Order) -> tuple[str, Request, Path]:
    """Return the task's kind, the request, and the files' base name."""
    if order.against and order.control is None:
        raise OptionError("--against needs a --control to compare with")
    settings = order.settings
    n, repeats = settings["n"], settings.get("repeats", 1)
    if n < 2:
        raise OptionError(f"--n {n}: an interval needs at least 2 pairs")
    if repeats < 1 or n % repeats or n // repeats < 2:
        raise OptionError(f"--repeats {repeats} must divide --n {n} and leave at least 2 prompts")
    for name, least in (("batch", 2), ("steps", 1), ("objects", 1)):
        value = settings.get(name)
        if value is not None and value < least:
            raise OptionError(f"--{name} {value} must be at least {least}")
    if not 0 <= settings.get("seed", 0) < 2**62:
        raise OptionError(f"--seed {settings['seed']} is outside 0 to 2^62 - 1")
    scale = settings.get("guidance_scale")
    if scale is not None and not abs(scale) < 1e6:
        raise OptionError(f"--guidance-scale {scale} is no usable number")
    names = [parse_control(text).name for text in (order.control, *order.against) if text]
    kind, folder = find_task(order.model)
    request = Request(model=order.model, folder=folder, **settings)
    stem = f"effect-{names[0] if names else 'stock'}-{folder.name}"
    return kind, request, output_base(order.out, order.overwrite, stem)


def output_base(out: Path | None, overwrite: bool, stem: str) -> Path:
    """Return where a bench's files go, without suffix, once it is sure they can be written.

    Args:
        out: folder, or base name without suffix; None for this folder.
        overwrite: whether files of that name may be replaced.
        stem: begin of the next free name in a folder.

    Raises:
        PictureError: if they would replace others, or cannot be written.
    """
    if out is not None and not out.expanduser().is_dir():
        base = out.expanduser()
        base = base.with_suffix("") if base.suffix in (".json", ".png") else base
        taken = [str(file) for file in _files(base) if file.exists()]
        if taken and not overwrite:
            raise PictureError(
                f"{' and '.join(taken)} would be replaced; give another --out, or --overwrite"
            )
    else:
        folder = out.expanduser() if out else Path()
        bases = (folder / f"{stem}-{i:03}" for i in count(1))
        base = next(b for b in bases if not any(file.exists() for file in _files(b)))
    check_output(_files(base)[1])
    return base


def _files(base: Path) -> tuple[Path, Path]:
    return base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.png")


# ---- files


def _machine(task: Task) -> dict[str, Any]:
    device = torch.device(getattr(task.model, "device", "cpu"))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(getattr(task.model, "dtype", "")).removeprefix("torch."),
    }


def _facts(task: Task, request: Request) -> dict[str, Any]:
    """Return everything that decides the stock outputs."""
    return {
        "format": 1,
        "task": task.name,
        "files": hash_of_files(request.folder),
        "prompts": list(task.prompts),
        "seed": request.seed,
        "batch": task.batch,
        "settings": dict(task.settings),
        "machine": _machine(task),
        "versions": versions(),
    }


def _data(order: Order, request: Request, found: Result) -> dict[str, Any]:
    """Return the record as JSON values, complete enough to be judged anew."""
    task = found.task
    control = next((o.trial for o in found.outcomes if o.trial.role == "control"), None)
    return {
        "bench": "effect",
        "model": order.model,
        "model_files": hash_of_files(request.folder),
        "task": task.name,
        "control": str(control.chosen) if control else None,
        "settings": {
            "n": len(task.prompts),
            "seed": request.seed,
            "repeats": request.repeats,
            "batch": task.batch,
            **task.settings,
        },
        "machine": _machine(task),
        "versions": versions(),
        "metric": task.figures[0].key,
        "prompts": list(task.prompts),
        "arms": [_arm_data(outcome, found.repeats) for outcome in found.outcomes],
        "pairs": [pair.data() for pair in found.pairs],
        "said": sentences(task, found.outcomes, found.pairs) if found.pairs else [],
    }


def _arm_data(outcome: Outcome, repeats: int) -> dict[str, Any]:
    trial, scores = outcome.trial, outcome.scores
    return {
        "name": trial.name,
        "role": trial.role,
        "control": control_data(trial.chosen) if trial.chosen else None,
        "seconds": round(outcome.seconds, 3),
        "cached": outcome.cached,
        "figures": {key: asdict(mean(values, repeats)) for key, values in scores.items()},
        "cases": {key: [round(v, 6) for v in values.tolist()] for key, values in scores.items()},
        "report": [line_data(line) for line in outcome.report.lines] if outcome.report else [],
    }


def _write(base: Path, found: Result, data: dict[str, Any], head: str) -> list[str]:
    """Write the files and return their names; there is no picture of stock alone."""
    text, picture = _files(base)
    _write_text(text, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    if not found.pairs:
        return [str(text)]
    stock, arm = found.outcomes[:2]
    sheet = montage(
        found.task, arm, stock, found.pairs[0], f"{data['control']} on {head}",
        data["said"][0],
    )  # fmt: skip
    short = {k: v for k, v in data.items() if k not in ("prompts", "arms")}
    write_png(sheet, picture, short)
    return [str(text), str(picture)]


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise PictureError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
