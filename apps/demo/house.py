"""The models of the page, loaded once, and the one place on the GPU that they share."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

import attnctl
from attnctl import assets
from attnctl.apps.chosen import choose
from attnctl.apps.eval.answering import Answerer, folder
from attnctl.apps.generate import Settings, call_arguments, makes_videos, recommended
from attnctl.apps.models import ModelError, load
from attnctl.control import Control
from attnctl.errors import AttnctlError

__all__ = ["Guest", "House", "Kind"]

Kind = Literal["image", "video", "vlm"]


@dataclass(frozen=True)
class Guest:
    """A loaded model.

    Args:
        name: what the user called it.
        kind: what it makes: "image", "video", or "vlm" for answers.
        tool: the pipeline, or what asks the vision-language model.
    """

    name: str
    kind: Kind
    tool: Any

    @property
    def target(self) -> Any:
        """What controls are patched onto."""
        return self.tool.model if self.kind == "vlm" else self.tool

    @cached_property
    def offered(self) -> dict[str, type[Control]]:
        """The registered controls that this model admits, found by installing each once."""
        return {name: cls for name, cls in attnctl.controls().items() if self._admits(name)}

    def _admits(self, name: str) -> bool:
        try:
            attnctl.patch(self.target, choose(self.target, name).control).undo()
        except AttnctlError:
            return False
        return True

    @cached_property
    def presets(self) -> list[str]:
        """The offered controls that have a preset for this model, made for it first."""
        found = {name: choose(self.target, name).preset for name in self.offered}
        known = {name: preset for name, preset in found.items() if preset is not None}
        return sorted(known, key=lambda name: (known[name].layers == 0, name))

    @cached_property
    def usual(self) -> dict[str, Any]:
        """What the model is called with when nothing is asked for."""
        return call_arguments(self.tool, "", recommended(Settings(), self.name))

    @cached_property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Every (layer, head) that a selector can name."""
        found = {
            (site.layer, head)
            for site in attnctl.sites(self.target)
            for head in range(site.heads)
            if site.layer is not None
        }
        return tuple(sorted(found))


class House:
    """The models of a page.

    Args:
        names: shipped models, folders or hub ids; none for all that are shipped.
        device: as in `apps.models.load`.
        dtype: as there.

    Raises:
        ModelError: if one cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str] = (), device: str = "auto", dtype: str = "auto"
    ) -> None:
        chosen = dict.fromkeys(names or assets.names())
        self.guests = {name: _load(name, device, dtype) for name in chosen}
        self.slot = threading.Lock()
        """Held while a model runs: patches and memory are shared, so runs take turns."""

    def named(self, kind: Kind) -> list[str]:
        """Return the names of the models that make one thing."""
        return [name for name, guest in self.guests.items() if guest.kind == kind]

    def guest(self, name: Any, kind: Kind) -> Guest:
        """Return a model of this page.

        Raises:
            ModelError: if it has none of this name and kind.
        """
        if name not in self.named(kind):
            raise ModelError(f"there is no such model here; there are: {self.named(kind)}")
        return self.guests[name]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the place on the GPU for as long as the block lasts."""
        with self.slot:
            try:
                yield
            finally:
                # cuBLAS keeps tens of MiB for every thread that ever ran a model, and the
                # server has many threads
                if torch.cuda.is_initialized():
                    torch._C._cuda_clearCublasWorkspaces()


def _load(name: str, device: str, dtype: str) -> Guest:
    if _is_vlm(name):
        return Guest(name, "vlm", Answerer.load(name, device, dtype))
    pipe = load(name, device, dtype)
    return Guest(name, "video" if makes_videos(pipe) else "image", pipe)


def _is_vlm(name: str) -> bool:
    """Whether a model is one of transformers; hub ids are looked up."""
    try:
        place = folder(name)
    except ModelError:
        return False
    if place is not None:
        return not (place / "model_index.json").is_file()
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(name, "config.json")
        with open(file, encoding="utf-8") as config:
            return "vision_config" in json.load(config)
    except Exception:  # offline, no such file, no such model: `load` says what is wrong
        return False
