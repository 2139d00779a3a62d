"""The tab for pictures: slider, word heat maps, head grid."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import WORDS, DrawingTab
from .heads_panel import HeadsPanel
from .service import Made

__all__ = ["PicturesTab"]


class PicturesTab(DrawingTab):
    """Stock against controlled under a slider."""

    kind = "image"
    endpoints = "draw", "heatmap"

    def results(self) -> None:
        """Place the slider, and the tabs of heat maps and heads."""
        with gr.Tabs():
            with gr.Tab("Compare"):
                self.slider = gr.ImageSlider(
                    label="Same seed: stock left, controlled right", type="filepath",
                    interactive=False, max_height=420, elem_id="image-slider",
                )  # fmt: skip
            with gr.Tab("Heat maps"):
                with gr.Row(equal_height=True):
                    self.words = gr.Textbox("", label="Words", scale=3, min_width=160, info=WORDS)
                    self.look = gr.Button("Map", scale=1, min_width=80, elem_id="image-map")
                self.maps = gr.Gallery(
                    label="Where each word is attended to, and its greatest share",
                    columns=3, elem_id="image-maps",
                )  # fmt: skip
                self.sheet = gr.File(label="Download: all of them in one picture")
            with gr.Tab("Heads"):
                self.heads = HeadsPanel(self.panel, "Draw what each head does")

    @property
    def outputs(self) -> tuple[list[Any], list[Any]]:
        """The slider; the maps and their sheet."""
        return [self.slider], [self.maps, self.sheet]

    def compared(self, files: list[str]) -> tuple[Any, ...]:
        """Return both pictures; without controls one of them twice."""
        return ((files[0], files[-1]),)

    def mapped(self, made: Made) -> tuple[Any, ...]:
        """Return the maps with their captions, and all of them in one picture."""
        over = [(made.files[word], caption) for word, caption in made.captions.items()]
        return over, made.files["sheet"]
