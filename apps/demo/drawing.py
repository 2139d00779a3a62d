"""What the tabs for pictures and for videos share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from .house import Kind
from .panel import Panel
from .service import Asked, Made, Service
from .told import told

if TYPE_CHECKING:
    from .heads_panel import HeadsPanel

__all__ = [
    "GPU",
    "PRIVATE",
    "WORDS",
    "DrawingTab",
    "asked",
    "cancelling",
    "session_of",
    "settings_of",
]

GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}
"""Of every event that runs a model: they share one place."""
PRIVATE: dict[str, Any] = {"queue": False, "api_visibility": "private"}
WORDS = "Separated by commas; empty: the things that the prompt names."
_KEPT = 24
PROMPTS = {
    "image": ["a red circle and a blue square", "a blue ring and an orange triangle"],
    "video": ["a red circle moving left slowly", "a blue square moving up"],
}


def asked(
    request: Any, progress: Any, model: Any, text: Any, stack: Any, settings: dict[str, Any]
) -> Asked:
    """Return what a visitor asks for; the progress goes to the page."""

    def tell(name: str, done: int, total: int) -> None:
        progress((done, max(total, done)), desc=name, unit="steps")

    return Asked(session_of(request), tell, model, text, stack, settings)


def session_of(request: Any) -> str:
    """Return the name of a visitor's page."""
    return str(getattr(request, "session_hash", None) or id(request))


def cancelling(service: Service, button: gr.Button, events: list[Any], said: Any) -> None:
    """Let a button end what its visitor runs, and what waits; `said` tells it.

    Not through the queue, which may be full.
    """

    def cancel(request: gr.Request) -> str:
        """End this visitor's runs."""
        return "Cancelled." if service.cancel(session_of(request)) else "Nothing was running."

    button.click(
        cancel, None, said, cancels=events, queue=False, api_name="cancel",
        api_visibility="undocumented",
    )  # fmt: skip


class DrawingTab:
    """Prompt, settings, stack and buttons; subclasses show what comes out.

    Args:
        service: the page's work.
    """

    kind: Kind = "image"
    endpoints: tuple[str, str] = "", ""
    look: gr.Button
    words: gr.Textbox
    heads: HeadsPanel

    def __init__(self, service: Service) -> None:
        self.service = service
        names = service.house.named(self.kind)
        usual = self._usual(names[0])
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                self.model = gr.Dropdown(names, value=names[0], label="Model")
                self.prompt = gr.Textbox(
                    PROMPTS[self.kind][0], label="Prompt", lines=2, elem_id=f"{self.kind}-prompt"
                )
                with gr.Accordion("Settings", open=False):
                    self._settings(usual)
                self.panel = Panel(service, self.kind, self.model)
                with gr.Row():
                    self.run = gr.Button("Run", variant="primary", min_width=80)
                    self.stop = gr.Button("Cancel", variant="stop", min_width=80)
                inputs = [self.model, self.prompt, self.panel.stack, self.seed]
                some = gr.Examples(self._examples(names), inputs, label="Examples")
                self.panel.redraw_after(some)
            with gr.Column(scale=6, min_width=300):
                self.results()
                self.files = gr.File(
                    label="Download: the settings are inside each file",
                    file_count="multiple",
                    height=130,
                )
                self.report = gr.Markdown(label="Report", elem_id=f"{self.kind}-report")
                self.code = gr.Code(
                    label="The same in Python", language="python", interactive=False
                )
                self.kept = gr.State([], time_to_live=3600)
                self.gallery = gr.Gallery(
                    label="This visit", columns=4, height=220, elem_classes="attnctl-visit"
                )
        self.model.change(self._other, [self.model], [self.steps, self.guidance], **PRIVATE)
        self.wire()

    def _settings(self, usual: dict[str, Any]) -> None:
        limits = self.service.limits
        self.negative = gr.Textbox("", label="Negative prompt")
        with gr.Row():
            self.seed = gr.Number(0, label="Seed", minimum=0, min_width=100)
            dice = gr.Button("Random seed", min_width=100, size="sm")
        dice.click(_dice, None, self.seed, **PRIVATE)
        with gr.Row():
            self.steps = gr.Slider(
                1, limits.steps, usual["steps"], step=1, label="Steps", min_width=140,
                elem_id=f"{self.kind}-steps",
            )  # fmt: skip
            self.guidance = gr.Slider(
                0, 20, usual["guidance_scale"], step=0.1, label="Guidance scale", min_width=140
            )
        with gr.Row():
            own: dict[str, Any] = {"info": "0: the model's own", "min_width": 100}
            self.width = gr.Number(0, label="Width", **own)
            self.height = gr.Number(0, label="Height", **own)
            self.frames = gr.Number(
                usual["frames"] or 0, label="Frames", visible=self.kind == "video", **own
            )

    def _usual(self, model: Any) -> dict[str, Any]:
        guest = self.service.house.guest(model, self.kind)
        call = guest.usual
        limits = self.service.limits
        steps = min(limits.steps, call["num_inference_steps"])
        frames = call.get("num_frames")
        scale = call.get("guidance_scale", 1.0)
        return {"steps": steps, "guidance_scale": min(20.0, scale), "frames": frames}

    def _other(self, model: Any) -> tuple[int, float]:
        usual = self._usual(model)
        return usual["steps"], usual["guidance_scale"]

    @property
    def inputs(self) -> list[Any]:
        """What every run of this tab is given."""
        return [
            self.model, self.prompt, self.panel.stack, self.negative, self.seed, self.steps,
            self.guidance, self.width, self.height, self.frames,
        ]  # fmt: skip

    def results(self) -> None:
        """Place the widgets that show what came out."""
        raise NotImplementedError

    @property
    def outputs(self) -> tuple[list[Any], list[Any]]:
        """The widgets of a comparison and of heat maps."""
        raise NotImplementedError

    def compared(self, files: list[str]) -> tuple[Any, ...]:
        """Return what the widgets of a comparison show: stock first, then controlled if any."""
        raise NotImplementedError

    def mapped(self, made: Made) -> tuple[Any, ...]:
        """Return what the widgets of heat maps show."""
        raise NotImplementedError

    def wire(self) -> None:
        """Connect the buttons."""
        draw, heatmap = self.endpoints
        shown, maps = self.outputs
        out = [*shown, self.files, self.report, self.code, self.kept, self.gallery]
        ran = self.run.click(self._draw, [*self.inputs, self.kept], out, api_name=draw, **GPU)
        mapped = self.look.click(
            self._map, [*self.inputs, self.words], [*maps, self.report], api_name=heatmap, **GPU
        )
        drawn = self.heads.wire(self._sketch, self.inputs)
        cancelling(self.service, self.stop, [ran, mapped, drawn], self.report)

    @property
    def _draw(self) -> Any:
        @told
        def draw(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, kept: list[Any],
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Draw or film, stock and with the controls of the stack."""
            settings = settings_of((negative, seed, steps, guidance, width, height, frames))
            order = asked(request, progress, model, prompt, stack, settings)
            made = self.service.draw(order, self.kind)
            files, kept = list(made.files.values()), self.kept_with(kept, made, prompt)
            return *self.compared(files), files, made.report, made.code, kept, kept

        return draw

    @property
    def _map(self) -> Any:
        @told
        def heatmap(
            model: str, prompt: str, stack: str, negative: str, seed: float, steps: float,
            guidance: float, width: float, height: float, frames: float, words: str,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Any, ...]:  # fmt: skip
            """Draw or film, with a heat map of each word over the picture or the frames."""
            settings = settings_of((negative, seed, steps, guidance, width, height, frames))
            order = asked(request, progress, model, prompt, stack, settings)
            made = self.service.map_words(order, words, self.kind)
            return *self.mapped(made), made.report

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
            settings = settings_of((negative, seed, steps, guidance, width, height, frames))
            order = asked(request, progress, model, prompt, "", settings)
            grid = self.service.draw_heads(order, self.kind)
            return grid, grid.picture(chosen)

        return heads

    def kept_with(self, kept: list[Any], made: Made, text: str) -> list[Any]:
        """Return the gallery with what has been made; the oldest go."""
        new = [(path, f"{name}: {text}") for name, path in made.files.items()]
        return [*new, *kept][:_KEPT]

    def _examples(self, names: list[str]) -> list[list[Any]]:
        """Return examples for the first model: its presets, none named by hand."""
        guest = self.service.house.guest(names[0], self.kind)
        some = guest.presets[:2]
        stacks = [*some, "\n".join(some)] if len(some) > 1 else ["", *some]
        prompts = PROMPTS[self.kind]
        return [[names[0], prompts[i % len(prompts)], stack, i] for i, stack in enumerate(stacks)]


def settings_of(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the settings among the inputs of a tab; a size of 0 is the model's own."""
    keys = ("negative_prompt", "seed", "steps", "guidance_scale", "width", "height", "frames")
    settings = dict(zip(keys, values, strict=True))
    return {k: None if k in ("width", "height", "frames") and v == 0 else v
            for k, v in settings.items()}  # fmt: skip


def _dice() -> int:
    import secrets

    return secrets.randbelow(2**31)
