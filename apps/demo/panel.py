"""The part of each tab in which a stack of controls is put together."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attnctl.apps.chosen import Chosen
from attnctl.apps.controls_table import summary
from attnctl.errors import AttnctlError

from .fields import Field, fields, value_text
from .house import Kind
from .service import Service
from .stack import add, read_stack, remove, set_option
from .told import told

__all__ = ["Panel"]

_QUIET: dict[str, Any] = {
    "queue": False,
    "show_progress": "hidden",
    "api_visibility": "private",
}
_ABOUT = "One control per line, outermost first, as `attnctl generate --control` takes it."


class Panel:
    """Widgets for a stack; its truth is the text in `stack`, which the API takes as well.

    Args:
        service: the page's work.
        kind: what the tab's models make.
        model: the tab's choice of models.
    """

    def __init__(self, service: Service, kind: Kind, model: gr.Dropdown) -> None:
        self.service, self.kind, self.model = service, kind, model
        with gr.Row(equal_height=True):
            self.name = gr.Dropdown(
                self._names(model.value),
                label="Control",
                scale=3,
                min_width=160,
                elem_classes="attnctl-name",
            )
            plus = gr.Button("Add", scale=1, min_width=80, elem_id=f"{kind}-add")
        self.stack = gr.Textbox(
            "", label="Stack", info=_ABOUT, lines=2, max_lines=6, elem_id=f"{kind}-stack"
        )
        # how often the forms have to be drawn anew; not a gr.State, whose changes are told only
        # by events that go through the queue
        self.changed = gr.Number(0, visible="hidden")
        self._wire(plus)
        self._forms()

    def _names(self, model: Any) -> list[tuple[str, str]]:
        guest = self.service.house.guest(model, self.kind)
        return [(f"{name}: {summary(cls)}", name) for name, cls in guest.offered.items()]

    def _target(self, model: Any) -> Any:
        return self.service.house.guest(model, self.kind).target

    def _wire(self, plus: gr.Button) -> None:
        @told
        def append(model: Any, name: Any, text: str, times: float) -> tuple[str, float]:
            """Add the chosen control."""
            if name is None:
                raise AttnctlError("choose a control first")
            longer = add(text, str(name), self._target(model))
            read_stack(longer, self._target(model), self.service.limits)
            return longer, times + 1

        @told
        def other(model: Any) -> Any:
            """Offer what another model admits."""
            names = self._names(model)
            return gr.Dropdown(names, value=names[0][1])

        both = [self.stack, self.changed]
        plus.click(append, [self.model, self.name, *both], both, **_QUIET)
        self.model.change(other, [self.model], [self.name], **_QUIET)

    def redraw_after(self, examples: Any) -> None:
        """Draw the forms anew when an example has filled the stack."""
        examples.load_input_event.then(
            lambda times: times + 1, self.changed, self.changed, **_QUIET
        )

    def _forms(self) -> None:
        triggers = [
            self.changed.change, self.stack.blur, self.stack.submit, self.model.change
        ]  # fmt: skip

        @gr.render([self.model, self.stack], triggers, queue=False, show_progress="hidden")
        def forms(model: Any, text: str) -> None:
            """Draw a form for each control of the stack."""
            try:
                chosen = read_stack(text, self._target(model), self.service.limits)
            except AttnctlError as error:
                gr.Markdown(str(error))
                return
            for index, one in enumerate(chosen):
                self._form(index, one, is_open=index == len(chosen) - 1)

    def _form(self, index: int, one: Chosen, is_open: bool) -> None:
        name = f"{index + 1}. {one.control.name}"
        with gr.Accordion(name, open=is_open, elem_classes="attnctl-control"):
            gr.Markdown(_origin(one))
            with gr.Row():
                for field in fields(one):
                    self._widget(index, field)
            gone = gr.Button("Remove", size="sm", variant="stop", min_width=80)
            both = [self.stack, self.changed]
            gone.click(lambda text, times: (remove(text, index), times + 1), both, both, **_QUIET)

    def _widget(self, index: int, field: Field) -> None:
        widget = _component(field)

        @told
        def write(model: Any, text: str, value: Any) -> str:
            """Write the widget's value into the stack."""
            words = value_text(field.key, "" if value is None else value)
            return set_option(text, index, field.key, words, self._target(model))

        inputs = [self.model, self.stack, widget]
        event = widget.change if field.kind == "part" else widget.input
        event(write, inputs, [self.stack], trigger_mode="always_last", **_QUIET)


def _component(field: Field) -> Any:
    """Return the widget for an option."""
    about: dict[str, Any] = {"label": field.key, "info": field.about, "min_width": 200}
    about["interactive"] = True
    if field.kind == "flag":
        return gr.Checkbox(field.value, **about)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=str(field.value), **about)
    if field.kind == "whole":
        return gr.Number(field.value, precision=0, **about)
    if field.kind == "number":
        return gr.Number(field.value, **about)
    if field.kind == "part":
        return gr.Slider(0, 1, field.value, step=0.01, **about)
    return gr.Textbox(field.value, max_lines=1, **about)


def _origin(one: Chosen) -> str:
    preset = one.preset
    words = summary(type(one.control))
    if preset is None:
        return words
    return f"{words} Preset {preset.name} ({preset.origin}: {preset.source})."
