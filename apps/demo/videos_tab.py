"""The tab for videos: stock beside controlled, word heat maps, head grid."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import WORDS, DrawingTab
from .heads_panel import HeadsPanel
from .service import Made

__all__ = ["VideosTab"]


class VideosTab(DrawingTab):
    """Two players, one report."""

    kind = "video"
    endpoints = "film", "film_heatmap"

    def results(self) -> None:
        """Place the players, and the tabs of heat maps and heads."""
        look: dict[str, Any] = {"interactive": False, "autoplay": True, "loop": True}
        with gr.Tabs():
            with gr.Tab("Compare"), gr.Row():
                self.stock = gr.Video(label="Stock", min_width=140, **look)
                self.controlled = gr.Video(label="Controlled", min_width=140, **look)
            with gr.Tab("Heat maps"):
                with gr.Row(equal_height=True):
                    self.words = gr.Textbox("", label="Words", scale=3, min_width=160, info=WORDS)
                    self.look = gr.Button("Map", scale=1, min_width=80, elem_id="video-map")
                self.maps = gr.Video(
                    label="Where each word is attended to", show_label=False, **look
                )
                self.sheet = gr.Image(
                    label="Frame by frame", show_label=False, interactive=False,
                    type="filepath", format="png", elem_id="video-sheet",
                )  # fmt: skip
                self.map_files = gr.File(label="Download", file_count="multiple", height=130)
            with gr.Tab("Heads"):
                self.heads = HeadsPanel(self.panel, "Draw what each head does")

    @property
    def outputs(self) -> tuple[list[Any], list[Any]]:
        """The players; the clip of maps, their sheet, and both as files."""
        return [self.stock, self.controlled], [self.maps, self.sheet, self.map_files]

    def compared(self, files: list[str]) -> tuple[Any, ...]:
        """Return both videos, without controls one."""
        return files[0], files[1] if len(files) > 1 else None

    def mapped(self, made: Made) -> tuple[Any, ...]:
        """Return the clip of maps, their sheet, and both as files."""
        clip, sheet = made.files["clip"], made.files["sheet"]
        return clip, sheet, [clip, sheet]
