"""Presets: a control's options per real checkpoint, as data.

One TOML file per control. Each preset says which models it fits (by structure, since names
change), where its numbers come from, and whether they were published or are ours:

    [[preset]]
    name = "sd3-medium"
    denoiser = "SD3Transformer2DModel"
    layers = 24                        # numbered blocks; optional
    heads = 24                         # heads per block; optional
    width = 4096                       # of a language model's residual stream; optional
    origin = "published"               # or "ours"
    source = "arXiv 2506.10978, table 1"
    note = "what to know before use"
    options = { scale = 3.0, u = 0.25 }
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from ..errors import OptionError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Preset", "find", "presets"]


@dataclass(frozen=True)
class Preset:
    """Options of one control for one kind of model.

    Args:
        control: registry name of the control.
        name: name of the preset.
        options: option values.
        origin: "published" or "ours".
        source: where the numbers come from.
        denoiser: class name of the denoiser it fits; empty for any.
        layers: number of numbered blocks of that model, 0 for any.
        heads: heads per block, 0 for any.
        width: width of a language model's residual stream, 0 for any.
        note: what to know before use.
    """

    control: str
    name: str
    options: Mapping[str, Any]
    origin: Literal["published", "ours"]
    source: str
    denoiser: str = ""
    layers: int = 0
    heads: int = 0
    width: int = 0
    note: str = field(default="", compare=False)

    def fits(self, denoiser: str, layers: int, heads: int, width: int = 0) -> bool:
        """Whether the preset is meant for a model of this structure."""
        return (
            self.denoiser in ("", denoiser)
            and self.layers in (0, layers)
            and self.heads in (0, heads)
            and self.width in (0, width)
        )


@functools.cache
def presets(control: str) -> tuple[Preset, ...]:
    """Return the presets of a control, in the order of its file; empty if it has none."""
    file = resources.files(__name__).joinpath(f"{control}.toml")
    if not file.is_file():
        return ()
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    return tuple(Preset(control=control, **entry) for entry in data["preset"])


def find(control: str, target: Any, name: str | None = None) -> Preset:
    """Return the preset of a control for a model.

    Args:
        control: registry name.
        target: pipeline or denoiser.
        name: name of the preset; None for the first that fits the model.

    Raises:
        OptionError: if there is none of that name, or none fits; the message lists them.
    """
    known = presets(control)
    names = [p.name for p in known]
    if name is not None:
        for preset in known:
            if preset.name == name:
                return preset
        hint = nearest(name, names)
        raise OptionError(f"{control} has no preset {name!r}.{hint} {_list(names)}")
    structure = _structure(target)
    for preset in known:
        if preset.fits(*structure):
            return preset
    denoiser, layers, heads, _ = structure
    raise OptionError(
        f"{control} has no preset for a {denoiser} of {layers} layers with {heads} heads; give "
        f"the options yourself, or a preset by name. {_list(names)}"
    )


def _list(names: list[str]) -> str:
    return f"Presets: {', '.join(names)}." if names else "It has no presets."


def _structure(target: Any) -> tuple[str, int, int, int]:
    """Return (class, numbered blocks, heads of the first, width of a language model or 0)."""
    from ..hosts import survey, targets
    from ..hosts.adopt import original_class

    name, module = next(iter(targets(target).items()))
    sites, _ = survey(module, name)
    numbered = [s for s in sites if s.layer is not None]
    layers = 1 + max((s.layer for s in numbered if s.layer is not None), default=-1)
    text = getattr(module.config, "text_config", None)
    width = int(getattr(text, "hidden_size", 0))
    heads = numbered[0].heads if numbered else 0
    return original_class(module).__name__, layers, heads, width
