"""Control attention in pretrained models without training.

    import attnctl
    attnctl.patch(pipe, attnctl.SoftPAG.for_model(pipe))

Controls are attributes of this package (`attnctl.SoftPAG`), found in the registry when they
are first asked for; `attnctl.controls()` lists them.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .control import Control, control, controls, register
    from .errors import (
        AttnctlError,
        AttnctlWarning,
        ControlConflict,
        HostError,
        MissingExtra,
        OptionError,
        SelectorError,
    )
    from .patch import Handle, Report, patch
    from .processors.analysis import (
        AnswerMap,
        AnswerMaps,
        HeatMap,
        Heatmaps,
        Masks,
        TokenMaps,
        answer_maps,
        heatmaps,
        masks,
    )
    from .processors.guidance import *  # noqa: F403
    from .processors.headhunter import HeadHunter, HeadSet
    from .processors.latent import *  # noqa: F403
    from .processors.sparse import *  # noqa: F403
    from .processors.sparse import BlockSparse
    from .processors.steering import *  # noqa: F403
    from .processors.vlm import *  # noqa: F403
    from .processors.vlm.carving import Carved, Carver, carve
    from .processors.vlm.sink_map import SinkMap, calibrate_sink_dims, sink_map
    from .records import (
        AttentionCall,
        ForwardCall,
        LogitsCall,
        Rows,
        Site,
        Spans,
        Step,
        StepCall,
        Tokens,
    )
    from .schedule import Schedule, Window
    from .sites import Sites, sites
    from .words import Concept, Found, Phrase, concepts, find_words

__version__ = "0.1.0"

_PUBLIC = {
    "control": ("Control", "control", "controls", "register"),
    "errors": (
        "AttnctlError",
        "AttnctlWarning",
        "ControlConflict",
        "HostError",
        "MissingExtra",
        "OptionError",
        "SelectorError",
    ),
    "patch": ("Handle", "Report", "patch"),
    "processors.analysis": (
        "AnswerMap",
        "AnswerMaps",
        "HeatMap",
        "Heatmaps",
        "Masks",
        "TokenMaps",
        "answer_maps",
        "heatmaps",
        "masks",
    ),
    "processors.headhunter": ("HeadHunter", "HeadSet"),
    "processors.sparse": ("BlockSparse",),
    "processors.vlm": (
        "Carved",
        "Carver",
        "SinkMap",
        "calibrate_sink_dims",
        "carve",
        "sink_map",
    ),
    "records": (
        "AttentionCall",
        "ForwardCall",
        "LogitsCall",
        "Rows",
        "Site",
        "Spans",
        "Step",
        "StepCall",
        "Tokens",
    ),
    "schedule": ("Schedule", "Window"),
    "sites": ("Sites", "sites"),
    "words": ("Concept", "Found", "Phrase", "concepts", "find_words"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [
    "AnswerMap",
    "AnswerMaps",
    "AttentionCall",
    "AttnctlError",
    "AttnctlWarning",
    "BlockSparse",
    "Carved",
    "Carver",
    "Concept",
    "Control",
    "ControlConflict",
    "ForwardCall",
    "Found",
    "Handle",
    "HeadHunter",
    "HeadSet",
    "HeatMap",
    "Heatmaps",
    "HostError",
    "LogitsCall",
    "Masks",
    "MissingExtra",
    "OptionError",
    "Phrase",
    "Report",
    "Rows",
    "Schedule",
    "SelectorError",
    "SinkMap",
    "Site",
    "Sites",
    "Spans",
    "Step",
    "StepCall",
    "TokenMaps",
    "Tokens",
    "Window",
    "answer_maps",
    "calibrate_sink_dims",
    "carve",
    "concepts",
    "control",
    "controls",
    "find_words",
    "heatmaps",
    "masks",
    "patch",
    "register",
    "sink_map",
    "sites",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name[:1].isupper():
        from .control import controls

        for cls in controls().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'attnctl' has no attribute {name!r}")


def __dir__() -> list[str]:
    from .control import controls

    return sorted({*globals(), *__all__, *(cls.__name__ for cls in controls().values())})


class _Package(types.ModuleType):
    """Keeps the functions `control`, `patch`, `sites` from being hidden by their modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
