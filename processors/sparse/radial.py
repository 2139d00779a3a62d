"""Radial Attention: each frame attends to others in a band that narrows with their distance.

What is kept is in `radial_mask.py`; here is the control that puts it into a video model. The
mask is the same for every head, layer and step, except for layers and steps that stay dense.

References:
    Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", NeurIPS 2025 (arXiv 2506.19852), and its released code.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import Control, register
from attnctl.errors import AttnctlWarning, OptionError
from attnctl.kernels import BlockMask, block_sparse_attention
from attnctl.records import AttentionCall, Step
from attnctl.schedule import Schedule, Window

from .radial_mask import radial_block_mask
from .radial_plan import RadialPlan, plan_for
from .shapes import VideoTokens, paddings, pipeline_grid, video_tokens

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["Radial", "RadialPlan", "SparseSteps", "radial_block_mask"]


@dataclass(frozen=True)
class SparseSteps(Schedule):
    """Steps inside the windows, without those of `dense`."""

    dense: Schedule = dataclasses.field(default_factory=lambda: Schedule(()))

    def __contains__(self, step: Step) -> bool:
        return super().__contains__(step) and step not in self.dense


@register
@dataclass(frozen=True)
class Radial(Control):
    """Block-sparse self-attention of video models.

    Args:
        decay: factor on the width of the bands, 0 to 1; the block size is the least width, so
            that small values make no difference.
        family: whose rule: "wan" (frame 0 is kept for all queries), "hunyuan" (it is not), or
            "auto" for "hunyuan" on models with joint attention and "wan" on others.
        adjacent: width between neighbouring frames in Wan's rule, "half" (published figures)
            or "full" (later code).
        dense_layers: how many of the first blocks stay dense.
        start: fraction of the run up to which all attention stays dense.
        stop: fraction of the run from which it is dense again.
        dense_steps: further windows of dense steps, such as "steps:0-12 0.9-1".
        heads: selector; the heads not named stay dense, which then costs both.
        block: size of a block: 32, 64, 128 or 256.
        backend: of `attnctl.kernels.block_sparse_attention`.
    """

    decay: float = 0.2
    family: Literal["auto", "wan", "hunyuan"] = "auto"
    adjacent: Literal["half", "full"] = "half"
    dense_layers: int = 1
    start: float = 0.25
    stop: float = 1.0
    dense_steps: str = ""
    heads: Any = "all"
    block: int = 128
    backend: str = "auto"

    name: ClassVar[str] = "radial"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    replaces_softmax: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.family not in ("auto", "wan", "hunyuan"):
            raise OptionError(
                f"{self.name}: family={self.family!r}, expected auto, wan or hunyuan"
            )
        if self.dense_layers < 0:
            raise OptionError(f"{self.name}: dense_layers={self.dense_layers}, expected 0 or more")
        rule = "wan" if self.family == "auto" else self.family
        radial_block_mask(1, 1, self.decay, rule, self.adjacent, self.block)  # checks the ranges
        _ = self.schedule

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps at which attention is sparse."""
        window = Window(self.start, self.stop)
        return SparseSteps((window,), Schedule.of(self.dense_steps))

    @property
    def neutral(self) -> bool:
        """No step is sparse."""
        return self.schedule.empty

    @classmethod
    def for_model(
        cls,
        target: Any,
        preset: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **options: Any,
    ) -> Control:
        """Return the control with the preset that fits a pipeline or denoiser.

        The size of the video is read from each call anyway. Given here, all three of it, the
        mask is built at once instead of at the first sparse step.

        Args:
            target: pipeline or denoiser.
            preset: name of a preset, None for the one that matches the model.
            height: pixels.
            width: pixels.
            num_frames: frames of the video.
            **options: override the preset's.

        Raises:
            OptionError: if no preset fits, or the size is given in part or for no pipeline.
        """
        if preset is None and getattr(target, "transformer_2", None) is not None:
            preset = "wan22-a14b" if _structure(target)[1] == 40 else None
        control = super().for_model(target, preset, **options)
        size = (height, width, num_frames)
        if any(size) and isinstance(control, Radial):
            if height is None or width is None or num_frames is None:
                raise OptionError(
                    f"radial: give height, width and num_frames together, got {size}"
                )
            control.plan(target, height=height, width=width, num_frames=num_frames)
        return control

    def plan(
        self,
        target: Any,
        *,
        height: int,
        width: int,
        num_frames: int,
        steps: int = 50,
        attention_share: float | None = None,
    ) -> RadialPlan:
        """Return what would be computed: density of each layer and step, expected speedup.

        Text tokens of joint attention are left out, since their number is known in the run.

        Args:
            target: a video pipeline.
            height: pixels.
            width: pixels.
            num_frames: frames of the video.
            steps: of the run.
            attention_share: part of a dense step's time that goes into self-attention, None
                for an estimate by operations.
        """
        frames, high, wide = pipeline_grid(target, height, width, num_frames)
        joint, layers, width_of_model = _structure(target)
        mask = self.mask(VideoTokens(frames, high * wide, 0, 0), joint)
        dense = [Step(i, steps) not in self.schedule for i in range(steps)]
        return plan_for(mask, layers, self.dense_layers, dense, width_of_model, attention_share)

    def mask(self, tokens: VideoTokens, joint: bool, padding: int = 0) -> BlockMask:
        """Return the mask of a sequence.

        Args:
            tokens: where the video lies.
            joint: whether it is joint attention, for `family="auto"`.
            padding: how many of the last tokens are no keys.
        """
        auto: Literal["wan", "hunyuan"] = "hunyuan" if joint else "wan"
        return radial_block_mask(
            tokens.frames, tokens.per_frame, self.decay,
            auto if self.family == "auto" else self.family, self.adjacent, self.block,
            before=tokens.before, after=tokens.after, padding=padding,
        )  # fmt: skip

    def begin(self, run: Run, selection: Selection) -> set[str]:
        """Return the warnings given in this run."""
        return set()

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the kept blocks; dense layers go on as they are."""
        if call.site.layer is not None and call.site.layer < self.dense_layers:
            return call.proceed()
        tokens = video_tokens(call, self.name)
        if call.is_causal:
            raise OptionError(f"{self.name}: {call.site} is causal; its mask is not")
        sparse = self._sparse(call, tokens)
        if bool(call.heads.all()):
            return sparse
        chosen = call.heads.to(sparse.device)[:, None, None]
        return torch.where(chosen, sparse, call.proceed())

    def _sparse(self, call: AttentionCall, tokens: VideoTokens) -> Tensor:
        """Return sparse attention; rows of equal padding at once."""
        padding = paddings(call, tokens.after, self.name)
        joint = call.site.kind == "joint"
        out = None
        for pad in sorted(set(padding)):
            mask = self.mask(tokens, joint, pad)
            self._warn_if_full(mask, call.state)
            rows = [i for i, p in enumerate(padding) if p == pad]
            q, k, v = (
                x if len(rows) == len(padding) else x[rows] for x in (call.q, call.k, call.v)
            )
            part = block_sparse_attention(
                q, k[:, :, : mask.nk], v[:, :, : mask.nk], mask,
                scale=call.scale, backend=self.backend,
            )  # fmt: skip
            assert isinstance(part, Tensor)
            if len(rows) == len(padding):
                return part
            out = part.new_empty((len(padding), *part.shape[1:])) if out is None else out
            out = out.index_copy(0, torch.tensor(rows, device=part.device), part)
        assert out is not None
        return out

    def _warn_if_full(self, mask: BlockMask, given: set[str] | None) -> None:
        if given is None or "full" in given or mask.density < 1:
            return
        given.add("full")
        warnings.warn(
            f"{self.name} keeps every block of {mask}: the video is too short or too small for "
            "it to save anything",
            AttnctlWarning,
            stacklevel=2,
        )


def _structure(target: Any) -> tuple[bool, int, int]:
    """Return whether a model's attention is joint, its numbered blocks and its width."""
    from attnctl.sites import sites

    found = [s for s in sites(target) if s.layer is not None and s.kind in Radial.kinds]
    layers = len({(s.denoiser, s.layer) for s in found if s.denoiser == found[0].denoiser})
    return found[0].kind == "joint", layers, found[0].heads * found[0].head_dim
