"""NAG: normalised attention guidance, a negative prompt that works inside attention.

With Z+ and Z- the attention outputs under the positive and negative text tokens, at every
image query:

    Z~ = s Z+ - (s - 1) Z-
    Z^ = Z~ min(1, tau |Z+| / |Z~|)
    Z  = alpha Z^ + (1 - alpha) Z+

No second denoiser output is mixed, so it works for guidance-distilled and few-step models
too. Here the negative prompt is one more group of batch rows whose image stream is kept equal
to the positive one's: Z is written to both.

References:
    Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion
    Models", 2025 (arXiv 2505.21179), section 4.

Defaults: s 5, tau 2.5, alpha 0.25 (the official FLUX example). Norm: L2 over all selected
heads of a token, as in the official code (its text says L1). Deviations: the official code
shares the image stream of the two groups up to the attention and the MLP; here it runs for
both, which costs more and needs no model code, and stays shared only while every site is
selected. The pooled text of the negative rows is the positive prompt's; the official FLUX code
gives them the negative prompt's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control, register
from attnctl.errors import HostError, OptionError
from attnctl.records import AttentionCall, ForwardCall
from attnctl.schedule import Schedule, Window

from .heads import head_indices, is_added_branch, writable

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["NAG", "normalized_guidance"]


def normalized_guidance(
    positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float
) -> Tensor:
    """Return the guided attention output of the module docstring.

    Args:
        positive: Z+ [B, H, N, D].
        negative: Z- [B, H, N, D].
        scale: s >= 1; 1 gives Z+ back.
        tau: largest ratio |Z~| / |Z+|, norms over heads and head dim of each token.
        alpha: share of the guided output in [0, 1].
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    plus, minus = positive.to(wide), negative.to(wide)
    guided = scale * plus - (scale - 1) * minus
    norm = plus.norm(dim=(1, 3), keepdim=True)
    ratio = guided.norm(dim=(1, 3), keepdim=True) / norm.clamp_min(1e-12)
    # |Z+| = 0 leaves no direction to keep: nothing is added there
    shrink = torch.where(norm > 0, tau / ratio.clamp_min(tau), 0)
    return (alpha * guided * shrink + (1 - alpha) * plus).to(positive.dtype)


@register
@dataclass(frozen=True)
class NAG(Control):
    """Normalised attention guidance.

    Args:
        negative: the negative prompt, or for pipelines called with embeddings a dict of
            denoiser inputs such as {"encoder_hidden_states": [n or 1, T, C]}.
        heads: selector; cross- and joint-attention sites.
        scale: s >= 1; 1 is off.
        tau: bound on the growth of the output's norm, > 0.
        alpha: share of the guided output in [0, 1]; 0 is off.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
    """

    negative: str | Mapping[str, Tensor] = ""
    heads: Any = "all"
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    start: float = 0.0
    stop: float = 1.0

    name: ClassVar[str] = "nag"
    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    adds_rows: ClassVar[bool] = True
    own_rows_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key, ok, want in (
            ("scale", 1 <= self.scale < math.inf, "finite, at least 1"),
            ("tau", self.tau > 0, "above 0"),
            ("alpha", 0 <= self.alpha <= 1, "in [0, 1]"),
        ):
            if not ok:
                raise OptionError(f"{self.name}: {key}={getattr(self, key)} must be {want}")
        if not isinstance(self.negative, (str, Mapping)):
            raise OptionError(
                f"{self.name}: negative={self.negative!r} must be a prompt or a dict of tensors"
            )
        _ = self.schedule

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps at which it acts."""
        return Schedule((Window(self.start, self.stop),))

    @property
    def neutral(self) -> bool:
        """s = 1 or alpha = 0."""
        return self.scale == 1 or self.alpha == 0 or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> dict[str, Tensor]:
        """Return the denoiser's text inputs under the negative prompt."""
        if isinstance(self.negative, str):
            return run.text_inputs(self.negative)
        return dict(self.negative)

    def denoise(self, call: ForwardCall) -> Tensor:
        """Run the negative prompt's rows along, and drop their output."""
        if "cond" not in call.rows:
            return call.proceed()
        n, changes = call.rows.n, {}
        for name, value in call.state.items():
            if value.shape[0] not in (1, n):
                raise HostError(
                    f"{self.name}: negative input {name!r} has {value.shape[0]} rows, but the "
                    f"run has {n} samples; expected 1 or {n}"
                )
            changes[name] = value.expand(n, *value.shape[1:])
        return call.extend("cond", call.role, **changes).proceed()[: len(call.rows)]

    def attend(self, call: AttentionCall) -> Tensor:
        """Guide the image queries of the positive rows; keep the negative rows' equal."""
        out = call.proceed()
        cond, negative = call.slice("cond"), call.slice(call.role)
        if cond is None and negative is None:
            return out
        if cond is None or negative is None:
            raise HostError(
                f"{call.site}: {self.name} needs the positive and the negative rows in one "
                "attention call, but this model attends to one row at a time"
            )
        image = self._images(call)
        if image is None:
            return out
        heads = head_indices(call)
        plus, minus = out[cond, :, image], out[negative, :, image]
        if heads is None:
            whole = normalized_guidance(plus, minus, self.scale, self.tau, self.alpha)
        else:
            new = normalized_guidance(
                plus[:, heads], minus[:, heads], self.scale, self.tau, self.alpha
            )
            whole = plus.index_copy(1, heads, new)
        out = writable(out, call)
        out[cond, :, image] = whole
        out[negative, :, image] = whole
        return out

    def _images(self, call: AttentionCall) -> slice | None:
        """Return the queries to guide; None for the image branch of an IP-Adapter."""
        spans = call.spans
        added = call.site.kind == "joint" and is_added_branch(call)
        if added or (spans.keys("text") is None and spans.keys("ip") is not None):
            return None
        image = spans.queries("image")
        if image is None:
            raise HostError(f"{call.site}: which tokens are image tokens is not known here")
        ref = spans.queries("ref")
        return slice(image.start, image.stop if ref is None else ref.stop)
