"""Clips from prompts: are the prompted objects there, and does each move as the prompt says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from attnctl.apps.generate import RECOMMENDED
from attnctl.apps.models import load
from attnctl.assets.world.detector import detector
from attnctl.assets.world.motion import FRAMES
from attnctl.assets.world.moving import moving_prompts
from attnctl.assets.world.watch import moved

from .pictures import pixels
from .task import Figure, Request, Shown, TaskError, chosen_kind

__all__ = ["Clips", "open_task"]

BATCH = {"cpu": 4, "cuda": 50}
USUAL: dict[str, Any] = {"steps": 12, "guidance_scale": 1.0}
"""Settings where `generate.RECOMMENDED` has none for the model."""
KINDS = ("heldout", "trained")
SIDE, MOST = 64, 2
TEXT = 32
"""Text tokens of a prompt; the pipeline's 512 cost more and are zeros."""
SHOWN = (0, FRAMES // 2, FRAMES - 1)
"""Frames that the montage shows, one under the other."""

FIGURES = (
    Figure("right", "right", "%", 100.0, 1),
    Figure("objects", "objects right", "%", 100.0, 1),
    Figure("direction", "direction right", "%", 100.0, 1),
    Figure("speed", "speed right", "%", 100.0, 1),
    Figure("score", "score", digits=3),
    Figure("flicker", "flicker", digits=4),
    Figure("saturation", "saturation", digits=3),
    Figure("malformed", "malformed", "logit"),
    Figure("clipped", "clipped", "%", 100.0),
)


def open_task(request: Request) -> Clips:
    """Load the pipeline and choose the prompts.

    Raises:
        TaskError: if there are no such prompts.
        ModelError: if the pipeline cannot be loaded.
    """
    kind, objects = chosen_kind(request, KINDS), request.objects or 1
    if objects > MOST:
        raise TaskError(f"prompts of clips name 1 or {MOST} objects, not {objects}")
    prompts = moving_prompts(
        request.n // request.repeats,
        objects,
        split="train" if kind == "trained" else "heldout",
        seed=request.seed,
    )
    return Clips(load(request.model, request.device, request.dtype), prompts, request)


class Clips:
    """A text-to-video pipeline trained on the shape world, judged by its motion judge.

    Args:
        pipe: the pipeline.
        prompts: the different prompts; they are gone through `request.repeats` times.
        request: the settings. Case i starts from noise seeded with seed + i, drawn on the CPU.
    """

    name: ClassVar[str] = "clips"
    unit: ClassVar[str] = "right clips"

    def __init__(self, pipe: Any, prompts: Sequence[str], request: Request) -> None:
        self.model, self.request = pipe, request
        self.prompts = list(prompts) * request.repeats
        self.figures = FIGURES
        self.batch = request.batch or BATCH.get(pipe.device.type, BATCH["cpu"])
        usual = {**USUAL, **RECOMMENDED.get(request.folder.name, {})}
        steps, guidance = request.steps, request.guidance_scale
        self.options = {
            "num_frames": FRAMES,
            "height": SIDE,
            "width": SIDE,
            "max_sequence_length": TEXT,
            "num_inference_steps": usual["steps"] if steps is None else steps,
            "guidance_scale": usual["guidance_scale"] if guidance is None else guidance,
        }
        self.settings: dict[str, Any] = {
            "kind": request.prompts or "heldout",
            "objects": request.objects or 1,
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
        return (
            f"{kind} prompts of {objects}, {FRAMES} frames, {s['steps']} steps, "
            f"guidance {s['guidance_scale']:g}"
        )

    def run(self, start: int, stop: int) -> np.ndarray:
        """Return uint8 [stop - start, F, 3, H, W]."""
        first = self.request.seed + start
        noise = [torch.Generator().manual_seed(first + i) for i in range(stop - start)]
        with torch.inference_mode():
            clips = self.model(
                self.prompts[start:stop], generator=noise, output_type="pt", **self.options
            ).frames
        return pixels(clips)

    def score(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the figures of the clips [n, F, 3, H, W].

        flicker: mean absolute change of a pixel from frame to frame. malformed: the detector's
        logit, mean over the frames. Saturation as for pictures.
        """
        clips = torch.from_numpy(outputs).float() / 255
        verdict = moved(clips, self.prompts)
        with torch.inference_mode():
            malformed = [detector("cpu")(clip).malformed.mean() for clip in clips]
        found = {
            "right": verdict.right,
            "objects": verdict.objects,
            "direction": verdict.direction,
            "speed": verdict.speed,
            "score": verdict.score,
            "flicker": clips.diff(dim=1).abs().mean((1, 2, 3, 4)),
            "saturation": (clips.amax(2) - clips.amin(2)).mean((1, 2, 3)),
            "malformed": torch.stack(malformed),
            "clipped": torch.from_numpy(((outputs == 0) | (outputs == 255)).mean((1, 2, 3, 4))),
        }
        return {key: value.numpy().astype(np.float64) for key, value in found.items()}

    def show(self, case: int, output: np.ndarray) -> Shown:
        """Return the first, the middle and the last frame, one under the other."""
        frames = np.concatenate([output[i] for i in SHOWN], axis=1)
        return Shown(Image.fromarray(np.ascontiguousarray(frames.transpose(1, 2, 0))))
