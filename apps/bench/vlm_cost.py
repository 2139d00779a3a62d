"""What controls of a vision-language model's decoder cost, side by side in one run.

    python -m attnctl.apps.bench.vlm_cost --model llava-1.5-7b --out cost.json

Decoders of real shape with random weights read a prompt with as many image tokens as the real
model has, and write. The vision tower is left out, so that the ratios here are those of the
decoder alone: it costs the same in every arm. With --tower it is there, in its real shape, and
reading begins with a picture's pixels, as it does for a user.

Every round runs all arms, in an order of its own; times are medians of the rounds, and so are
ratios, each to stock in the same round, with the 95 % bootstrap interval of that median. Beside
them the ratio of the least times of all rounds: what is left when the machine had nothing else to
do. The arms:

- stock: the model on sdpa;
- neutral: patched with controls whose options are off;
- pai, var: patched; of the image tokens about one in fifty counts as a sink for VAR;
- eager: the stock model with eager attention that returns its maps, which is what methods do
  that edit maps.

To read: tokens a second of writing, milliseconds of reading, peak memory, each against stock.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import attnctl

from .statistics import median_interval

__all__ = ["MODELS", "Shape", "chosen", "measure"]

BEFORE, AFTER = 35, 60
"""Text tokens before and after the image."""

SINK_DIMS, SPIKE, TAU = (0, 1), 100.0, 5.0
"""Where sinks have spikes, how large, and the least phi of a sink."""


@dataclass(frozen=True)
class Shape:
    """A decoder.

    Args:
        kind: model class of transformers, without "ForConditionalGeneration".
        text: its decoder's configuration.
        image: id of the image token.
        tokens: image tokens of a prompt.
        eyes: its vision tower's configuration (CLIP); empty where there is no bench with it.
    """

    kind: str
    text: dict[str, Any]
    image: int
    tokens: int
    eyes: dict[str, Any] = field(default_factory=dict)


_LLAMA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
_QWEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
}
_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MODELS = {
    "llava-1.5-7b": Shape("Llava", _LLAMA, 32000, 576, _CLIP),
    "llava-next-7b": Shape("LlavaNext", _LLAMA, 32000, 2880),
    "qwen2.5-vl-7b": Shape("Qwen2_5_VL", _QWEN, 151655, 8000),
    "small": Shape(
        "Llava", {**_LLAMA, **_SMALL}, 32000, 576, {**_TINY, "image_size": 336, "patch_size": 14}
    ),
}


def build(shape: Shape, device: str, dtype: torch.dtype, tower: bool = False) -> Any:
    """Return the model with random weights; without `tower` its vision tower is a tiny one."""
    import transformers

    eyes: dict[str, Any] = {"model_type": "clip_vision_model", **(shape.eyes if tower else _TINY)}
    if shape.kind == "Qwen2_5_VL":
        width = shape.text["hidden_size"]
        eyes = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
        eyes |= {"out_hidden_size": width, "fullatt_block_indexes": [0]}
    config = getattr(transformers, f"{shape.kind}Config")(
        text_config=shape.text, vision_config=eyes, image_token_id=shape.image
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{shape.kind}ForConditionalGeneration")(config)
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation({"text_config": "sdpa"})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    _tell_apart(model, tower)
    return model.eval()


def _tell_apart(model: Any, tower: bool) -> None:
    """Give the tokens of a prompt different embeddings, and every 50th those of a sink.

    No real picture does so here; and alike, all image tokens or none would be sinks, so that VAR
    would have nothing to do. The spikes stay in the residual stream through all layers.
    """
    known: dict[torch.Size, Tensor] = {}

    def spread(_: Any, __: Any, out: Tensor) -> Tensor:
        if out.shape[1] == 1:
            return out
        if out.shape not in known:
            draw = torch.Generator().manual_seed(1)
            noise = torch.randn(out.shape, generator=draw).to(out) * out.detach().std()
            noise[:, ::50, list(SINK_DIMS)] = SPIKE
            known[out.shape] = noise
        return out + known[out.shape]

    model.get_input_embeddings().register_forward_hook(spread)
    if tower:  # what it makes of pixels goes in the place of those
        model.model.multi_modal_projector.register_forward_hook(spread)


def prompt(shape: Shape, batch: int, device: str, tower: bool = False) -> dict[str, Tensor]:
    """Return text, image tokens and text again, alike in no two rows; for a tower, pixels too."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 30000, (batch, BEFORE + shape.tokens + AFTER), generator=draw)
    ids[:, 0] = 1
    ids[:, BEFORE : BEFORE + shape.tokens] = shape.image
    made = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    if tower:
        size = shape.eyes["image_size"]
        made["pixel_values"] = torch.randn(batch, 3, size, size, generator=draw).to(device)
    return made


def arms() -> dict[str, tuple[attnctl.Control, ...]]:
    """Return the stacks by name; "eager" is the stock model with other attention."""
    var: dict[str, Any] = {"sink_dims": SINK_DIMS, "tau": TAU}
    return {
        "stock": (),
        "neutral": (attnctl.PAI(alpha=0.0), attnctl.VAR(**var, p_moved=0.0)),
        "pai": (attnctl.PAI(),),
        "var": (attnctl.VAR(**var),),
        "eager": (),
    }


@torch.inference_mode()
def measure(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    tokens: int,
    rounds: int,
    only: Sequence[str] = (),
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Return times and peak memory of every arm, and the ratios to stock.

    Args:
        model: the model.
        inputs: the prompt.
        tokens: to write.
        rounds: timed rounds after a warm one.
        only: names of the arms besides stock; all if empty.
        seconds: no round begins after so many, but for the first three.
    """
    start = time.perf_counter()
    spent: dict[str, list[tuple[float, float]]] = {}
    peaks: dict[str, float] = {}
    cuda = model.device.type == "cuda"
    stacks = {
        name: stack for name, stack in arms().items() if not only or name in ("stock", *only)
    }
    order = [*stacks]
    for turn in range(rounds + 1):
        if turn > 3 and time.perf_counter() - start > seconds:
            break
        random.Random(turn).shuffle(order)  # nobody always comes after the same one
        for name in order:
            stack, eager = stacks[name], name == "eager"
            model.set_attn_implementation({"text_config": "eager" if eager else "sdpa"})
            inside: AbstractContextManager[Any] = (
                attnctl.patch(model, *stack) if stack else nullcontext()
            )
            with inside:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                found = _times(model, inputs, tokens, eager)
            if turn:
                spent.setdefault(name, []).append(found)
            if cuda:
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    model.set_attn_implementation({"text_config": "sdpa"})
    return _figures({name: spent[name] for name in stacks}, peaks, tokens)


class _Stamp(LogitsProcessor):
    """Notes when the prompt has been read; the logits stay as they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.read = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores."""
        if not self.read:
            self.read = _now(self.device)
        return scores


def _times(model: Any, inputs: dict[str, Tensor], tokens: int, maps: bool) -> tuple[float, float]:
    """Return the milliseconds of reading the prompt and those of writing after it."""
    stamp, length = _Stamp(model.device), tokens + 1
    start = _now(model.device)
    model.generate(
        **inputs, min_new_tokens=length, max_new_tokens=length, do_sample=False,
        output_attentions=maps, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([stamp]),
    )  # fmt: skip
    end = _now(model.device)
    return 1e3 * (stamp.read - start), 1e3 * (end - stamp.read)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _figures(
    spent: dict[str, list[tuple[float, float]]], peaks: dict[str, float], tokens: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, times in spent.items():
        reading, writing = (statistics.median(side) for side in zip(*times, strict=True))
        found[name] = {
            "prefill_ms": round(reading, 3),
            "tokens_per_second": round(1e3 * tokens / writing, 3),
            "rounds_prefill_ms": [round(a, 3) for a, _ in times],
            "rounds_decode_ms": [round(b, 3) for _, b in times],
        }
        if name in peaks:
            found[name]["peak_gib"] = round(peaks[name], 4)
    for name, figures in found.items():
        for side, key in enumerate(("prefill_ms", "tokens_per_second")):
            mine, stock = ([times[side] for times in spent[who]] for who in (name, "stock"))
            if side:  # a rate, so that more is better
                mine, stock = stock, mine
            ratio = median_interval(np.array(mine) / np.array(stock))
            figures[f"{key} / stock"] = round(ratio.value, 4)
            figures[f"{key} / stock, interval"] = [round(ratio.low, 4), round(ratio.high, 4)]
            figures[f"{key} / stock, least times"] = round(min(mine) / min(stock), 4)
        if name in peaks:
            figures["peak_gib / stock"] = round(peaks[name] / peaks["stock"], 4)
    return found


def chosen(
    parser: argparse.ArgumentParser, name: str, batch: int, tower: bool
) -> tuple[Any, dict[str, Tensor], str]:
    """Return the model and the prompt that a command line names, and what they are on."""
    shape, cuda = MODELS[name], torch.cuda.is_available()
    if tower and not shape.eyes:
        parser.error(f"--tower: there is none of {name} here; take llava-1.5-7b or small")
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    model = build(shape, device, dtype, tower)
    where = torch.cuda.get_device_name() if cuda else "cpu"
    return model, prompt(shape, batch, device, tower), where


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--tokens", type=int, default=16, help="to write")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to spend on rounds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tower", action="store_true", help="with the vision tower")
    parser.add_argument("--arms", default="", help="such as pai,var; default: all")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    model, inputs, where = chosen(parser, given.model, given.batch, given.tower)
    only = tuple(filter(None, given.arms.split(",")))
    measured = measure(
        model, inputs, tokens=given.tokens, rounds=given.rounds, only=only, seconds=given.seconds
    )
    data = {
        "bench": "vlm",
        "model": given.model,
        "device": where,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "image_tokens": MODELS[given.model].tokens,
        "tower": given.tower,
        "batch": given.batch,
        "written_tokens": given.tokens,
        "arms": measured,
    }
    text = json.dumps(data, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
