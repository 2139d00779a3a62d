"""The tab for videos: stock beside controlled."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .drawing import GPU, DrawingTab, asked, cancelling, settings_of
from .told import told

__all__ = ["VideosTab"]


class VideosTab(DrawingTab):
    """Two players, one report."""

    kind = "video"

    def results(self) -> None:
        """Place the players."""
        with gr.Row():
            look: dict[str, Any] = {"interactive": False, "autoplay": True, "loop": True}
            self.stock = gr.Video(label="Stock", min_width=140, **look)
            self.controlled = gr.Video(label="Controlled", min_width=140, **look)

    def wire(self) -> None:
        """Connect the buttons."""
        out = [
            self.stock, self.controlled, self.files, self.report, self.code, self.kept,
            self.gallery,
        ]  # fmt: skip
        ran = self.run.click(self._film, [*self.inputs, self.kept], out, api_name="film", **GPU)
        cancelling(self.service, self.stop, [ran], self.report)

    @property
    def _film(self) -> Any:
        @told
        def film(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, kept: list[Any],
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Film a video, stock and with the controls of the stack."""
            settings = settings_of((negative, seed, steps, guidance, width, height, frames))
            made = self.service.draw(
                asked(request, progress, model, prompt, stack, settings), "video"
            )
            files = list(made.files.values())
            kept = self.kept_with(kept, made, prompt)
            own = made.files.get("controlled")
            return files[0], own, files, made.report, made.code, kept, kept

        return film
