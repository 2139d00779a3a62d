"""What a control is, and the registry that finds one by name."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import pkgutil
import re
import types
import typing
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import OptionError, nearest
from .records import (
    AttentionCall,
    ForwardCall,
    LogitsCall,
    Reading,
    StepCall,
    Tokens,
    Watch,
    WrittenRow,
)
from .schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from .hosts.run import Run
    from .kernels.group_attention import Edit
    from .selectors import Selection
    from .sites import Sites

__all__ = ["Control", "control", "controls", "register"]

_NUMBER = r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_WORDS = {float: "a number", int: "a whole number", bool: "true or false", type(None): "none"}
_LOG = logging.getLogger("attnctl")
C = TypeVar("C", bound="type[Control]")
_REGISTRY: dict[str, type[Control]] = {}


@dataclasses.dataclass(frozen=True)
class Control:
    """Base of every control: a frozen dataclass of options with the planes it needs.

    A subclass overrides `attend` (around one attention primitive), `denoise` (around one
    forward of the denoiser), `between` (latents between steps) and `decode` (a language
    model's logits of the next token), any subset of them. It
    holds no run state: `begin` returns a fresh state object for each run, which comes back
    as `call.state`. The same control object can be in several patches.
    """

    name: ClassVar[str] = ""
    """Registry name."""
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    """Kinds of sites that the control admits."""
    replaces_softmax: ClassVar[bool] = False
    """True if `attend` computes the attention itself and never proceeds further in."""
    own_rows_only: ClassVar[bool] = False
    """True if `attend` only ever changes calls that hold rows which `denoise` added."""
    adds_rows: ClassVar[bool] = False
    """True if `denoise` runs extra rows or passes."""
    reads_residual: ClassVar[bool] = False
    """True if `attend` reads `call.residual` (decoders of language models)."""
    context_parallel: ClassVar[bool] = False
    """True if all planes are right where each process has some of the heads (`call.part`)."""
    extra: ClassVar[str] = ""
    """What it adds to a run in words, where the flags above do not tell."""

    @property
    def selector(self) -> Any:
        """Sites and heads, in the selector grammar."""
        return "all"

    @property
    def schedule(self) -> Schedule:
        """Steps at which the control acts."""
        return Schedule()

    @property
    def neutral(self) -> bool:
        """True if these options change nothing, so that the stock path can be taken."""
        return False

    def begin(self, run: Run, selection: Selection) -> Any:
        """Return a new state for one run (any object, None if none is needed)."""
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention plane: return the output [B, H, Nq, Dv] of one attention primitive."""
        return call.proceed()

    def written(self, call: AttentionCall) -> WrittenRow | None:
        """Return what `attend` does to all later written tokens of a prompt at this site.

        Asked, in the decoder of a language model, at the first written token, before `attend`,
        of a control that is alone at the site. None where it depends on more than the token
        itself, so that every token goes through `attend`.
        """
        return None

    def reading(self, call: AttentionCall) -> Reading | None:
        """Return what `attend` does at all sites while the same tokens are read.

        Asked, in the decoder of a language model, before `attend` in a forward that reads a
        prompt or a part of it, of a control that is alone at the first site. It saves the making
        of a call at each site, for which a decoder would wait. None if there is no shorter way.
        """
        return None

    def row_edit(self, site: int, state: Any, tokens: Tokens, rows: int) -> Edit | None:
        """Return what `attend` does to all later written tokens of a prompt, for compiled code.

        Asked, in the decoder of a language model with a static cache, once for a prompt and a
        site where this control is alone. None, with which all runs eagerly, where it is no such
        edit. A subclass that overrides `attend` overrides this too.

        Args:
            site: number of the site.
            state: what `begin` returned.
            tokens: roles of a written token and of all before it.
            rows: batch size.
        """
        return None

    def watching(self, call: AttentionCall) -> Watch | None:
        """Return what `attend` does to calls like this one, where it only looks at them.

        Asked in a denoiser, before `attend`, of a control that is alone at a site. What is
        returned then serves the site's later calls of the run, with the same rows, heads and
        grid: it saves the making of a call, for which a GPU would wait. None if there is no
        shorter way. A subclass that overrides `attend` overrides this too.
        """
        return None

    def denoise(self, call: ForwardCall) -> Tensor:
        """Denoiser plane: return the sample of one forward for the rows of the call."""
        return call.proceed()

    def between(self, call: StepCall) -> Tensor:
        """Step plane: return the latents that go into `call.step`."""
        return call.latents

    def decode(self, call: LogitsCall) -> Tensor:
        """Decode plane: return the logits [B, V] of the next token."""
        return call.proceed()

    def account(self, state: Any, steps: tuple[int, ...], sites: Sites) -> Any:
        """Return what the report of a run should add; its str goes under the control's line.

        Args:
            state: what `begin` returned for the run.
            steps: the run's steps at which the denoiser ran, this control acting or not.
            sites: all sites of the denoiser.

        Returns:
            Any small object (reports are kept), None if there is nothing to add.
        """
        return None

    def resolve(self, sites: Sites) -> Control:
        """Return this control with options that depend on the model filled in."""
        return self

    @classmethod
    def for_model(cls, target: Any, preset: str | None = None, **options: Any) -> Control:
        """Return the control with the preset that fits a pipeline or denoiser.

        Which preset it was stands in the log of the logger "attnctl" and in
        `attnctl.presets.find`.

        Args:
            target: pipeline or denoiser.
            preset: name of a preset, None for the one that matches the model.
            **options: override the preset's.

        Raises:
            OptionError: if no preset fits; the message lists what exists.
        """
        from .presets import find

        found = find(cls.name, target, preset)
        _LOG.info(
            "%s: preset %s (%s, %s) %s",
            cls.name, found.name, found.origin, found.source, found.note,
        )  # fmt: skip
        return cls(**{**found.options, **options})

    @classmethod
    def plane(cls, method: str) -> bool:
        """Whether this class overrides `attend`, `denoise`, `between` or `decode`."""
        return getattr(cls, method) is not getattr(Control, method)

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        ]
        return f"{self.name}({', '.join(changed)})"


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def register(cls: C) -> C:
    """Class decorator: make a control known by its `name`.

    Raises:
        ValueError: if the name is missing or taken by another class.
    """
    known = _REGISTRY.get(cls.name)
    if not cls.name or (known is not None and known.__qualname__ != cls.__qualname__):
        raise ValueError(f"control name {cls.name!r} is empty or taken by {known}")
    _REGISTRY[cls.name] = cls
    return cls


def controls() -> dict[str, type[Control]]:
    """Return every control class by name, in alphabetical order."""
    from . import processors

    for info in pkgutil.walk_packages(processors.__path__, processors.__name__ + "."):
        importlib.import_module(info.name)
    return dict(sorted(_REGISTRY.items()))


def control(name: str, /, **options: Any) -> Control:
    """Make a control by name.

    Args:
        name: one of `controls()`.
        **options: its options; strings are converted to the option's type, so that command
            lines and files can use the same function.

    Raises:
        OptionError: on an unknown name or option, or a value outside its range.
    """
    known = controls()
    if name not in known:
        hint = nearest(name, known) or f" Known: {', '.join(known)}."
        raise OptionError(f"there is no control {name!r}.{hint}")
    cls = known[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            raise OptionError(
                f"control {name!r} has no option {key!r}.{nearest(key, fields)} "
                f"Its options: {', '.join(sorted(fields))}"
            )
    return cls(**{k: convert(cls, k, v) for k, v in options.items()})


def convert(cls: type[Control], key: str, value: Any) -> Any:
    """Return an option's value, converted from a string to the type of its field.

    Raises:
        OptionError: if the string does not fit the type.
    """
    if not isinstance(value, str):
        return value
    hint = typing.get_type_hints(cls)[key]
    # "none" is None first, and only then a text
    for kind in sorted(_alternatives(hint), key=lambda kind: kind is not type(None)):
        try:
            return _read(kind, value)
        except ValueError:
            continue
    raise OptionError(f"{cls.name}: option {key}={value!r} is not {_describe(hint)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _read(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise ValueError(text)
        return text.lower() in ("true", "1", "yes", "on")
    if kind in (int, float):
        number = kind(text)
        if number != number:  # "nan" is no number, and would pass most range checks
            raise ValueError(text)
        return number
    if kind is type(None):
        if text.lower() != "none":
            raise ValueError(text)
        return None
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise ValueError(text)
        return text
    if typing.get_origin(kind) is tuple:
        parts = re.findall(_NUMBER, text)
        of = typing.get_args(kind)
        if "-".join(parts) != text or (of[-1] is not ... and len(parts) != len(of)):
            raise ValueError(text)
        return tuple(map(of[0] if of[-1] is ... else float, parts))
    if kind in (str, Any):
        return text
    raise ValueError(text)


def _describe(hint: Any) -> str:
    names = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            names.append("one of " + ", ".join(map(str, typing.get_args(kind))))
        elif typing.get_origin(kind) is tuple:
            of = typing.get_args(kind)
            many = "numbers joined by -"
            names.append(many if of[-1] is ... else "-".join(["number"] * len(of)))
        else:
            names.append(_WORDS.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(names)
