"""The parts of tiny-sd3: two CLIP text encoders, the MM-DiT, the scheduler."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from attnctl.assets.train.clip_text import text_encoder
from attnctl.assets.train.zeros import FoldedZeros, log_count

WIDTHS = (128, 64)
LAYERS, HEADS, HEAD = 8, 8, 16
SHIFT = 1.0


def transformer() -> SD3Transformer2DModel:
    """SD3 transformer: 8 layers of 8 heads of 16, normalised q and k, patch 1 on 16x16x4."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(WIDTHS),
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    _start_as_identity(model)
    return model


def _start_as_identity(model: SD3Transformer2DModel) -> None:
    """Zero the modulations and the output, so that every block begins as the identity."""
    blocks = model.transformer_blocks
    gates = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*gates, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow in Euler steps, from noise at sigma 1 to the picture at 0."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


class Painter(nn.Module):
    """Text encoders and transformer, trained together along the pipeline's own encode path."""

    def __init__(self, words: CLIPTokenizer) -> None:
        super().__init__()
        kind = CLIPTextModelWithProjection
        self.text_encoder = text_encoder(kind, words, WIDTHS[0], layers=3)
        self.text_encoder_2 = text_encoder(kind, words, WIDTHS[1], layers=2)
        self.transformer = transformer()

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt states ``[B, 20 + 1, 192]`` with one zero token, and pooled states ``[B, 192]``.

        Args:
            ids: ``[B, 20]`` token ids.
        """
        both = [
            encoder(ids, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        states = torch.cat([one.hidden_states[-2] for one in both], dim=-1)
        pooled = torch.cat([one.text_embeds for one in both], dim=-1)
        return nn.functional.pad(states, (0, 0, 0, 1)), pooled

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, zeros: Tensor) -> Tensor:
        """Velocity ``[B, 4, 16, 16]``.

        Args:
            noisy: ``[B, 4, 16, 16]`` latents.
            sigma: ``[B]`` noise levels, 0 to 1.
            ids: ``[B, 20]`` token ids.
            zeros: ``[B]`` how many zero tokens stand for the missing third encoder.
        """
        states, pooled = self.encode(ids)
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            joint_attention_kwargs={"log_zeros": log_count(zeros)},
            return_dict=False,
        )[0]
        return velocity

    def fold_zeros(self) -> None:
        """Use the folded attention of `zeros`, which takes their number."""
        self.transformer.set_attn_processor(FoldedZeros())
