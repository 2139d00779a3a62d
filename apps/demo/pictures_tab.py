"""The tab for pictures: slider, word heat maps, head grid."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import GPU, PRIVATE, DrawingTab, asked, cancelling, settings_of
from .heads import Grid, toggled
from .stack import set_heads
from .told import told

__all__ = ["PicturesTab"]


class PicturesTab(DrawingTab):
    """Stock against controlled under a slider."""

    kind = "image"

    def results(self) -> None:
        """Place the slider, and the tabs of heat maps and heads."""
        with gr.Tabs():
            with gr.Tab("Stock | controlled"):
                self.slider = gr.ImageSlider(
                    label="Same seed: stock left, controlled right", type="filepath",
                    interactive=False, max_height=420, elem_id="image-slider",
                )  # fmt: skip
            with gr.Tab("Word heat maps"):
                with gr.Row(equal_height=True):
                    self.words = gr.Textbox(
                        "", label="Words", scale=3, min_width=160,
                        info="Separated by commas; empty: the things that the prompt names.",
                    )  # fmt: skip
                    self.look = gr.Button("Map", scale=1, min_width=80, elem_id="image-map")
                self.maps = gr.Gallery(label="Where each word is attended to", columns=3)
                self.sheet = gr.File(label="Download: all of them in one picture")
            with gr.Tab("Heads"):
                self._heads()

    def _heads(self) -> None:
        grid = self._plain(self.model.value)
        gr.Markdown("Click on heads to choose them, then give them to a control of the stack.")
        self.grid, self.chosen = gr.State(grid), gr.State([])
        self.table = gr.Image(
            grid.picture(), label="Heads", interactive=False, type="pil", format="png",
            buttons=[], elem_id="image-heads",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            self.sketch = gr.Button("Draw what each head does", min_width=160)
            self.number = gr.Number(1, label="Control number", precision=0, min_width=100)
            self.give = gr.Button("Use these heads", min_width=120)

    def _plain(self, model: Any) -> Grid:
        return Grid(self.service.house.guest(model, "image").heads)

    def wire(self) -> None:
        """Connect the buttons."""
        gallery = [self.kept, self.gallery]
        out = [self.slider, self.files, self.report, self.code, *gallery]
        ran = self.run.click(self._draw, [*self.inputs, self.kept], out, api_name="draw", **GPU)
        mapped = self.look.click(
            self._map, [*self.inputs, self.words], [self.maps, self.sheet, self.report],
            api_name="heatmap", **GPU,
        )  # fmt: skip
        drawn = self.sketch.click(
            self._sketch, [*self.inputs, self.chosen], [self.grid, self.table],
            api_name="heads", **GPU,
        )  # fmt: skip
        cancelling(self.service, self.stop, [ran, mapped, drawn], self.report)
        self.table.select(_click, [self.grid, self.chosen], [self.chosen, self.table], **PRIVATE)
        self.model.change(
            self._cleared, [self.model], [self.grid, self.chosen, self.table], **PRIVATE
        )
        panel = self.panel
        self.give.click(
            self._give, [self.model, panel.stack, self.number, self.chosen, panel.changed],
            [panel.stack, panel.changed], **PRIVATE,
        )  # fmt: skip

    @property
    def _draw(self) -> Any:
        @told
        def draw(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, kept: list[Any],
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Draw a picture, stock and with the controls of the stack."""
            settings = settings_of((negative, seed, steps, guidance, width, height, None))
            made = self.service.draw(
                asked(request, progress, model, prompt, stack, settings), "image"
            )
            files = list(made.files.values())
            kept = self.kept_with(kept, made, prompt)
            return (files[0], files[-1]), files, made.report, made.code, kept, kept

        return draw

    @property
    def _map(self) -> Any:
        @told
        def heatmap(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, words: str,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Draw a picture with a heat map of each word over it."""
            settings = settings_of((negative, seed, steps, guidance, width, height, None))
            made = self.service.map_words(
                asked(request, progress, model, prompt, stack, settings), words
            )
            over = [(made.files[word], caption) for word, caption in made.captions.items()]
            return over, made.files["sheet"], made.report

        return heatmap

    @property
    def _sketch(self) -> Any:
        @told
        def heads(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, chosen: list[Any],
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Draw what the perturbation of each single head does."""
            settings = settings_of((negative, seed, steps, guidance, width, height, None))
            grid = self.service.draw_heads(asked(request, progress, model, prompt, "", settings))
            return grid, grid.picture(chosen)

        return heads

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
            target = self.service.house.guest(model, "image").target
            return set_heads(text, number, chosen, target), times + 1

        return give


def _click(grid: Grid, chosen: list[Any], place: gr.SelectData) -> tuple[list[Any], Any]:
    heads = toggled(chosen, grid.at(*place.index))
    return heads, grid.picture(heads)
