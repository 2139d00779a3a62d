"""The part of each tab in which heads are looked at and chosen by clicking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from .drawing import GPU, PRIVATE
from .heads import Grid, toggled
from .panel import Panel
from .stack import set_heads
from .told import told

__all__ = ["HeadsPanel"]


class HeadsPanel:
    """The grid of a model's heads, and the button that gives the chosen ones to a control.

    Args:
        panel: the stack of the tab, with its service, kind and choice of models.
        label: of the button that fills the grid with pictures.
    """

    def __init__(self, panel: Panel, label: str) -> None:
        self.panel = panel
        grid = self._plain(panel.model.value)
        gr.Markdown("Click on heads to choose them, then give them to a control of the stack.")
        self.grid, self.chosen = gr.State(grid), gr.State([])
        self.table = gr.Image(
            grid.picture(), label="Heads", show_label=False, interactive=False,
            type="pil", format="png", buttons=[], elem_id=f"{panel.kind}-heads",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            self.sketch = gr.Button(label, min_width=160)
            self.number = gr.Number(1, label="Control number", precision=0, min_width=100)
            self.give = gr.Button("Use these heads", min_width=120)

    def _plain(self, model: Any) -> Grid:
        return Grid(self.panel.service.house.guest(model, self.panel.kind).heads)

    def wire(self, handler: Callable[..., Any], inputs: list[Any]) -> Any:
        """Connect the buttons; return the event that fills the grid.

        Args:
            handler: is given the inputs and the chosen heads; returns the grid and its picture.
            inputs: of the tab's other runs.
        """
        panel, shown = self.panel, [self.grid, self.table]
        drawn = self.sketch.click(
            handler, [*inputs, self.chosen], shown, api_name=_ENDPOINTS[panel.kind], **GPU
        )
        self.table.select(_click, [self.grid, self.chosen], [self.chosen, self.table], **PRIVATE)
        panel.model.change(
            self._cleared, [panel.model], [self.grid, self.chosen, self.table], **PRIVATE
        )
        self.give.click(
            self._give, [panel.model, panel.stack, self.number, self.chosen, panel.changed],
            [panel.stack, panel.changed], **PRIVATE,
        )  # fmt: skip
        return drawn

    def _cleared(self, model: Any) -> tuple[Grid, list[Any], Any]:
        grid = self._plain(model)
        return grid, [], grid.picture()

    @property
    def _give(self) -> Any:
        @told
        def give(
            model: Any, text: str, number: int, chosen: list[Any], times: float
        ) -> tuple[str, float]:
            """Give the chosen heads to a control."""
            target = self.panel.service.house.guest(model, self.panel.kind).target
            return set_heads(text, number, chosen, target), times + 1

        return give


_ENDPOINTS = {"image": "heads", "video": "film_heads", "vlm": "answer_heads"}


def _click(grid: Grid, chosen: list[Any], place: gr.SelectData) -> tuple[list[Any], Any]:
    heads = toggled(chosen, grid.at(*place.index))
    return heads, grid.picture(heads)
