"""From what a user calls a model to a pipeline: shipped models, folders, hub ids."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from attnctl import assets
from attnctl.errors import AttnctlError, nearest
from attnctl.hosts.adopt import original_class

__all__ = [
    "ModelError",
    "find_folder",
    "first_line",
    "load",
    "local_device",
    "local_folder",
    "model_name",
    "placed",
    "skeleton",
    "speaker_folder",
]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja"]
_DTYPES = ("float32", "float16", "bfloat16")


class ModelError(AttnctlError):
    """A model cannot be found or loaded."""


def load(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """Load a pipeline.

    Args:
        model: name of a shipped model, a folder, or a hub id.
        device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N".
        dtype: "auto" (float32 on the CPU, bfloat16 else), "float32", "float16", "bfloat16".

    Raises:
        ModelError: if that is not possible; the message says why in one line.
    """
    place, kind = placed(device, dtype)
    folder = find_folder(model)
    from diffusers import DiffusionPipeline, __version__

    # diffusers 0.40 renamed the option
    name = "dtype" if tuple(map(int, __version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    # diffusers leaves out the null entries of the index, and then misses them
    null = dict.fromkeys(name for name, entry in _parts(folder) if entry[0] is None)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, **{name: kind}, **null
        )
        pipe.register_to_config(_name_or_path=model)
        return pipe.to(place)
    except Exception as error:
        raise ModelError(f"the model {model!r} cannot be loaded: {first_line(error)}") from error


def placed(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and the number type that words such as "auto" stand for.

    Raises:
        ModelError: if there is no such device or type.
    """
    place = _device(device)
    return place, _dtype(dtype, place)


def local_device(name: str) -> str:
    """Return the device of this process among those that were launched together."""
    rank = os.environ.get("LOCAL_RANK")
    if name != "auto" or rank is None:
        return name
    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def model_name(pipe: Any) -> str:
    """Return what the user called the model that a pipeline was loaded from."""
    return str(getattr(pipe.config, "_name_or_path", "") or original_class(pipe).__name__)


def local_folder(model: str) -> Path | None:
    """Return the folder of a model on this machine; None if it may be a hub id.

    Raises:
        ModelError: if it is neither.
    """
    if model in assets.names():
        return _checked(assets.path(model))
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _checked(path)
    if path.is_file():
        raise ModelError(
            f"{model} is a file; expected a folder in diffusers' layout (with model_index.json)"
        )
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return None
    shipped = assets.names()
    raise ModelError(f"there is no model {model!r}.{nearest(model, shipped)} {_choices(shipped)}")


def find_folder(model: str, only_configs: bool = False) -> Path:
    """Return the folder of a model in diffusers' layout, fetched from the hub if need be.

    Args:
        model: name of a shipped model, a folder, or a hub id.
        only_configs: do without the weights.

    Raises:
        ModelError: if there is none.
    """
    folder = local_folder(model)
    if folder is not None:
        return folder
    try:
        return _fetch(model, only_configs)
    except Exception as error:
        raise ModelError(
            f"{model!r} is no folder here, and not to be had from the hub or its local cache "
            f"({type(error).__name__}). {_choices(assets.names())}"
        ) from error


def speaker_folder(model: str) -> Path | None:
    """Return the folder of a vision-language model on this machine; None if it is not one."""
    path = Path(assets.path(model)) if model in assets.names() else Path(model).expanduser()
    if not model or (path / "model_index.json").exists():
        return None
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return path if isinstance(config, dict) and "model_type" in config else None


def skeleton(model: str) -> Any:
    """Build a pipeline without weights, from its configuration files: seconds for any size.

    Args:
        model: as for `load`; or the folder of a vision-language model, which is then built.

    Raises:
        ModelError: if the model cannot be found or its configuration not be read.
    """
    speaker = speaker_folder(model)
    folder = speaker or find_folder(model, only_configs=True)
    import diffusers

    try:
        if speaker is not None:
            return _speaker(speaker)
        cls = getattr(diffusers, _index(folder)["_class_name"])
        with torch.device("meta"):
            parts = {name: _part(folder, name, *entry[:2]) for name, entry in _parts(folder)}
        return cls(**parts)
    except Exception as error:
        raise ModelError(
            f"the configuration of {model!r} cannot be read: {first_line(error)}"
        ) from error


def _speaker(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(str(folder)))


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text or type(error).__name__


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'model_index.json'}: {first_line(error)}") from error
    return index if isinstance(index, dict) else {}


def _parts(folder: Path) -> list[tuple[str, list[Any]]]:
    """Return the parts of a pipeline and what they are: [library, class], both may be null."""
    return [(k, v) for k, v in _index(folder).items() if isinstance(v, list) and len(v) >= 2]


def _part(folder: Path, name: str, library: str | None, class_name: str | None) -> Any:
    """Build one part: models on the meta device, tokenizers and schedulers for real."""
    if library not in ("diffusers", "transformers") or class_name is None:
        return None
    cls = getattr(importlib.import_module(library), class_name)
    if library == "diffusers" and issubclass(cls, torch.nn.Module):
        return cls.from_config(cls.load_config(str(folder), subfolder=name))
    if issubclass(cls, torch.nn.Module):
        return cls(cls.config_class.from_pretrained(str(folder), subfolder=name))
    with torch.device("cpu"):
        return cls.from_pretrained(str(folder), subfolder=name)


def _checked(folder: Path) -> Path:
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"the folder {folder} holds no diffusers pipeline: no model_index.json")
    return folder


def _fetch(model: str, only_configs: bool) -> Path:
    if only_configs:
        from huggingface_hub import snapshot_download

        return _checked(Path(snapshot_download(model, allow_patterns=_CONFIGS)))
    from diffusers import DiffusionPipeline

    return _checked(Path(DiffusionPipeline.download(model)))


def _choices(shipped: Iterable[str]) -> str:
    names = ", ".join(shipped) or "none in this installation"
    return f"Give a shipped model ({names}), a folder, or a hub id such as org/name."


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ModelError(f"there is no device {name!r}; expected auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"the device {name} is not there: torch sees {_gpus()}")
    return device


def _gpus() -> str:
    count = torch.cuda.device_count()
    return "no CUDA device" if count == 0 else f"{count} CUDA device{'s' if count > 1 else ''}"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ModelError(f"there is no dtype {name!r}; expected auto, {', '.join(_DTYPES)}")
    kind: torch.dtype = getattr(torch, name)
    return kind
