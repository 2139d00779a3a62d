"""PAG: perturbed-attention guidance, the attention map of chosen heads replaced by the identity.

    O' = V                                                    (block "joint" and "image")

Joint attention has three readings of it: "joint" lets image and text queries see only
themselves (the HeadHunter paper and its code); "image" does so for image queries and leaves
text rows untouched; "image_logit" masks the image-to-image logits except the diagonal before
the softmax, so that image queries see themselves and all text (diffusers' SD3 pipeline).

References:
    Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", 2024
    (arXiv 2403.17377), section 4.

Defaults: scale 3; UNets "mid", SD3 and PixArt block 1, Sana block 0 (see the presets).
Deviation: diffusers picks layers by regular expression, so that its "blocks.1" also takes
blocks 10 to 19; here `transformer_blocks.1` is one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.kernels import attention_with_lse, merge_attention
from attnctl.records import AttentionCall

from .perturbed import PerturbedGuidance

__all__ = ["PAG", "identity_among_images"]

Block = Literal["joint", "image", "image_logit"]


def identity_among_images(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image: slice,
    text: slice,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention of image queries over {themselves} and all text keys.

    Args:
        q: [B, H, N, D] of the joint sequence.
        k: [B, H, N, D].
        v: [B, H, N, Dv].
        image: image tokens of the sequence.
        text: text tokens of the sequence.
        mask: as in scaled_dot_product_attention, over the joint sequence.
        scale: factor on the logits, None for 1/sqrt(D).

    Returns:
        softmax over the logits {s q_i.k_i, s q_i.k_t for all t}, times the values:
        [B, H, N_image, Dv]. The two parts are merged by their log-sum-exps.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qi, ki, vi = q[:, :, image], k[:, :, image], v[:, :, image]
    wide = torch.promote_types(q.dtype, torch.float32)
    own = (qi.to(wide) * ki.to(wide)).sum(-1) * scale
    part = None
    if mask is not None:
        part, own = _rows(mask, image)[..., text], _add_diagonal(own, mask, image)
    out, lse = attention_with_lse(qi, k[:, :, text], v[:, :, text], part, scale)
    return merge_attention([vi, out], [own, lse])[0]


def _rows(mask: Tensor, rows: slice) -> Tensor:
    return mask[..., rows, :] if mask.ndim >= 2 and mask.shape[-2] > 1 else mask


def _add_diagonal(own: Tensor, mask: Tensor, image: slice) -> Tensor:
    """Add a mask's entries (i, i) to the logits [B, H, N_image] of tokens with themselves."""
    entries = _rows(mask, image)[..., image]
    if entries.ndim > 1 and entries.shape[-2] == 1:
        entries = entries[..., 0, :]
    elif entries.ndim > 1:
        entries = entries.diagonal(dim1=-2, dim2=-1)
    if entries.dtype == torch.bool:
        return own.masked_fill(~entries, -torch.inf)
    return own + entries.to(own.dtype)


@register
@dataclass(frozen=True)
class PAG(PerturbedGuidance):
    """Perturbed-attention guidance.

    Args:
        block: which part of a joint map becomes the identity: "joint", "image" or
            "image_logit"; all the same where there is no text in the sequence.
        heads, scale, u, start, stop, sigmas, adaptive, convention, passes: see
            `PerturbedGuidance`.
    """

    block: Block = "joint"

    name: ClassVar[str] = "pag"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in ("joint", "image", "image_logit"):
            raise OptionError(
                f"{self.name}: block={self.block!r} is not one of joint, image, image_logit"
            )

    def perturb(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Return V, or for the image blocks V on the image rows alone."""
        if call.q.shape[2] != call.k.shape[2]:
            raise HostError(
                f"{call.site}: {call.q.shape[2]} queries on {call.k.shape[2]} keys have no "
                "identity map; choose other sites or another perturbation"
            )
        v = call.repeat_kv(call.v)
        text = call.spans.queries("text") if call.site.kind == "joint" else None
        if self.block == "joint" or (text is None and call.site.kind == "self"):
            return v
        image = _images(call)
        result = out.clone()
        if self.block == "image" or text is None:
            result[:, :, image] = v[:, :, image]
        else:
            result[:, :, image] = identity_among_images(
                call.q, call.repeat_kv(call.k), v, image, text, call.mask, call.scale
            )
        return result


def _images(call: AttentionCall) -> slice:
    image = call.spans.queries("image")
    if image is None:
        raise HostError(
            f"{call.site}: which tokens are image tokens is not known for this model; "
            'use block="joint"'
        )
    ref = call.spans.queries("ref")
    return slice(image.start, image.stop if ref is None else ref.stop)
