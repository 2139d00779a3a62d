"""The tasks of the effect bench, one file each, and which model has which."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from attnctl import assets
from attnctl.apps.models import first_line, local_folder

from .task import Figure, Request, Shown, Task, TaskError

__all__ = ["TASKS", "Figure", "Request", "Shown", "Task", "TaskError", "find_task", "open_task"]

TASKS = {
    "StableDiffusionPipeline": "pictures",
    "StableDiffusion3Pipeline": "pictures",
    "WanPipeline": "clips",
    "LlavaForConditionalGeneration": "answers",
}
"""File of this package by the class that the model's folder names."""

_MOST_WORDS = 4000


def find_task(model: str) -> tuple[str, Path]:
    """Return the task of a model, and the model's folder; nothing of the model is loaded.

    Args:
        model: name of a shipped model, or a folder.

    Raises:
        ModelError: if there is no such model.
        TaskError: if it has no task here.
    """
    folder = assets.path(model) if model in assets.names() else Path(model).expanduser()
    if not (folder / "config.json").is_file():
        found = local_folder(model)
        if found is None:
            raise TaskError(
                f"the model {model!r} has no task: the bench judges models trained on the shape "
                f"world, {', '.join(assets.names())} or a folder with another training of one"
            )
        folder = found
    kind = _class_of(folder)
    if kind not in TASKS:
        raise TaskError(
            f"the model {model!r} is a {kind}, for which there is no task; there are tasks for "
            f"{', '.join(TASKS)}"
        )
    words = _vocabulary(folder)
    if words > _MOST_WORDS:
        raise TaskError(
            f"the model {model!r} was not trained on the shape world (its tokenizer knows "
            f"{words} words), so that its outputs cannot be judged; use "
            f"{', '.join(assets.names())} or a folder with another training of one"
        )
    return TASKS[kind], folder


def open_task(name: str, request: Request) -> Task:
    """Load the model and return its task.

    Raises:
        TaskError: if the request cannot be met.
        ModelError: if the model cannot be loaded.
    """
    task: Task = importlib.import_module(f".{name}", __name__).open_task(request)
    return task


def _class_of(folder: Path) -> str:
    index, config = folder / "model_index.json", folder / "config.json"
    data = _json(index if index.is_file() else config)
    return str(data.get("_class_name") or next(iter(data.get("architectures") or ["unknown"])))


def _vocabulary(folder: Path) -> int:
    """Return the number of words a model's tokenizer knows; 0 if that is not to be read."""
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer.json", "tokenizer.json"):
        if (folder / name).is_file():
            data = _json(folder / name)
            words = data.get("model", {}).get("vocab", ()) if "model" in data else data
            return len(words)
    return 0


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"{path} cannot be read: {first_line(error)}") from error
    return data if isinstance(data, dict) else {}
