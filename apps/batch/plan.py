"""The plan of a batch on a loaded model: what is called with what, under which key and name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import attnctl
from attnctl.errors import AttnctlError

from ..chosen import Chosen, choose
from ..fingerprint import fingerprint
from ..generate import call_arguments, makes_videos, recommended
from ..models import find_folder, model_name
from ..record import control_data, versions
from .items import Item
from .key import file_stem, key_of
from .readers import JobError

__all__ = ["Planned", "chunks", "planned"]


@dataclass(frozen=True)
class Planned:
    """One item, ready to be drawn.

    Args:
        item: what was asked for.
        arguments: keywords of the pipeline, with the prompt.
        chosen: the controls.
        key: hash of everything the result depends on.
        file: name of the result.
        group: equal for items that can be drawn in one batch.
        model_files: fingerprint of the model.
    """

    item: Item
    arguments: dict[str, Any]
    chosen: tuple[Chosen, ...]
    key: str
    file: str
    group: str
    model_files: str


class _Planner:
    """Plans items one by one, and remembers what they have in common."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.model = model_name(pipe)
        self.ending = ".mp4" if makes_videos(pipe) else ".png"
        self.common: dict[str, Any] = {
            "model": fingerprint(find_folder(self.model)),
            "dtype": str(pipe.dtype),
            "device": pipe.device.type,
            "versions": versions(),
        }
        self.stacks: dict[tuple[str, ...], tuple[Chosen, ...]] = {}

    def plan(self, item: Item) -> Planned:
        settings = recommended(item.settings, self.model)
        arguments = call_arguments(self.pipe, item.prompt, settings)
        chosen = self._stack(item.controls)
        controls = [{**control_data(one), "preset": None} for one in chosen]
        shape = {k: v for k, v in arguments.items() if k not in ("prompt", "negative_prompt")}
        shape |= {"negative": "negative_prompt" in arguments, "controls": controls}
        key = key_of(
            {
                **self.common,
                "arguments": arguments,
                "controls": controls,
                "seed": settings.seed,
                "fps": settings.fps,
                "name": item.name,
            }
        )
        file = file_stem(item, key) + self.ending
        item = dataclasses.replace(item, settings=settings)
        group = json.dumps(shape, sort_keys=True)
        return Planned(item, arguments, chosen, key, file, group, self.common["model"])

    def _stack(self, texts: tuple[str, ...]) -> tuple[Chosen, ...]:
        if texts not in self.stacks:
            chosen = tuple(choose(self.pipe, text) for text in texts)
            if chosen:  # refuses selectors that match nothing before anything is drawn
                attnctl.patch(self.pipe, *(one.control for one in chosen)).undo()
            self.stacks[texts] = chosen
        return self.stacks[texts]


def planned(pipe: Any, items: Iterable[Item]) -> list[Planned]:
    """Return the plan of items, those that ask for the same result once.

    Raises:
        JobError: if the model cannot do one of them; the message names its place.
    """
    planner = _Planner(pipe)
    found: dict[str, Planned] = {}
    for item in items:
        try:
            plan = planner.plan(item)
        except AttnctlError as error:
            raise JobError(f"{item.where}: {error}") from error
        found.setdefault(plan.key, plan)
    return list(found.values())


def chunks(plan: Sequence[Planned], size: int) -> list[list[Planned]]:
    """Return the plan in batches of equal shape and settings, at most `size` items each.

    They depend on the plan alone and not on what is done already, so that a run that goes on
    draws the very batches that an uninterrupted one draws.
    """
    groups: dict[str, list[Planned]] = {}
    for one in plan:
        groups.setdefault(one.group, []).append(one)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
