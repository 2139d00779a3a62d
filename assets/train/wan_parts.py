"""The parts of tiny-wan: tokenizer, UMT5 text encoder, Wan transformer, scheduler."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from attnctl.assets.train.null_t5 import null_tokenizer
from attnctl.assets.train.wan_zeros import FoldedPadding, fold_padding
from attnctl.assets.world.captions import WORDS
from attnctl.assets.world.motion import MOTION_WORDS

LENGTH = 23
LETTERS = string.ascii_letters + string.digits + string.punctuation
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_HEAD = 96, 2, 3, 32
LAYERS, HEADS, HEAD, FEED_FORWARD = 6, 3, 64, 512
SHIFT = 3.0


def tokenizer(folder: Path) -> T5TokenizerFast:
    """The prompt tokenizer, written to ``folder``: every word of the world is one token."""
    return null_tokenizer(folder, dict.fromkeys((*WORDS, *MOTION_WORDS)), LETTERS)


def tokens(words: T5TokenizerFast, prompts: Sequence[str]) -> Tensor:
    """Token ids ``[B, LENGTH]`` (int16), padded by 0."""
    made = words(list(prompts), padding="max_length", max_length=LENGTH, truncation=True)
    return torch.tensor(made["input_ids"], dtype=torch.int16)


def text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Small UMT5 encoder; its states carry the order of the words by relative positions."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=TEXT_HEAD,
        d_ff=2 * TEXT_WIDTH,
        num_layers=TEXT_LAYERS,
        num_heads=TEXT_HEADS,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = UMT5EncoderModel(config)
    model.set_attn_implementation("eager")  # two dozen tokens: no kernel is worth its conditions
    return model


def transformer(channels: int, layers: int = LAYERS) -> WanTransformer3DModel:
    """Wan 2.1's transformer: heads of 64, patch 1, so 17 frames of 64x64 are 2304 tokens."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=FEED_FORWARD,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )
    _start_as_identity(model)
    return model


def _start_as_identity(model: WanTransformer3DModel) -> None:
    """Zero the modulations and the outputs that have no gate: every block does nothing yet."""
    crossings = [block.attn2.to_out[0] for block in model.blocks]
    for layer in (model.condition_embedder.time_proj, model.proj_out, *crossings):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for part in (model, *model.blocks):
        nn.init.zeros_(part.scale_shift_table)


def scheduler(shift: float = SHIFT) -> SchedulerMixin:
    """Wan's own: UniPC over the rectified flow's times, shifted towards the noise."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
    )


def euler(shift: float = SHIFT) -> SchedulerMixin:
    """Plain Euler steps over the same times, for comparison."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


class Filmer(nn.Module):
    """Text encoder and transformer, trained together along the pipeline's own encode path."""

    def __init__(self, words: T5TokenizerFast, channels: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.text_encoder = text_encoder(len(words))
        self.transformer = transformer(channels, layers)
        self.padding: FoldedPadding | None = None

    def encode(self, ids: Tensor) -> Tensor:
        """Prompt states ``[B, LENGTH + 1, 96]``: zero after the prompt, as the pipeline pads.

        Args:
            ids: ``[B, LENGTH]`` token ids, 0 after the prompt.
        """
        there = (ids != 0)[:, None, None]
        mask = torch.zeros(there.shape, device=ids.device).masked_fill(~there, -1e9)
        states = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return nn.functional.pad(states * (ids != 0)[..., None], (0, 0, 0, 1))

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, length: Tensor) -> Tensor:
        """Velocity ``[B, C, F, 16, 16]``; call `fold` before the first time.

        Args:
            noisy: ``[B, C, F, 16, 16]`` latents.
            sigma: ``[B]`` noise levels, 0 to 1.
            ids: ``[B, LENGTH]`` token ids, 0 after the prompt.
            length: ``[B]`` tokens to which the pipeline would pad the prompt.
        """
        assert self.padding is not None
        self.padding.weigh(length - LENGTH)
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=self.encode(ids),
            return_dict=False,
        )[0]
        return velocity

    def fold(self) -> None:
        """Use the folded cross-attention of `wan_zeros`, which takes the number of zeros."""
        self.padding = fold_padding(self.transformer)
