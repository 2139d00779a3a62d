"""Where the video lies among the tokens of a call, and how many tokens a pipeline makes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attnctl.errors import HostError, OptionError
from attnctl.hosts import is_pipeline, targets
from attnctl.hosts.adopt import original_class
from attnctl.hosts.families import family_of, frames_first_grid
from attnctl.records import AttentionCall

__all__ = ["VideoTokens", "paddings", "pipeline_grid", "video_tokens"]

_SPACE = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_TIME = (
    "vae_scale_factor_temporal",
    "vae_temporal_compression_ratio",
    "vae_temporal_scale_factor",
)


class VideoTokens(NamedTuple):
    """Tokens of one sequence.

    Args:
        frames: latent frames.
        rows: rows of tokens in a frame.
        columns: tokens in a row.
        before: other tokens in front of the video.
        after: other tokens behind it.
        padding: how many of the last tokens are no keys.
    """

    frames: int
    rows: int
    columns: int
    before: int = 0
    after: int = 0
    padding: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows, columns."""
        return self.frames, self.rows, self.columns

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    @property
    def text(self) -> int:
        """Tokens that are not of the video."""
        return self.before + self.after

    @property
    def n(self) -> int:
        """All tokens."""
        return self.frames * self.per_frame + self.text


def video_tokens(call: AttentionCall, name: str) -> VideoTokens:
    """Return where the video lies in a call of self- or joint attention.

    Args:
        call: the call.
        name: the control, for errors.

    Raises:
        HostError: if the grid is unknown, there is one frame only, or queries and keys differ.
    """
    spans, nq, nk = call.spans, call.q.shape[2], call.k.shape[2]
    video = spans.queries("image")
    if spans.grid is None or video is None or nq != nk:
        raise HostError(
            f"{name}: the (frames, height, width) of the {nq} tokens at {call.site} are not "
            "known, so that there is no telling which tokens are near in time; it serves video "
            "models whose attention sees all frames at once (docs/support.md, column grid)"
        )
    frames, high, wide = spans.grid
    if frames == 1:
        raise HostError(
            f"{name}: {call.site} attends within one frame of {high} x {wide} tokens; it drops "
            "attention between distant frames and needs a video"
        )
    return VideoTokens(frames, high, wide, video.start, nq - video.stop)


_PADDINGS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By the very mask: reading it waits for the GPU, and all layers of a forward share one."""


def paddings(call: AttentionCall, after: int, name: str) -> tuple[int, ...]:
    """Return for each batch row how many of the last keys its mask leaves out.

    Args:
        call: a call whose mask, if any, leaves out padding at the end of the text.
        after: tokens behind the video.
        name: the control, for errors.

    Raises:
        HostError: on a mask of another form.
    """
    if call.mask is None:
        return (0,) * call.q.shape[0]
    if call.mask not in _PADDINGS:
        _PADDINGS[call.mask] = _read_paddings(call.mask, call.k.shape[2], after)
    found = _PADDINGS[call.mask]
    if found is None or len(found) not in (1, call.q.shape[0]):
        raise HostError(
            f"{name}: the attention mask {list(call.mask.shape)} at {call.site} does more than "
            "leave out padding at the end of the text, which block-sparse attention cannot add"
        )
    return found if len(found) == call.q.shape[0] else found * call.q.shape[0]


def _read_paddings(mask: Tensor, keys: int, after: int) -> tuple[int, ...] | None:
    while mask.ndim < 4:
        mask = mask[None]
    if mask.shape[1:3] != (1, 1) or mask.shape[3] != keys:
        return None
    valid = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
    if mask.dtype != torch.bool and bool(((mask > -1e4) & (mask != 0)).any()):
        return None  # a bias, not a mask
    counts = valid.sum(-1)
    first = torch.arange(keys, device=mask.device) < counts[:, None]
    if not torch.equal(valid, first) or int(counts.min()) < keys - after:
        return None
    return tuple((keys - counts).tolist())


def pipeline_grid(target: Any, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
    """Return the token grid (frames, height, width) of a pipeline's videos.

    Args:
        target: a video pipeline.
        height: pixels.
        width: pixels.
        num_frames: frames of the video.

    Raises:
        OptionError: if the target is no video pipeline of a known family.
    """
    space, time = (
        next((getattr(target, n) for n in names if getattr(target, n, None)), None)
        for names in (_SPACE, _TIME)
    )
    if not is_pipeline(target) or space is None or time is None:
        raise OptionError(
            f"the token grid of a {type(target).__name__} is not known before it runs: give a "
            "video pipeline of diffusers, or leave height, width and num_frames out"
        )
    module: Any = next(iter(targets(target).values()))
    family = family_of(original_class(module))
    frames, high, wide = (num_frames - 1) // time + 1, height // space, width // space
    shape = (1, frames, 1, high, wide) if family.grid is frames_first_grid else (
        1, 1, frames, high, wide
    )  # fmt: skip
    latents = torch.empty(shape, device="meta")
    sizes = {"num_frames": frames, "height": high, "width": wide}
    grid = family.grid(module.config, {"hidden_states": latents, **sizes}).grid
    if grid is None or grid[0] == 1:
        raise OptionError(f"{num_frames} frames of {height} x {width} make the token grid {grid}")
    return grid
