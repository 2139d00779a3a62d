"""The tab for questions about a picture: both answers, where words look, head grid."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attnctl.apps.pictures import png_bytes
from attnctl.assets.world.pope import pope

from .drawing import GPU, asked, cancelling
from .heads_panel import HeadsPanel
from .panel import Panel
from .service import Service
from .told import told

__all__ = ["QuestionsTab"]

_EXAMPLES = 3


class QuestionsTab:
    """Picture and question on the left, both answers on the right.

    Args:
        service: the page's work.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        names = service.house.named("vlm")
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.model = gr.Dropdown(names, value=names[0], label="Model")
                self.picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None,
                    sources=["upload"], height=240, elem_id="vlm-picture",
                )  # fmt: skip
                self.question = gr.Textbox("", label="Question", elem_id="vlm-question")
                most = service.limits.tokens
                self.tokens = gr.Slider(1, most, min(32, most), step=1, label="Tokens at most")
                self.panel = Panel(service, "vlm", self.model)
                with gr.Row():
                    self.run = gr.Button("Ask", variant="primary", min_width=80)
                    self.stop = gr.Button("Cancel", variant="stop", min_width=80)
                inputs = [self.picture, self.question, self.panel.stack]
                some = gr.Examples(self._examples(), inputs, label="Examples")
                self.panel.redraw_after(some)
            with gr.Column(scale=6, min_width=300):
                with gr.Tabs():
                    with gr.Tab("Answers"):
                        self.stock = gr.Textbox(label="Stock answer", elem_id="vlm-stock")
                        self.controlled = gr.Textbox(
                            label="Controlled answer", elem_id="vlm-controlled"
                        )
                        self.file = gr.File(label="Download: answers and settings as JSON")
                    with gr.Tab("Words"):
                        self._looks()
                    with gr.Tab("Heads"):
                        self.heads = HeadsPanel(self.panel, "Draw where each head looks")
                self.report = gr.Markdown(label="Report")
                self.code = gr.Code(
                    label="The same in Python", language="python", interactive=False
                )
        self._wire()

    def _looks(self) -> None:
        gr.Markdown(
            "The answer is written with the controls of the stack. For each of its words: where "
            "the attention that predicts it lies on the image, and how much of it."
        )
        self.look = gr.Button("Map", min_width=80, elem_id="vlm-map")
        self.mapped = gr.Textbox(label="Answer", lines=2, elem_id="vlm-mapped")
        self.maps = gr.Gallery(label="Where each word looks", columns=3, elem_id="vlm-maps")
        self.sheet = gr.File(label="Download: all of them in one picture")

    def _wire(self) -> None:
        @told
        def answer(
            model: str, picture: str, question: str, tokens: float, stack: str,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Ask a question about a picture, stock and with the controls of the stack."""
            order = asked(request, progress, model, question, stack, {})
            made = self.service.answer(order, picture, tokens)
            said = made.texts
            file = made.files["record"]
            return said["stock"], said.get("controlled", ""), file, made.report, made.code

        inputs = [self.model, self.picture, self.question, self.tokens, self.panel.stack]
        out = [self.stock, self.controlled, self.file, self.report, self.code]
        ran = self.run.click(answer, inputs, out, api_name="answer", **GPU)
        looked = self.look.click(
            self._map, inputs, [self.mapped, self.maps, self.sheet, self.report, self.code],
            api_name="answer_heatmap", **GPU,
        )  # fmt: skip
        drawn = self.heads.wire(self._sketch, inputs)
        cancelling(self.service, self.stop, [ran, looked, drawn], self.report)

    @property
    def _map(self) -> Any:
        @told
        def answer_heatmap(
            model: str, picture: str, question: str, tokens: float, stack: str,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Ask a question about a picture and show where each word of the answer looks."""
            order = asked(request, progress, model, question, stack, {})
            made = self.service.map_answer(order, picture, tokens)
            over = [(made.files[word], caption) for word, caption in made.captions.items()]
            return made.texts["answer"], over, made.files["sheet"], made.report, made.code

        return answer_heatmap

    @property
    def _sketch(self) -> Any:
        @told
        def answer_heads(
            model: str, picture: str, question: str, tokens: float, stack: str,
            chosen: list[Any], request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Ask a question about a picture and show where each head looks."""
            order = asked(request, progress, model, question, stack, {})
            grid = self.service.look_heads(order, picture, tokens)
            return grid, grid.picture(chosen)

        return answer_heads

    def _examples(self) -> list[list[Any]]:
        """Return photos of the shape world with a question each."""
        cases = pope("adversarial", n_images=_EXAMPLES, seed=0)
        photos = {case.photo.image.tobytes(): case for case in reversed(cases)}
        guest = self.service.house.guest(self.model.value, "vlm")
        stacks = ["", *guest.presets]
        rows = []
        for i, case in enumerate(photos.values()):
            path = self.service.shelf.put(png_bytes(case.image, {}), "example.png")
            rows.append([path, case.question, stacks[i % len(stacks)]])
        return rows
