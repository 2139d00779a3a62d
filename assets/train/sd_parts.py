"""The parts of tiny-sd: a CLIP text encoder, the UNet, the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from attnctl.assets.train.clip_text import text_encoder

HEADS = 8
GROUPS = 16
LEVELS = 2


def unet(channels: Sequence[int], layers: int, width: int) -> Any:
    """UNet of SD1's kind with attention at 16x16 and 8x8, eight heads everywhere.

    Args:
        channels: of the two levels; multiples of 16.
        layers: residual and attention blocks per level on the way down, one more on the way up.
        width: of the text states.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * LEVELS,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * LEVELS,
        cross_attention_dim=width,
        attention_head_dim=HEADS,  # the number of heads, under the name it has in SD1's files
        norm_num_groups=GROUPS,
    )


def scheduler() -> Any:
    """DDIM over SD1's noise levels."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together along the pipeline's own encode path."""

    def __init__(
        self,
        words: CLIPTokenizer,
        *,
        channels: Sequence[int],
        layers: int,
        text_width: int,
        text_layers: int,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder(CLIPTextModel, words, text_width, text_layers)
        self.unet = unet(channels, layers, text_width)

    def forward(self, noisy: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """The noise ``[B, 4, 16, 16]`` seen in noisy latents.

        Args:
            noisy: ``[B, 4, 16, 16]`` latents.
            time: ``[B]`` noise levels, 0 to 999.
            ids: ``[B, 20]`` token ids.
        """
        states = self.text_encoder(ids)[0]
        noise: Tensor = self.unet(noisy, time, states, return_dict=False)[0]
        return noise
