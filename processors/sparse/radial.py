"""Radial Attention: each frame attends to others in a band that narrows with their distance.

What is kept is in `radial_mask.py`; here is the control that puts it into a video model. The
mask is the same for every head, layer and step, except for layers and steps that stay dense.

References:
    Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", NeurIPS 2025 (arXiv 2506.19852), and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnctl.control import Control, register
from attnctl.errors import OptionError
from attnctl.records import Step

from .radial_mask import radial_block_mask
from .radial_plan import RadialPlan, plan_for
from .shapes import VideoTokens, pipeline_grid
from .sparse import Pattern, SparseAttention

__all__ = ["Radial", "RadialPlan", "radial_block_mask"]


@register
@dataclass(frozen=True)
class Radial(SparseAttention):
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
    block: int = 128

    name: ClassVar[str] = "radial"

    def __post_init__(self) -> None:
        if self.family not in ("auto", "wan", "hunyuan"):
            raise OptionError(
                f"{self.name}: family={self.family!r}, expected auto, wan or hunyuan"
            )
        super().__post_init__()
        rule = "wan" if self.family == "auto" else self.family
        radial_block_mask(1, 1, self.decay, rule, self.adjacent, self.block)  # checks the ranges

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
        mask, _ = self.pattern(VideoTokens(frames, high, wide), joint)
        dense = [Step(i, steps) not in self.schedule for i in range(steps)]
        return plan_for(mask, layers, self.dense_layers, dense, width_of_model, attention_share)

    def pattern(self, tokens: VideoTokens, joint: bool) -> Pattern:
        """Return the mask of a sequence.

        Args:
            tokens: where the video lies, and how many of the last tokens are no keys.
            joint: whether it is joint attention, for `family="auto"`.
        """
        auto: Literal["wan", "hunyuan"] = "hunyuan" if joint else "wan"
        mask = radial_block_mask(
            tokens.frames, tokens.per_frame, self.decay,
            auto if self.family == "auto" else self.family, self.adjacent, self.block,
            before=tokens.before, after=tokens.after, padding=tokens.padding,
        )  # fmt: skip
        return Pattern(mask)


def _structure(target: Any) -> tuple[bool, int, int]:
    """Return whether a model's attention is joint, its numbered blocks and its width."""
    from attnctl.sites import sites

    found = [s for s in sites(target) if s.layer is not None and s.kind in Radial.kinds]
    layers = len({(s.denoiser, s.layer) for s in found if s.denoiser == found[0].denoiser})
    return found[0].kind == "joint", layers, found[0].heads * found[0].head_dim
