"""`attnctl.heatmaps`: run a pipeline as it is and return where each word was attended to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from attnctl.errors import OptionError, nearest
from attnctl.patch import Report, patch

from .heatmap import HeatMap
from .overlay import overlay
from .token_maps import TokenMaps, common

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Heatmaps", "heatmaps"]


@dataclass(frozen=True)
class Heatmaps(Mapping[str, Tensor]):
    """Maps of words, by word: [samples, height, width], for videos [samples, frames, h, w].

    A value is the share of its attention that a place of the picture gives to the word, from 0
    to 1, the mean over the heads, layers and steps that were read.

    Args:
        maps: by word.
        images: the pictures by sample and frame, empty if the run made none.
        runs: the sums they come from; with `each_head`, every head's own mean is in
            `runs[0].means()`.
        report: what was read.
    """

    maps: dict[str, Tensor]
    images: tuple[tuple[Image, ...], ...] = ()
    runs: tuple[TokenMaps, ...] = ()
    report: Report = field(default_factory=lambda: Report(()))

    def __getitem__(self, word: str) -> Tensor:
        if word not in self.maps:
            hint = nearest(word, self.maps) or f" There are: {', '.join(self.maps)}."
            raise OptionError(f"there is no map of {word!r}.{hint}")
        return self.maps[word]

    def __contains__(self, word: object) -> bool:
        return word in self.maps

    def __iter__(self) -> Any:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def overlay(
        self,
        word: str,
        sample: int = 0,
        frame: int = 0,
        image: Image | None = None,
        strength: float = 0.75,
    ) -> Image:
        """Return the map of a word over its picture; one scale for all frames of a video.

        Args:
            word: one of the words.
            sample: which picture of the batch.
            frame: which frame of a video, counted on the map's grid (every picture's is 0).
            image: another picture to lay it over; needed if the run made none.
            strength: opacity of the map in [0, 1].

        Raises:
            OptionError: if there is no such word, or no picture.
        """
        heat = self[word][sample]
        bounds = float(heat.min()), float(heat.max())
        heat = heat[frame] if heat.ndim == 3 else heat
        if image is None:
            image = self._picture(sample, frame)
        return overlay(image, heat, strength, bounds)

    def over_frame(
        self, word: str, number: int, sample: int = 0, image: Image | None = None
    ) -> Image:
        """Return the nearest map of a word over a frame of the video: maps have fewer frames.

        Args:
            word: one of the words.
            number: of the frame, counted on the video.
            sample: which video of the batch.
            image: another picture to lay it over, such as a smaller one.

        Raises:
            OptionError: if there is no such word, or the run made no pictures.
        """
        frames = self._frames(sample)
        image = frames[number] if image is None else image
        return self.overlay(word, sample, _nearest(number, len(frames), self.grid_frames), image)

    @property
    def grid_frames(self) -> int:
        """Frames of the maps: 1 of pictures, for videos fewer than they have themselves."""
        first = next(iter(self.maps.values()))
        return int(first.shape[1]) if first.ndim == 4 else 1

    def _picture(self, sample: int, frame: int) -> Image:
        frames = self._frames(sample)
        return frames[_nearest(frame, self.grid_frames, len(frames))]

    def _frames(self, sample: int) -> tuple[Image, ...]:
        if not self.images:
            raise OptionError(
                "this run made no pictures (output_type); give one: overlay(word, image=...)"
            )
        return self.images[sample]

    def save(self, folder: str | Path) -> list[Path]:
        """Write the maps as `maps.npz` and, if there are pictures, each overlay as PNG.

        Of videos there is a PNG for each frame of the maps.

        Args:
            folder: made if it is not there. Files of the same names are replaced.

        Returns:
            The files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / "maps.npz"]
        arrays: dict[str, Any] = {word: heat.numpy() for word, heat in self.maps.items()}
        np.savez_compressed(files[0], **arrays)
        for sample in range(len(self.images)):
            for i, word in enumerate(self.maps):
                name = re.sub(r"\W+", "-", word).strip("-")
                for frame in range(self.grid_frames):
                    number = f"-{frame:03}" if self.grid_frames > 1 else ""
                    files.append(folder / f"{sample:03}-{i}-{name}{number}.png")
                    self.overlay(word, sample, frame).save(files[-1])
        return files


def _nearest(i: int, n: int, m: int) -> int:
    """Return which of m frames lies nearest to frame i of n over the same time."""
    return round(i * (m - 1) / max(1, n - 1))


def heatmaps(
    pipe: Any,
    prompt: str | list[str],
    words: Any = None,
    *,
    heads: Any = "all",
    start: float = 0.0,
    stop: float = 1.0,
    each_head: bool = False,
    size: tuple[int, int] | None = None,
    **call: Any,
) -> Heatmaps:
    """Run a pipeline and return where in its pictures each word was attended to.

    The pictures are those of the same call without it, bit for bit. Controls that are patched
    already take part.

    Args:
        pipe: a diffusers pipeline.
        prompt: the prompt, or a list of prompts that all have the words.
        words: as in `attnctl.find_words`: phrases of the prompt, "cat#2", positions, a
            mapping; None for the concepts of the prompt.
        heads: selector of cross- and joint-attention sites.
        start: fraction of the run at which reading begins.
        stop: fraction of the run at which it ends.
        each_head: keep the maps of every head too, in `Heatmaps.runs`.
        size: (height, width) of the maps; None for the finest grid there is.
        **call: arguments of the pipeline's call.

    Raises:
        OptionError: if a word is missing, ambiguous or cut off.
        HostError: if the model's tokens cannot be told apart, or nothing was read.
        SelectorError: if the selector matches nothing.
    """
    runs: list[TokenMaps] = []
    control = HeatMap(words, runs.append, heads, each_head, start=start, stop=stop)
    if control.neutral:
        raise OptionError(f"no step lies between start={start:g} and stop={stop:g}")
    with patch(pipe, control) as handle:
        out = pipe(prompt=prompt, **call)[0]
        report = handle.report()
    maps = common(runs, size)
    maps = maps[:, :, 0] if maps.shape[2] == 1 else maps
    named = {word: maps[:, i] for i, word in enumerate(runs[0].words)}
    return Heatmaps(named, _pictures(out), tuple(runs), report)


def _pictures(out: Any) -> tuple[tuple[Image, ...], ...]:
    """Return a pipeline's pictures or clips as Pillow pictures, nothing for latents."""
    from PIL import Image as Pictures

    if isinstance(out, np.ndarray) and out.ndim in (4, 5) and out.shape[-1] == 3:
        pixels = (np.clip(out, 0, 1) * 255).round().astype(np.uint8)
        pixels = pixels if out.ndim == 5 else pixels[:, None]
        return tuple(tuple(map(Pictures.fromarray, clip)) for clip in pixels)
    if not isinstance(out, list):
        return ()
    clips = [one if isinstance(one, list) else [one] for one in out]
    real = all(isinstance(frame, Pictures.Image) for clip in clips for frame in clip)
    return tuple(map(tuple, clips)) if real else ()
