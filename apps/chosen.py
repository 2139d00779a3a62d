"""A control that was asked for: made from options, or from the preset that fits the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from attnctl.control import Control
from attnctl.errors import OptionError

from .control_syntax import control_text, parse_control

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True)
class Chosen:
    """A control, and the preset it came from (None if from plain options)."""

    control: Control
    preset: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """Every option."""
        return {f.name: getattr(self.control, f.name) for f in dataclasses.fields(self.control)}

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from the control's defaults."""
        fields = dataclasses.fields(self.control)
        return {f.name: self.options[f.name] for f in fields if self._differs(f)}

    def _differs(self, f: dataclasses.Field[Any]) -> bool:
        value = self.options[f.name]
        factory = f.default_factory
        default = f.default if factory is dataclasses.MISSING else factory()
        return value is not default and value != default

    def __str__(self) -> str:
        return control_text(self.control.name, self.changed)


def choose(target: Any, control: Control | Chosen | str) -> Chosen:
    """Return a control for a model: text without options takes the model's preset.

    Raises:
        OptionError: if the text does not describe a control.
    """
    if isinstance(control, Chosen):
        return control
    if not isinstance(control, str):
        return Chosen(control)
    plain = parse_control(control)
    if ":" in control:
        return Chosen(plain)
    from attnctl.presets import find

    try:
        preset = find(plain.name, target)
    except OptionError:
        return Chosen(plain)
    return Chosen(type(plain).for_model(target, preset.name), preset)
