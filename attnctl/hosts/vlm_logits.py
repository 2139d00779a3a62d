"""The decode plane: a language model's logits of the next token go through the stack.

The logits of the last token are exchanged in what the model's call returns, so greedy search,
sampling, beams and a loop by hand all score by them, and every processor of `generate` comes
after them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import HostError
from ..records import LogitsCall, Step
from .adopt import PREFIX, original_class
from .vlm_stream import Stream
from .vlm_tokens import Sequence, fit_rows, image_ids, marks_of

if TYPE_CHECKING:
    from ..stack import Entry

__all__ = ["Heard", "Prompt", "check_speaker", "speak"]

_SWITCHES = (
    "past_key_values", "use_cache", "logits_to_keep", "labels", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "inputs_embeds",
    "kwargs",
)  # fmt: skip
_OF_TOKENS = (
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids",
)  # fmt: skip
"""Inputs with one value a token, rows before tokens."""


@dataclass(eq=False)
class Heard:
    """What the decoder read inside one call of the whole model.

    Args:
        entries: entries whose decode plane acts on this forward.
        sequence: what is known of its tokens.
        step: number of this forward since the prompt.
        cache: the cache after it, None without.
        past: tokens in the cache before it.
        n: tokens read.
    """

    entries: tuple[Entry, ...]
    sequence: Sequence
    step: Step
    cache: Any
    past: int
    n: int


@dataclass(frozen=True)
class Prompt:
    """The prompt of the generation under way.

    Args:
        ids: [B, N] token ids.
        mask: [B, N], 0 at padding, None if not given.
        inputs: what `generate` was called with, by name. transformers 5 encodes images before
            the model is called, so that their pixels are found here only.
    """

    ids: Tensor
    mask: Tensor | None
    inputs: dict[str, Any]


def check_speaker(model: Any, control: Any) -> None:
    """Refuse models whose calls return no logits that `generate` would use.

    Raises:
        HostError: without a language head.
    """
    name = "nothing" if model is None else original_class(model).__name__
    if model is None or getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise HostError(
            f"{control} changes the logits of the next token, and {name} returns none: patch the "
            "whole model with its language head, such as LlavaForConditionalGeneration"
        )


def speak(
    model: Any,
    heard: Heard,
    called: Any,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    prompt: Prompt | None,
    out: Any,
    run: Callable[[dict[str, Any], bool], Any],
) -> Any:
    """Return a call's output with the logits that the stack makes of the last token's.

    Args:
        model: the whole model.
        heard: what its decoder read.
        called: the model whose call this is: that one, or the one inside that generates for it.
        given: arguments of the call.
        prompt: of the generation under way, None outside of `generate`.
        out: the model's own output.
        run: runs the model, beside the stream under way, on (inputs, with controls or not).

    Raises:
        HostError: if the output has no logits, the call no token ids, a prompt is padded on
            the right, its images are read in parts, or several tokens of the answer at once.
    """
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise HostError(
            f"a call of this {original_class(model).__name__} returned no logits where a control "
            "is to change them: call it with return_dict=True"
        )
    images = image_ids(model.config)
    _check_one_by_one(images, heard, prompt)
    if heard.cache is not None:
        _follow_beams(heard.cache)
    last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))
    fused = LogitsCall(
        inputs=_inputs(model, called, given, heard, prompt),
        images=images,
        marks=marks_of(model.config),
        past=heard.past,
        written=heard.sequence.seen - heard.sequence.prompt,
        step=heard.step,
        run=heard.sequence.run,
        base=lambda: last,
        again=_second(model, heard, last, run),
        rest=heard.entries,
    ).proceed()
    out.logits = torch.cat([logits[:, :-1].to(fused.dtype), fused[:, None]], dim=1)
    return out


def _second(
    model: Any, heard: Heard, last: Tensor, run: Callable[[dict[str, Any], bool], Any]
) -> Callable[[dict[str, Any], Any, bool], tuple[Tensor, Any]]:
    """Return `LogitsCall.again`: a prompt is read once and then repeated for its beams."""
    keeps_few = "logits_to_keep" in _parameters(model)

    def again(changed: dict[str, Any], cache: Any, controlled: bool) -> tuple[Tensor, Any]:
        switches = {"past_key_values": cache, "use_cache": heard.cache is not None}
        if keeps_few:
            switches["logits_to_keep"] = 1
        made = run({**changed, **switches, "return_dict": True}, controlled)
        inner = getattr(made, "language_model_outputs", made)  # of models with a Q-Former
        logits, new = made.logits[:, -1].to(last.dtype), getattr(inner, "past_key_values", None)
        times = last.shape[0] // logits.shape[0]
        if times > 1:
            logits = logits.repeat_interleave(times, dim=0)
            if new is not None:
                new.batch_repeat_interleave(times)
        return logits, new

    return again


def _parameters(model: Any) -> Any:
    cls: Any = original_class(model)
    return inspect.signature(cls.forward).parameters


def _inputs(
    model: Any,
    called: Any,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    heard: Heard,
    prompt: Prompt | None,
) -> dict[str, Any]:
    """Return a call's arguments by name, with a flat padding mask; of a prompt one row each."""
    cls: Any = original_class(called)
    bound = inspect.signature(cls.forward).bind(None, *given[0], **given[1]).arguments
    named = {**dict(list(bound.items())[1:]), **bound.get("kwargs", {})}
    embeds = named.get("inputs_embeds")
    named = {k: v for k, v in named.items() if v is not None and k not in _SWITCHES}
    ids = named.get("input_ids")
    if ids is None and called is not model and prompt is not None and not heard.past:
        assert embeds is not None  # made of the prompt by the whole model
        ids = named["input_ids"] = fit_rows(prompt.ids, embeds.shape[0])
    if ids is None:
        raise HostError(
            "a second pass needs the token ids of every forward, and this one was called with "
            "inputs_embeds alone: give input_ids"
        )
    named["attention_mask"] = _flat(named.get("attention_mask"), heard, ids, prompt)
    if heard.past:
        return named
    if not bool(named["attention_mask"][:, -1].all()):
        raise HostError(
            "prompts must be padded on the left where controls change the logits of the last "
            "token: set processor.tokenizer.padding_side = 'left'"
        )
    return named if prompt is None else _as_given(model, named, prompt)


def _as_given(model: Any, named: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """Return a prompt's inputs before `generate` encoded its images and repeated its rows."""
    times = named["input_ids"].shape[0] // prompt.ids.shape[0]
    if times > 1 and named["input_ids"].shape[1] > prompt.ids.shape[1]:
        raise HostError(
            "beams and several answers to a prompt need the cache where a control makes a "
            "second pass: leave out use_cache=False"
        )
    of_tokens = {k: named[k] for k in _OF_TOKENS if k in named}
    if times > 1:  # [B, N], or [3, B, N] for rotary positions
        of_tokens = {k: v[..., ::times, :] for k, v in of_tokens.items()}
    if "cache_position" in named:  # of transformers 4; one for all rows
        of_tokens["cache_position"] = named["cache_position"]
    known = _parameters(model)
    skip = (*_SWITCHES, *_OF_TOKENS)
    others = {k: v for k, v in prompt.inputs.items() if k in known and k not in skip}
    return of_tokens | {k: v for k, v in others.items() if v is not None}


def _flat(mask: Any, heard: Heard, ids: Tensor, prompt: Prompt | None) -> Tensor:
    """Return the padding mask [B, past + n]; static caches come with one of four dimensions."""
    total = heard.past + heard.n
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, :total]
    flat = ids.new_ones(ids.shape[0], total)
    known = None if prompt is None else prompt.mask
    if known is not None:
        n = min(total, known.shape[1])
        flat[:, :n] = known[:, :n].repeat_interleave(ids.shape[0] // known.shape[0], dim=0)
    return flat


def _check_one_by_one(images: tuple[int, ...], heard: Heard, prompt: Prompt | None) -> None:
    if prompt is None or heard.cache is None:
        return
    read, length = heard.past + heard.n, prompt.ids.shape[1]
    if read < length and any(bool((prompt.ids[:, read:] == one).any()) for one in images):
        raise HostError(
            "a control that makes a second pass needs all images of a prompt at once, and this "
            f"call ends at token {read} of its {length}, before the last of them: generate with "
            "a larger prefill_chunk_size, or none"
        )
    if read > length and heard.n > 1:
        raise HostError(
            "several tokens of an answer are read at once (assisted decoding, prompt look-up), "
            "where a control changes the logits of one: generate without an assistant"
        )


def _follow_beams(cache: Any) -> None:
    """Let streams beside this cache be reordered with it."""
    if "reorder_cache" not in cache.__dict__:
        # a copy of the cache gets a method bound to the copy
        cache.reorder_cache = types.MethodType(reorder_cache, cache)


def reorder_cache(self: Any, beam_idx: Tensor) -> None:
    """Reorder a cache, and the caches of the streams beside it."""
    type(self).reorder_cache(self, beam_idx)
    sequence = self.__dict__.get(PREFIX)
    for state in sequence.run.states.values() if sequence is not None else ():
        if isinstance(state, Stream):
            state.reorder(beam_idx)
