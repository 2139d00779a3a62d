"""The node pack: a node class per control, its widgets made from the control's options."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from attnctl.apps.controls_table import option_docs, papers, summary
from attnctl.control import Control, convert
from attnctl.processors.guidance.perturbed import PerturbedGuidance

from .eligible import eligible
from .patches import patched

__all__ = ["comfy_entrypoint", "node_options"]

CATEGORY = "attnctl"
_HOST_OPTIONS = ("convention", "passes", "adaptive")
"""Options of guidance that speak of a diffusers pipeline."""
_LARGE = 2**31 - 1


def node_options(cls: type[Control]) -> list[dataclasses.Field[Any]]:
    """Return the options of a control that its node offers."""
    hidden = _HOST_OPTIONS if issubclass(cls, PerturbedGuidance) else ()
    return [f for f in dataclasses.fields(cls) if f.name not in hidden]


async def comfy_entrypoint() -> Any:
    """Return ComfyUI's extension object with all nodes.

    Raises:
        ImportError: outside ComfyUI, whose `comfy_api` it needs.
    """
    from comfy_api.latest import (  # type: ignore[import-not-found, unused-ignore]
        ComfyExtension,
        io,
    )

    nodes = [_node(io, name, cls) for name, cls in eligible().items()]

    class Extension(ComfyExtension):  # type: ignore[misc, unused-ignore]
        async def get_node_list(self) -> list[type[Any]]:
            return nodes

    return Extension()


def _node(io: Any, name: str, control: type[Control]) -> type[Any]:
    """Return the node class of one control."""

    def define_schema(cls: type[Any]) -> Any:
        hints, docs = typing.get_type_hints(control), option_docs(control)
        widgets = [
            _widget(io, f, hints[f.name], docs.get(f.name, "")) for f in node_options(control)
        ]
        return io.Schema(
            node_id=f"attnctl_{name}",
            display_name=f"{name} (attnctl)",
            category=CATEGORY,
            description="\n".join([summary(control), *papers(control)]),
            inputs=[io.Model.Input("model"), *widgets],
            outputs=[io.Model.Output()],
        )

    def execute(cls: type[Any], model: Any, **options: Any) -> Any:
        read = {key: convert(control, key, value) for key, value in options.items()}
        return io.NodeOutput(patched(model, control(**read)))

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(f"Attnctl{control.__name__}", (io.ComfyNode,), methods)


def _widget(io: Any, f: dataclasses.Field[Any], hint: Any, tooltip: str) -> Any:
    """Return the widget for one option; what has no widget of its own is written as text."""
    default: Any = f.default
    if typing.get_origin(hint) is typing.Literal:
        return io.Combo.Input(
            f.name, options=list(typing.get_args(hint)), default=default, tooltip=tooltip
        )
    if hint is bool:
        return io.Boolean.Input(f.name, default=default, tooltip=tooltip)
    if hint is int:
        return io.Int.Input(f.name, default=default, min=-_LARGE, max=_LARGE, tooltip=tooltip)
    if hint is float:
        # the interface rounds to the step, and some defaults are small
        step = min(0.01, abs(default)) or 0.01
        return io.Float.Input(
            f.name, default=default, min=-1e6, max=1e6, step=step, tooltip=tooltip
        )
    text = "none" if default is None else str(default)
    return io.String.Input(f.name, default=text, tooltip=tooltip)
