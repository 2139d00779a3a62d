"""The zero tokens with which `WanPipeline` pads every prompt, folded into one.

The pipeline cuts the text encoder's states off after the prompt and appends zeros up to
``max_sequence_length`` (512 by default). The zeros carry no position, so they give n equal keys
in every cross-attention, and n equal keys in a softmax are one key whose logit is raised by
log n. Training with one such key is the same computation on a tenth of the keys.
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor
from torch.nn.functional import pad

from attnctl.assets.train.zeros import log_count


class FoldedPadding:
    """Cross-attention of Wan whose last text token weighs like many equal ones.

    One instance serves all layers; `weigh` is called before every pass of the transformer.
    """

    def __init__(self) -> None:
        self.log_zeros = torch.zeros(1)

    def weigh(self, count: Tensor) -> None:
        """Let the last token stand for ``count`` ``[B]`` tokens; 0 takes it out."""
        self.log_zeros = log_count(count)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Output ``[B, N, D]`` for video tokens ``[B, N, D]`` and text tokens ``[B, M, D]``.

        With two dozen keys the plain products are cheaper than a fused kernel, and they take
        the raised logit without rounding it.
        """
        q = _heads(attn, attn.norm_q(attn.to_q(hidden_states)))
        k = _heads(attn, attn.norm_k(attn.to_k(encoder_hidden_states)))
        v = _heads(attn, attn.to_v(encoder_hidden_states))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        raised = pad(self.log_zeros[:, None, None, None], (k.shape[2] - 1, 0))
        mixed = (logits + raised).softmax(-1).to(v.dtype) @ v
        out: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2).type_as(hidden_states))
        return out


def _heads(attn: WanAttention, states: Tensor) -> Tensor:
    return states.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def fold_padding(transformer: WanTransformer3DModel) -> FoldedPadding:
    """Give all cross-attentions of a transformer one `FoldedPadding` and return it."""
    folded = FoldedPadding()
    for block in transformer.blocks:
        block.attn2.set_processor(folded)
    return folded
