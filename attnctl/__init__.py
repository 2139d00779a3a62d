"""Control attention in pretrained models without training.

    import attnctl
    attnctl.patch(pipe, attnctl.SoftPAG.for_model(pipe))

Controls are attributes of this package (`attnctl.SoftPAG`), found in the registry when they
are first asked for; `attnctl.controls()` lists them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from .records import AttentionCall, ForwardCall, Rows, Site, Spans, Step, StepCall
from .schedule import Schedule, Window
from .sites import Sites, sites

if TYPE_CHECKING:
    from .processors.guidance import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "AttentionCall",
    "AttnctlError",
    "AttnctlWarning",
    "Control",
    "ControlConflict",
    "ForwardCall",
    "Handle",
    "HostError",
    "MissingExtra",
    "OptionError",
    "Report",
    "Rows",
    "Schedule",
    "SelectorError",
    "Site",
    "Sites",
    "Spans",
    "Step",
    "StepCall",
    "Window",
    "control",
    "controls",
    "patch",
    "register",
    "sites",
]


def __getattr__(name: str) -> Any:
    if name[:1].isupper():
        for cls in controls().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'attnctl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(cls.__name__ for cls in controls().values())])
