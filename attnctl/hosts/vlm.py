"""Language models of transformers: one binding per patched decoder, one `Forward` per call.

The decoder's call says how many tokens are read and which cache they go into; the call of the
whole model around it (and `generate` around that) says which tokens they are.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import HostError
from ..records import (
    STOCK,
    AttentionCall,
    Reading,
    Residual,
    Rows,
    Spans,
    Step,
    WrittenRow,
)
from ..sites import Sites
from ..stack import Entry, check_conflicts
from .adopt import Front, Uncopied, adopt, original_class, release
from .vlm_compiled import CompiledDecoder, Filling, Lookup, compiler_options
from .vlm_discover import decoder_of, speaker_of
from .vlm_given import Given
from .vlm_logits import Heard, Prompt, check_speaker, speak
from .vlm_tap import DecoderSite, Stock, hook_site, primitive, stock_attention, unhook_site
from .vlm_tokens import Sequence, tokens_of

__all__ = ["DecoderBinding"]

_NO_HEADS, _ALL = torch.empty(0), slice(None)
_CONDITIONED = Rows(("cond",), 1)

SLOT = "_attnctl"
"""Where a decoder keeps its binding, and a cache what is known of its tokens."""


class Local(threading.local):
    """What this thread is doing."""

    forward: Forward | None = None
    prepared: Forward | None = None  # of the compiled call under way
    model: Given | None = None  # call of the whole model under way
    generation: Given | None = None  # generate call under way
    heard: Heard | None = None  # what the decoder read in the model's call under way
    aside: Literal["no", "stock", "controlled"] = "no"  # inside a second pass of the model


LOCAL = Local()


class ModelCalls:
    """Mixin put in front of the whole model's class: notes the token ids.

    Where an inner model generates (`speaker_of`), it is put in front of that one's too.
    Code that a user compiled breaks here and runs the patched model eagerly.
    """

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _model_call(self, super().__call__, args, kwargs)  # type: ignore[misc]

    def get_compiled_call(self, *args: Any, **kwargs: Any) -> Any:
        """Return what runs written tokens in compiled code where `generate` would (`Form`).

        All else runs eagerly. A call that was compiled before the patch is not taken, and is
        there after it.
        """
        config = args[0] if args else kwargs.get("compile_config")
        binding = decoder_of(cast(nn.Module, self)).__dict__.get(SLOT)
        options = compiler_options(self, config)
        if binding is None or options is None:
            return self.__call__
        return functools.partial(_compiled_call, self, binding, options)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Note the prompt."""
        if _whole(self) is not self:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        before = LOCAL.generation
        LOCAL.generation = Given.to(self, args, kwargs)
        LOCAL.generation.fetch()  # newer transformers ask the vision tower before the model
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            LOCAL.generation = before

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Note what becomes of the prompt's ids: mostly a copy, that nobody need compare."""
        made = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        given = LOCAL.generation
        ids = None if given is None else given.ids
        if given is not None and ids is not None:
            copied = made.get("input_ids")
            of_it = (args[0] if args else kwargs.get("input_ids")) is ids
            if of_it and copied is not None and copied.shape == ids.shape:
                given.copied = copied
        return made


def _model_call(
    model: Any, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run one call of a model; `stock` is the unpatched call."""
    if LOCAL.model is not None:  # the outermost call knows most
        return stock(*args, **kwargs)
    whole = _whole(model)
    LOCAL.model, LOCAL.heard = Given.to(whole, args, kwargs), None
    if not _is_its_prompt(LOCAL.generation, LOCAL.model):
        LOCAL.model.fetch()
    try:
        out = stock(*args, **kwargs)
    finally:
        LOCAL.model, heard, LOCAL.heard = None, LOCAL.heard, None
    if heard is None or not heard.entries:
        return out
    return speak(
        whole, heard, model, (args, kwargs), _prompt(), out,
        lambda inputs, controlled: _beside(whole, inputs, controlled),
    )  # fmt: skip


def _compiled_call(
    model: Any, binding: DecoderBinding, options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Run one call of a model that `generate` wants compiled."""
    filling = None if args else binding.filling(model, options, kwargs)
    if filling is None:
        return model(*args, **kwargs)
    return _model_call(model, functools.partial(binding.compiled_call, model, filling), (), kwargs)


def _whole(model: Any) -> Any:
    """Return the model whose answer a model is generating: itself, or the one around it."""
    given = LOCAL.generation
    if given is None or given.model is model or speaker_of(given.model) is not model:
        return model
    return given.model


def _prompt() -> Prompt | None:
    """Return the prompt of the generation under way."""
    given = LOCAL.generation
    if given is None or given.ids is None:
        return None
    return Prompt(given.ids, given.mask, given.inputs)


def _beside(model: Any, inputs: dict[str, Any], controlled: bool) -> Any:
    """Run a model's unpatched call on a second prompt, beside the generation under way."""
    inner = speaker_of(model)
    # text alone, and what follows a prompt, is for the language model inside
    asked = model if inner is None or "pixel_values" in inputs else inner
    before = LOCAL.model, LOCAL.generation, LOCAL.aside
    LOCAL.model, LOCAL.generation = Given.to(model, (), inputs), None
    LOCAL.aside = "controlled" if controlled else "stock"
    try:
        return asked(**inputs)
    finally:
        LOCAL.model, LOCAL.generation, LOCAL.aside = before


class DecoderCalls:
    """Mixin put in front of the decoder's class while it is patched."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().__call__  # type: ignore[misc]
        binding = self.__dict__.get(SLOT)
        if binding is None or _being_compiled(binding.compiled.lookup):
            return stock(*args, **kwargs)
        return _decoder_call(binding, stock, args, kwargs)


@torch.compiler.disable
def _decoder_call(binding: DecoderBinding, stock: Any, args: Any, kwargs: Any) -> Any:
    return binding.call(stock, args, kwargs)


def _being_compiled(lookup: Lookup) -> bool:
    """Whether this is traced for a form, whose bookkeeping is done around it."""
    return lookup.form is not None and torch.compiler.is_compiling()


def _listening(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a layer's call that shows its input to the controls while the stock one runs.

    Not for a written token of which it is known what is done to it: at one token a time, this
    would be a good part of what a control costs.
    """

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        lookup = self.__dict__.get(SLOT)
        if lookup is None or (lookup.form is not None and torch.compiler.is_compiling()):
            return stock(self, *args, **kwargs)  # called past the undo, or traced for a form
        forward = LOCAL.forward
        if forward is None:
            return stock(self, *args, **kwargs)
        sites, written = forward.binding.listened.get(self), forward.written
        if sites is None or (written is not None and written.keys() >= sites):
            return stock(self, *args, **kwargs)
        forward.stream = args[0] if args else kwargs["hidden_states"]
        try:
            return stock(self, *args, **kwargs)
        finally:
            forward.stream = None  # every layer's input at once would be much memory

    return call


class LayerCalls:
    """Mixin put in front of a layer's class while a control reads what goes into it."""

    __call__ = Front(_listening)


class DecoderBinding(Uncopied):
    """Everything attnctl holds on one decoder: its class, its sites and the stack.

    Args:
        decoder: the module that holds the layers.
        sites: its attention sites.
        modules: the attention modules by site index.
    """

    def __init__(self, decoder: nn.Module, sites: Sites, modules: list[nn.Module]) -> None:
        self.module = decoder
        self.sites = sites
        self.modules = modules
        cls: Any = original_class(decoder)
        self.signature = inspect.signature(cls.forward)
        self.entries: list[Entry] = []
        self.hooked: set[int] = set()
        self.listened: dict[Any, frozenset[int]] = {}  # sites by layer
        # by the active entries and site; they are the same at almost every token
        self.acting: dict[tuple[int, ...], dict[int, tuple[Entry, ...]]] = {}
        self.around: list[tuple[weakref.ref[Any], list[Entry]]] = []
        self.compiled = CompiledDecoder(decoder, modules)

    @classmethod
    def attach(cls, model: nn.Module, sites: Sites, modules: list[nn.Module]) -> DecoderBinding:
        """Return the binding of a model's decoder, made if there is none."""
        decoder = decoder_of(model)
        binding = decoder.__dict__.get(SLOT)
        if binding is None:
            binding = decoder.__dict__[SLOT] = cls(decoder, sites, modules)
            adopt(decoder, DecoderCalls)
        made: DecoderBinding = binding
        return made

    def add(self, entries: list[Entry], model: nn.Module | None = None) -> None:
        """Install entries below those already there.

        Args:
            entries: the entries.
            model: the whole model that they were installed through.

        Raises:
            ControlConflict: if the stack cannot work; nothing is changed then.
            HostError: if a control works on a plane that this model lacks; nothing is changed.
        """
        check_conflicts([*self.entries, *entries])
        for entry in entries:
            _check_planes(entry)
            if entry.decodes:
                check_speaker(model, entry.control)
        for module in self.modules:
            stock_attention(module)
        self.entries += entries
        if model is not None and model is not self.module:
            inner = speaker_of(model)
            for one in (model,) if inner is None else (model, inner):
                adopt(one, ModelCalls)
                self.around.append((weakref.ref(one), entries))
        self._rehook()

    def remove(self, entries: list[Entry]) -> None:
        """Take entries out; the last one restores the decoder exactly."""
        self.entries = [e for e in self.entries if e not in entries]
        self._rehook()
        for ref, mine in [item for item in self.around if item[1] is entries]:
            self.around.remove((ref, mine))
            model = ref()
            if model is not None:
                release(model)
        if not self.entries and self.module.__dict__.pop(SLOT, None) is not None:
            release(self.module)
            self.compiled.clear()

    def _rehook(self) -> None:
        self.acting.clear()
        acting = [e for e in self.entries if e.attends and not e.control.neutral]
        wanted = {index for entry in acting for index in entry.selection}
        for index in self.hooked - wanted:
            unhook_site(self.modules[index])
            self.hooked.discard(index)
        for index in wanted - self.hooked:
            hook_site(self.modules[index], DecoderSite(self, index, LOCAL))
            self.hooked.add(index)
        self._listen({i for e in acting if e.control.reads_residual for i in e.selection})
        self._acting_of([e for e in self.entries if not e.neutral])  # what most forwards ask for

    def _listen(self, wanted: set[int]) -> None:
        """Follow the residual stream of these sites' layers, and of no others."""
        sites = {self.modules[index]: index for index in wanted}
        layers = {
            layer: frozenset(sites[m] for m in layer.children() if m in sites)
            for layer in self.module.modules()
            if not sites.keys().isdisjoint(layer.children())
        }
        for layer in self.listened.keys() - layers.keys():
            release(layer)
            layer.__dict__.pop(SLOT, None)
        for layer in layers.keys() - self.listened.keys():
            layer.__dict__[SLOT] = self.compiled.lookup
            adopt(layer, LayerCalls)
        self.listened = layers

    # -- calls ---------------------------------------------------------------------------

    def call(self, stock: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run one call of the decoder; `stock` is the unpatched call."""
        if not any(not e.control.neutral for e in self.entries):
            return stock(*args, **kwargs)
        bound = kwargs
        if args:
            bound = self.signature.bind(None, *args, **kwargs).arguments
            bound = {**bound, **bound.get("kwargs", {})}
        forward = LOCAL.prepared
        if forward is None or forward.binding is not self:
            forward = self._forward(bound)
        LOCAL.prepared = None
        before, LOCAL.forward = LOCAL.forward, forward
        try:
            out = stock(*args, **kwargs)
        finally:
            LOCAL.forward = before
        made = getattr(out, "past_key_values", None)
        if hasattr(made, "get_seq_length"):  # made inside the decoder: goes on in the next call
            made.__dict__[SLOT] = forward.sequence
        for entry in forward.active:
            if entry.attends and not entry.calls:
                entry.warn_untouched()
        if LOCAL.aside == "no":
            given = made if hasattr(made, "get_seq_length") else bound.get("past_key_values")
            LOCAL.heard = forward.heard(given)
        return out

    def _forward(self, inputs: dict[str, Any]) -> Forward:
        """Return what this call of the decoder reads, and where it stands."""
        given, cache = inputs.get("inputs_embeds"), inputs.get("past_key_values")
        if given is None:
            given = inputs["input_ids"]
        rows, n = given.shape[:2]
        past = _past(cache, inputs.get("cache_position"))
        sequence = _sequence(cache, past, n)
        if past == 0 or n > 1 or sequence.labels is None:
            _read(sequence, inputs, rows, n, past)
        return self._next(sequence, rows, past, n)

    def _next(self, sequence: Sequence, rows: int, past: int, n: int) -> Forward:
        """Return the forward that a sequence goes on with."""
        sequence.seen = past + n
        step = Step(sequence.steps, 0)
        sequence.steps += 1
        active = [e for e in self.entries if e.active(step)]
        if LOCAL.aside == "stock":
            active = []
        for entry in active:
            entry.steps.add(step.index)
        key, acting = self._acting_of(active)
        written = None
        if n == 1 and past >= sequence.prompt:
            written = sequence.rows.setdefault((key, rows), {})
        return Forward(
            self, sequence, step, active, Rows(("cond",), rows), past, n, acting, written
        )

    def _acting_of(
        self, active: list[Entry]
    ) -> tuple[tuple[int, ...], dict[int, tuple[Entry, ...]]]:
        """Return the serial numbers of active entries, and who has something to do at a site."""
        key = tuple([e.serial for e in active])
        acting = self.acting.get(key)
        if acting is None:
            acting = self.acting[key] = {site: _at(site, active) for site in self.hooked}
        return key, acting

    def filling(
        self, model: Any, options: dict[str, Any], inputs: dict[str, Any]
    ) -> Filling | None:
        """Return what compiled code is told of a call of the model; None to run it eagerly."""
        given, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        given = inputs.get("inputs_embeds") if given is None else given
        sequence = None if cache is None else cache.__dict__.get(SLOT)
        if given is None or given.shape[1] != 1 or sequence is None or sequence.labels is None:
            return None
        if sequence.seen < sequence.prompt or torch.is_grad_enabled() or LOCAL.aside != "no":
            return None
        active = [e for e in self.entries if e.active(Step(sequence.steps, 0))]
        return self.compiled.filling(model, options, sequence, active, given.shape[0], cache)

    def compiled_call(self, model: Any, filling: Filling, **kwargs: Any) -> Any:
        """Run one call of the model in compiled code, and note what it did."""
        cache = kwargs["past_key_values"]
        sequence = cache.__dict__[SLOT]
        # asking the cache how long it is would wait for the device
        forward = self._next(sequence, filling.rows, sequence.seen, 1)
        before, LOCAL.prepared = LOCAL.prepared, forward
        try:
            out = self.compiled.run(model, filling, kwargs)
        finally:
            eager, LOCAL.prepared = LOCAL.prepared is None, before
        if not eager:  # it was not: nothing has been counted
            for site, entry in filling.owners.items():
                entry.calls[site] += 1
            LOCAL.heard = forward.heard(cache)
        return out

    def passed(self) -> HostError:
        """Return the error of attention outside a call of the decoder."""
        return HostError(
            f"attention of this {original_class(self.module).__name__} was called past the patch: "
            "its forward directly, one of its layers, or a checkpointed layer in the backward "
            "pass. Call the model itself, without gradient checkpointing"
        )


def _at(site: int, active: list[Entry]) -> tuple[Entry, ...]:
    """Return the entries with something to do at a site."""
    return tuple(e for e in active if e.wants(site, _CONDITIONED))


def _check_planes(entry: Entry) -> None:
    for plane in ("denoise", "between"):
        if type(entry.control).plane(plane):
            raise HostError(
                f"{entry.control} works on the {plane!r} plane of a diffusion model; a language "
                "model has the attention and the decode plane"
            )


def _check_softmax(entries: tuple[Entry, ...], kwargs: dict[str, Any]) -> None:
    """Refuse controls that compute a softmax of their own where the model's is another one."""
    for name in ("softcap", "s_aux"):  # sdpa leaves them out, as transformers calls it
        for entry in entries if kwargs.get(name) is not None else ():
            if entry.control.replaces_softmax:
                raise HostError(
                    f"{entry.control} computes the softmax itself, without this decoder's {name}; "
                    "take a control that goes through the model's attention, such as pai"
                )


def _past(cache: Any, positions: Tensor | None) -> int:
    """Return how many tokens a cache holds.

    transformers 4 passes the positions of the new ones, and its static caches leave padding
    out of their count.
    """
    if cache is None:
        return 0
    return int(cache.get_seq_length() if positions is None else positions[0])


def _sequence(cache: Any, past: int, n: int) -> Sequence:
    """Return what is known of the sequences that a call goes on with; new for a new prompt."""
    generation = LOCAL.generation
    if cache is None:
        known = None if generation is None else generation.sequence
        if known is None or n <= known.seen:
            known = Sequence()
            if generation is not None:
                generation.sequence = known
        return known
    known = cache.__dict__.get(SLOT)
    if known is None or past == 0:
        known = cache.__dict__[SLOT] = Sequence()
    found: Sequence = known
    return found


def _read(sequence: Sequence, inputs: dict[str, Any], rows: int, n: int, past: int) -> None:
    """Label the tokens of a prompt, or of more of it."""
    generation = LOCAL.generation
    own = LOCAL.model
    if own is None or own.ids is None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        own = Given(ids, flat, {}, None if own is None else own.model)
    whole = generation is not None and generation.ids is not None
    if whole and sequence.labels is not None and past >= generation.ids.shape[1]:  # type: ignore[union-attr]
        return  # several tokens of the answer at once
    begins = not past and _is_its_prompt(generation, own)
    if not begins and whole and not _reads_it_all(generation, own, past):
        begins = _begins(generation, own, past, n)
    if begins:
        assert generation is not None and generation.ids is not None
        sequence.prompt = generation.ids.shape[1]
        known = generation.labels(rows, sequence.prompt)
        if known is not None:
            sequence.read(known, 0, sequence.prompt)
        return
    sequence.read(own.labels(rows, n), past, n)
    sequence.prompt = past + n


def _is_its_prompt(generation: Given | None, own: Given) -> bool:
    """Whether a call is given the very copy of its prompt's ids that a generation made."""
    return generation is not None and own.ids is not None and own.ids is generation.copied


def _reads_it_all(generation: Any, own: Given, past: int) -> bool:
    """Whether a call says as much of its tokens as the generation under way says of its prompt."""
    if past or own.ids is None or own.ids.shape != generation.ids.shape:
        return False
    told = own.mask is not None or generation.mask is None
    return told and own.model is generation.model


def _begins(generation: Any, own: Given, past: int, n: int) -> bool:
    """Whether a call reads the prompt of the generation under way, or goes on with it.

    A second stream (guidance, an own cache) may read something else.
    """
    if past:
        return past + n <= generation.ids.shape[1] or n == 1
    if own.ids is None:
        return n == generation.ids.shape[1]  # embeddings made outside the decoder
    return own.begins_like(generation, n)


@dataclass(eq=False)
class Forward:
    """One call of a decoder that some controls take part in.

    Args:
        binding: the decoder's binding.
        sequence: what is known of its tokens.
        step: number of this forward since the prompt.
        active: entries that act, outermost first.
        rows: roles of the batch rows: all "cond".
        past: tokens in the cache before this forward.
        n: tokens that it reads.
        acting: entries with something to do, by site.
        written: by site, what is known to be done to written tokens; None for others.
    """

    binding: DecoderBinding
    sequence: Sequence
    step: Step
    active: list[Entry]
    rows: Rows
    past: int
    n: int
    acting: dict[int, tuple[Entry, ...]]
    written: dict[int, tuple[Entry, WrittenRow]] | None = None
    known: dict[Any, Spans] = field(default_factory=dict)
    stocks: dict[Any, Stock] = field(default_factory=dict)
    masks: dict[Any, Any] = field(default_factory=dict)
    asked: set[Entry] = field(default_factory=set)
    reading: dict[Entry | None, Reading] = field(default_factory=dict)  # of those asked
    config: Any = None  # of modules on sdpa: no more is to be asked of them
    usual: Any = None  # their own attention
    stream: Tensor | None = None  # what the layer under way reads

    def heard(self, cache: Any) -> Heard:
        """Return what the decode plane is to know of this forward."""
        entries = tuple(e for e in self.active if e.decodes)
        return Heard(entries, self.sequence, self.step, cache, self.past, self.n)

    def attend(
        self, site: int, module: nn.Module, call: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Run the attention plane of one site where `write` and `read` do not; see `vlm_tap`."""
        rest, stock = self.acting.get(site, ()), self._stock(module)
        if not rest:
            out: tuple[Tensor, Tensor | None] = stock.run(module, *call, **kwargs)
            return out
        seen = stock.seen(module, call, kwargs, self.masks)
        if stock.eager:
            _check_softmax(rest, kwargs)
        made = AttentionCall.quick(
            {
                "q": seen.q, "k": seen.k, "v": seen.v, "mask": seen.mask,
                "scale": kwargs.get("scaling"), "is_causal": seen.causal,
                "enable_gqa": seen.q.shape[1] != seen.k.shape[1],
                "site": self.binding.sites[site], "rows": self.rows, "step": self.step,
                "index": 0, "spans_of": self._spans,
                "base": primitive(stock, module, call, seen, kwargs), "rest": rest,
                "heads": _NO_HEADS, "state": None, "run": self.sequence.run, "role": "",
                "residual": self._residual(), "every_head": False,
                "plain": stock.plain(kwargs), "part": _ALL,
            }
        )  # fmt: skip
        if len(rest) == 1 and self._learn(rest[0], site, rest[0].alone(made)):
            short = self.read if self.written is None else self.write
            done = short(site, module, call, kwargs)
            if done is not None:
                return done
        if seen.whole is not None:  # a control may take one of them for all there is
            made.mask, made.is_causal = seen.whole(), False
        new = made.proceed() if len(rest) > 1 else rest[0].attend_alone(made)
        return new.transpose(1, 2).contiguous(), None

    def _learn(self, entry: Entry, site: int, call: AttentionCall) -> bool:
        """Ask a control, once, what it does here and later; whether it says."""
        if self.written is not None:
            row = None if site in self.written else entry.control.written(call)
            if row is not None:
                self.written[site] = entry, row
            return row is not None
        if entry in self.asked:
            return False
        self.asked.add(entry)
        reading = entry.control.reading(call) if call.plain else None
        if reading is not None:
            self.reading[entry] = reading
        return reading is not None

    # Written tokens and prompts go through the next two, one layer after another. While a layer
    # runs, the processor forgets this code: what counts is how many functions are called.

    def write(
        self, site: int, module: nn.Module, call: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Run what is known to be done to a written token, past the stack; None if nothing is."""
        assert self.written is not None
        known = self.written.get(site)
        if known is None:
            return None
        entry, row = known
        if module.__dict__["config"] is not self.config or row is STOCK:
            stock = self._stock(module)
            if row is STOCK:
                entry.calls[site] += 1
                out: tuple[Tensor, Tensor | None] = stock.run(module, *call, **kwargs)
                return out
            if stock.flash:
                call = stock.seen(module, call, kwargs, self.masks)[:4]
        q, k, v, mask = call
        found = row(q, k, v, mask, kwargs.get("scaling"), self.past + 1)
        if found is None:
            return None
        entry.calls[site] += 1
        return found, None

    def read(
        self, site: int, module: nn.Module, call: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Run what is known to be done to a prompt, past the stack; None if nothing is."""
        acting = self.acting.get(site, ())
        entry = acting[0] if len(acting) == 1 else None
        reading = self.reading.get(entry)
        if entry is None or reading is None:
            return None
        asked = kwargs.get
        if asked("dropout") or asked("position_bias") is not None:
            return None
        if module.__dict__["config"] is self.config:
            stock, (q, k, v, mask), causal = self.usual, call, False
            if mask is None and self.n > 1:
                given = asked("is_causal")
                causal = bool(getattr(module, "is_causal", True) if given is None else given)
        else:
            stock = self._stock(module)
            if stock.eager:
                return None
            q, k, v, mask, causal, _ = stock.seen(module, call, kwargs, self.masks)
        out = stock.run(module, *call, **kwargs)[0].contiguous()
        heads = None if site in entry.entire else entry.selection[site]
        made = reading(site, q, k, v, mask, asked("scaling"), causal, self.stream, heads, out)
        if made is None:
            return None
        entry.calls[site] += 1
        return made, None

    def _stock(self, module: nn.Module) -> Stock:
        """Return a module's own attention."""
        at = id(module.__dict__["config"]), module.__class__
        found = self.stocks.get(at)
        if found is None:
            found = self.stocks[at] = Stock.of(module)
            if not found.eager and not found.flash:
                self.config, self.usual = module.__dict__["config"], found
        return found

    def _residual(self) -> Residual | None:
        if self.stream is None:
            return None
        return Residual(self.stream, self.past, self.sequence.prompt)

    def _spans(self, call: AttentionCall) -> Spans:
        q, nk = call.q, call.k.shape[2]
        at = q.shape[2], nk, q.device
        found = self.known.get(at)
        if found is None:
            tokens = tokens_of(self.sequence, self.past, q.shape[0], at[0], nk, at[2])
            found = self.known[at] = Spans((), (), tokens=tokens)
        return found
