"""What a visitor of the page may ask for, at most."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnctl.apps.chosen import Chosen
from attnctl.errors import OptionError

__all__ = ["Limits", "stack_lines"]

_FILE = re.compile(r"[/\\]|^~|\.(json|txt|toml|csv|pt|pth|bin|ckpt|safetensors|npy|npz)$", re.I)


@dataclass(frozen=True)
class Limits:
    """Bounds of one visitor and of the server.

    Args:
        side: height or width of a picture, in pixels.
        steps: denoising steps.
        frames: of a video.
        letters: of a prompt, a question or a stack.
        controls: in one stack.
        number: absolute value of a control's whole-number options, for they count work.
        words: of a heat map.
        heads: of which pictures are drawn one by one.
        tokens: of an answer.
        seconds: one run may take.
        waiting: runs in the queue, over all visitors.
        per_minute: runs and uploads of one visitor.
        at_once: runs of one visitor in the queue.
        upload_bytes: of an uploaded file.
        upload_pixels: of an uploaded picture.
        body_bytes: of any other request.
        folder_bytes: of everything in the output folder; the oldest files go first.
    """

    side: int = 1024
    steps: int = 50
    frames: int = 81
    letters: int = 1000
    controls: int = 4
    number: int = 1000
    words: int = 8
    heads: int = 128
    tokens: int = 128
    seconds: float = 180.0
    waiting: int = 24
    per_minute: int = 30
    at_once: int = 6
    upload_bytes: int = 8 * 2**20
    upload_pixels: int = 2**24
    body_bytes: int = 64 * 2**10
    folder_bytes: int = 2**30

    def text(self, what: str, text: str | None, needed: bool = True) -> str:
        """Return a text without blanks around it.

        Raises:
            OptionError: if it is too long, or empty though it is needed.
        """
        text = (text or "").strip()
        if len(text) > self.letters:
            raise OptionError(f"the {what} has {len(text)} letters; at most {self.letters}")
        if needed and not text:
            raise OptionError(f"the {what} is empty")
        return text

    def call(self, arguments: Mapping[str, Any]) -> None:
        """Refuse a pipeline's call that is too large, its own defaults included.

        Raises:
            OptionError: if it is.
        """
        bounds = {
            "height": self.side,
            "width": self.side,
            "num_inference_steps": self.steps,
            "num_frames": self.frames,
        }
        for key, most in bounds.items():
            value = arguments.get(key)
            if isinstance(value, (int, float)) and value > most:
                raise OptionError(f"{key}={value} is too much for this page; at most {most}")

    def control(self, chosen: Chosen) -> None:
        """Refuse options that cost too much or would name a file of the server.

        Raises:
            OptionError: if there is one.
        """
        for key, value in chosen.options.items():
            name = f"{chosen.control.name}: option {key}"
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > self.number:
                raise OptionError(f"{name}={value} is too much for this page: {self.number}")
            if isinstance(value, str):
                refuse_files(name, value)


def refuse_files(what: str, text: str) -> None:
    """Refuse a text that could be read as the name of a file.

    Raises:
        OptionError: if it could.
    """
    if _FILE.search(text):
        raise OptionError(
            f"{what} looks like the name of a file, and this page opens none: leave out slashes "
            "and file endings"
        )


def stack_lines(text: str | None, limits: Limits) -> list[str]:
    """Return the controls of a stack, one per line of a text, checked before any is made.

    Raises:
        OptionError: if there are too many, or one could name a file.
    """
    lines = [line.strip() for line in limits.text("stack", text, needed=False).splitlines()]
    lines = [line for line in lines if line]
    if len(lines) > limits.controls:
        raise OptionError(f"{len(lines)} controls; at most {limits.controls}")
    return lines
