"""Pictures from prompts: is every prompted object there, nothing else, and nothing malformed?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attnctl.apps.generate import RECOMMENDED
from attnctl.apps.models import load
from attnctl.assets.world import (
    detector,
    exact,
    heldout_prompts,
    log_prob,
    parse,
    trained_prompts,
)

from .task import Figure, Request, Shown, TaskError, chosen_kind

__all__ = ["Pictures", "diversity", "judged", "open_task", "pixels"]

BATCH = {"cpu": 20, "cuda": 200}
OWN: dict[str, dict[str, Any]] = {
    # without classifier-free guidance the model fails most and a step costs half
    "tiny-sd3": {"steps": 12, "guidance_scale": 1.0},
}
"""Settings where the model's usual ones are not the best to measure with."""
SILENT = 16
"""Tokens of SD3's third text encoder, which says nothing here: 256 would double the cost."""
KINDS = ("heldout", "trained")
MOST = 3

FIGURES = (
    Figure("exact", "exact", "%", 100.0, 1),
    Figure("log_prob", "log-probability"),
    Figure("saturation", "saturation", digits=3),
    Figure("malformed", "malformed", "logit"),
    Figure("miscounted", "objects off"),
    Figure("clipped", "clipped", "%", 100.0),
)
DIVERSITY = Figure("diversity", "diversity", digits=3)


def open_task(request: Request) -> Pictures:
    """Load the pipeline and choose the prompts.

    Raises:
        TaskError: if there are no such prompts.
        ModelError: if the pipeline cannot be loaded.
    """
    kind, objects = chosen_kind(request, KINDS), request.objects or 2
    least = 2 if kind == "heldout" else 1
    if not least <= objects <= MOST:
        raise TaskError(
            f"{kind} prompts name {least} to {MOST} objects, not {objects}: give another "
            f"--objects{' or --prompts trained' if objects == 1 else ''}"
        )
    choose = heldout_prompts if kind == "heldout" else trained_prompts
    prompts = choose(request.n // request.repeats, objects, seed=request.seed)
    return Pictures(load(request.model, request.device, request.dtype), prompts, request)


class Pictures:
    """A text-to-image pipeline trained on the shape world, judged by the world's detector.

    Args:
        pipe: the pipeline.
        prompts: the different prompts; they are gone through `request.repeats` times.
        request: the settings. Case i starts from noise seeded with seed + i, drawn on the CPU.
    """

    name: ClassVar[str] = "pictures"
    unit: ClassVar[str] = "exact pictures"

    def __init__(self, pipe: Any, prompts: Sequence[str], request: Request) -> None:
        self.model, self.request = pipe, request
        self.prompts = list(prompts) * request.repeats
        self.figures = (*FIGURES, DIVERSITY) if request.repeats > 1 else FIGURES
        self.batch = request.batch or BATCH.get(pipe.device.type, BATCH["cpu"])
        self.options = _options(pipe, request)
        self.settings = {
            "kind": request.prompts or "heldout",
            "objects": request.objects or 2,
            "steps": self.options["num_inference_steps"],
            "guidance_scale": self.options["guidance_scale"],
            "options": self.options,
        }
        pipe.set_progress_bar_config(disable=True)

    def describe(self) -> str:
        """Return prompts, steps and guidance in words."""
        s = self.settings
        kind = {"heldout": "held-out", "trained": "trained"}[s["kind"]]
        objects = f"{s['objects']} object{'' if s['objects'] == 1 else 's'}"
        return f"{kind} prompts of {objects}, {s['steps']} steps, guidance {s['guidance_scale']:g}"

    def run(self, start: int, stop: int) -> np.ndarray:
        """Return uint8 [stop - start, 3, H, W]."""
        first = self.request.seed + start
        noise = [torch.Generator().manual_seed(first + i) for i in range(stop - start)]
        with torch.inference_mode():
            images = self.model(
                self.prompts[start:stop], generator=noise, output_type="pt", **self.options
            ).images
        return pixels(images)

    def score(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the figures of the pictures [n, 3, H, W]."""
        found = judged(torch.from_numpy(outputs).float() / 255, self.prompts)
        found["clipped"] = ((outputs == 0) | (outputs == 255)).mean((1, 2, 3))
        if self.request.repeats > 1:
            found["diversity"] = diversity(outputs, self.request.repeats)
        return found

    def show(self, case: int, output: np.ndarray) -> Shown:
        """Return the picture itself."""
        return Shown(Image.fromarray(np.ascontiguousarray(output.transpose(1, 2, 0))))


def pixels(images: Tensor) -> np.ndarray:
    """Return RGB [n, 3, H, W] in 0 to 1 as uint8, as a picture file would hold it."""
    return (images.float().clamp(0, 1) * 255).round().byte().cpu().numpy()


@torch.inference_mode()
def judged(pictures: Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what the detector says of pictures [n, 3, H, W] in 0 to 1, each float64 [n].

    exact: 1 if all that was asked for is there and nothing else. log_prob: log-probability of
    that. malformed: logit that something is. miscounted: by how many objects the number is
    wrong. Also saturation, the mean of max minus min of R, G, B.
    """
    wanted = torch.tensor([len(parse(prompt)) for prompt in prompts])
    seen = detector(pictures.device)(pictures)
    figures = {
        "exact": exact(pictures, list(prompts)),
        "log_prob": log_prob(pictures, list(prompts)),
        "saturation": (pictures.amax(1) - pictures.amin(1)).mean((1, 2)),
        "malformed": seen.malformed,
        "miscounted": (seen.number.argmax(1).cpu() - wanted).abs(),
    }
    return {key: value.cpu().numpy().astype(np.float64) for key, value in figures.items()}


def diversity(pictures: np.ndarray, repeats: int) -> np.ndarray:
    """Return for each picture its mean distance to the others of the same prompt.

    Args:
        pictures: uint8 [n, 3, H, W], the prompts gone through `repeats` times.
        repeats: pictures per prompt, at least 2.

    Returns:
        float64 [n]: root mean square difference of the pixels in 0 to 1.
    """
    flat = pictures.reshape(repeats, len(pictures) // repeats, -1).astype(np.float64) / 255
    apart = np.sqrt(((flat[:, None] - flat[None]) ** 2).mean(-1))
    return (apart.sum(0) / (repeats - 1)).reshape(-1)


def _options(pipe: Any, request: Request) -> dict[str, Any]:
    usual = {**RECOMMENDED.get(request.folder.name, {}), **OWN.get(request.folder.name, {})}
    steps = usual.get("steps", 20) if request.steps is None else request.steps
    guidance = request.guidance_scale
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": usual.get("guidance_scale", 3.0) if guidance is None else guidance,
    }
    if "text_encoder_3" in pipe.components:
        options["max_sequence_length"] = SILENT
    return options
