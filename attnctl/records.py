"""The few records every control sees, whatever the model.

Layout of attention tensors is always [B, H, N, D] (rows, heads, tokens, head dim), after
QK-norm and rotary embedding, keys and values not repeated for grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .hosts.run import Run
    from .stack import Entry

__all__ = [
    "STOCK",
    "AttentionCall",
    "ForwardCall",
    "LogitsCall",
    "Reading",
    "Rows",
    "Site",
    "Spans",
    "Step",
    "StepCall",
    "Tokens",
    "Watch",
    "WrittenRow",
]

RowSlice = slice
Kind = Literal["self", "cross", "joint", "text", "causal", "linear", "other"]
TOKEN_ROLES = ("image", "text", "question", "answer", "pad")
"""Roles of tokens: "text" is all that is neither image nor padding, "question" the prompt's
text after its last image, "answer" (queries) the last token of the prompt and all that were
written after it, which predict the answer, and (keys) the written ones."""


@dataclass(frozen=True)
class Site:
    """One attention module.

    Args:
        index: position in execution order over all sites of the denoiser.
        name: dotted module path, such as "transformer_blocks.3.attn".
        kind: "self" (image or video tokens only), "cross" (image queries, text keys), "joint"
            (one sequence of image and text), "text" (text refiners), "causal" (the decoder of
            a language model), "linear" (no softmax, cannot be controlled) or "other".
        layer: number of the transformer block, counted over the main blocks in execution
            order; None for refiners and second self-attentions, which go by name only.
        heads: query heads.
        head_dim: width of a head.
        kv_heads: key and value heads.
        denoiser: attribute of the pipeline that holds the model ("unet", "transformer"...).
    """

    index: int
    name: str
    kind: Kind
    layer: int | None
    heads: int
    head_dim: int
    kv_heads: int
    denoiser: str = "model"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Rows:
    """Roles of the batch rows of a denoiser call: equal groups of `n` samples, in order.

    Roles are "uncond", "cond", "source", "target", "reference/0", ... and, for rows that a
    control added, its own name such as "perturbed/2".
    """

    groups: tuple[str, ...]
    n: int

    def __len__(self) -> int:
        return len(self.groups) * self.n

    def __contains__(self, role: object) -> bool:
        return role in self.groups

    def slice(self, role: str) -> slice:
        """Return where the rows of `role` lie; KeyError if there are none."""
        if role not in self.groups:
            raise KeyError(role)
        i = self.groups.index(role)
        return slice(i * self.n, (i + 1) * self.n)

    def plus(self, role: str) -> Rows:
        """Return the rows with one more group at the end."""
        return Rows((*self.groups, role), self.n)

    def __str__(self) -> str:
        return f"{self.n} x [{', '.join(self.groups)}]"


@dataclass(frozen=True)
class Step:
    """Where a denoising run stands.

    Args:
        index: denoiser steps done so far, from 0.
        count: steps of the run, 0 if unknown (a bare denoiser).
        timestep: the denoiser's own time input, as given.
        sigma_of: returns the scheduler's noise level, None without a scheduler.
    """

    index: int
    count: int
    timestep: Any = None
    sigma_of: Callable[[], float] | None = field(default=None, compare=False, repr=False)

    @property
    def fraction(self) -> float:
        """Part of the run that is done, in [0, 1)."""
        if self.count <= 0:
            from .errors import HostError

            raise HostError(
                "the number of steps is unknown for a bare denoiser, so a window by fraction "
                "has no meaning: give attnctl.patch(..., steps=N), or use steps: or sigmas:"
            )
        return min(self.index / self.count, 1.0)

    @cached_property
    def sigma(self) -> float:
        """Noise level; raises HostError without a scheduler."""
        if self.sigma_of is None:
            from .errors import HostError

            raise HostError("no scheduler is known here, so sigma windows cannot be used")
        return self.sigma_of()


class Tokens:
    """Roles of the tokens of one attention call, as masks; each is made when first asked for.

    Args:
        queries: returns the mask [B, Nq] of a role.
        keys: returns the mask [B, Nk] of a role.
        slots: returns the mask [B, T] of a role among all tokens so far, in order; None for the
            keys.
        first: slot of the first key: above 0 in a sliding window.
        written: whether all queries were written after the prompt: roles "text" and "answer".
        device: where masks are wanted; None for where they are made, which may be the CPU.
        labels: uint8 [B, T] of all tokens so far, 0 text, 1 image, 2 padding, where masks are
            made; None if they were made otherwise.
        answering: number of the first query of role "answer", which all after it have too;
            None if that differs between the rows, or is not known.
    """

    def __init__(
        self,
        queries: Callable[[str], Tensor],
        keys: Callable[[str], Tensor],
        slots: Callable[[str], Tensor] | None = None,
        first: int = 0,
        written: bool = False,
        device: torch.device | None = None,
        labels: Tensor | None = None,
        answering: int | None = None,
    ) -> None:
        self._of = {"queries": queries, "keys": keys, "slots": slots or keys}
        self.first = first
        self.written = written
        self.device = device
        self.labels = labels
        self.answering = answering
        self._made: dict[tuple[str, str], Tensor] = {}
        self._wanted: dict[tuple[str, str], Tensor] = {}

    def queries(self, role: str) -> Tensor:
        """Return the queries of a role, bool [B, Nq]."""
        return self._mask("queries", role)

    def keys(self, role: str) -> Tensor:
        """Return the keys of a role, bool [B, Nk]."""
        return self._mask("keys", role)

    def slots(self, role: str) -> Tensor:
        """Return the tokens of a role among all so far, bool [B, T]."""
        return self._mask("slots", role)

    def slots_here(self, role: str) -> Tensor:
        """Return the same where the masks are made, which may be the CPU."""
        return self._make("slots", role)

    def queries_here(self, role: str) -> Tensor:
        """Return the queries of a role where the masks are made, which may be the CPU."""
        return self._make("queries", role)

    def labels_there(self) -> Tensor:
        """Return the labels where masks are wanted.

        Without labels: 1 at image tokens, 2 at padding, else 0, found from the masks.
        """
        if ("labels", "") not in self._wanted:
            labels = self.labels
            if labels is None:
                labels = self.slots_here("image").to(torch.uint8)
                labels = labels.masked_fill(self.slots_here("pad"), 2)
            self._wanted["labels", ""] = labels.to(self.device, non_blocking=True)
        return self._wanted["labels", ""]

    def columns(self, role: str) -> Tensor:
        """Return the numbers [n] of the queries that have the role in some row."""
        if ("columns", role) not in self._wanted:
            columns = self._make("queries", role).any(dim=0).nonzero()[:, 0]
            self._wanted["columns", role] = columns.to(self.device, non_blocking=True)
        return self._wanted["columns", role]

    def at(self, columns: Tensor) -> Tokens:
        """Return the roles for some of the queries, by number [n]."""
        few = lambda role: self.queries(role)[:, columns]  # noqa: E731
        return Tokens(few, self.keys, self.slots, self.first, self.written)

    def _mask(self, side: str, role: str) -> Tensor:
        if (side, role) not in self._wanted:
            # without waiting for the device, which reads the CPU's memory at once
            made = self._make(side, role).to(self.device, non_blocking=True)
            self._wanted[side, role] = made
        return self._wanted[side, role]

    def _make(self, side: str, role: str) -> Tensor:
        if role not in TOKEN_ROLES:
            from .errors import HostError

            raise HostError(f"there is no role {role!r} of tokens: {', '.join(TOKEN_ROLES)}")
        if (side, role) not in self._made:
            self._made[side, role] = self._of[side](role)
        return self._made[side, role]


class Residual(NamedTuple):
    """The residual stream where a decoder layer reads it, before its norm.

    Args:
        hidden: [B, N, width], the tokens of this forward.
        past: tokens before them.
        prompt: tokens of the prompt, padding included: what comes after them was written.
    """

    hidden: Tensor
    past: int
    prompt: int


@dataclass(frozen=True)
class Spans:
    """Which tokens of an attention call are what.

    Args:
        q: (role, start, stop) of the queries; roles "image", "ref", "text", "ip".
        k: the same of the keys.
        grid: (frames, height, width) of the "image" tokens, row-major; None if unknown.
        tokens: roles row by row, as masks; of language models only, whose rows differ, so
            that they have no slices.
    """

    q: tuple[tuple[str, int, int], ...]
    k: tuple[tuple[str, int, int], ...]
    grid: tuple[int, int, int] | None = None
    tokens: Tokens | None = field(default=None, compare=False, repr=False)

    def queries(self, role: str) -> slice | None:
        """Return the slice of query tokens with this role, None if there are none."""
        return self._slice(self.q, role)

    def keys(self, role: str) -> slice | None:
        """Return the slice of key tokens with this role, None if there are none."""
        return self._slice(self.k, role)

    def _slice(self, spans: tuple[tuple[str, int, int], ...], role: str) -> slice | None:
        if self.tokens is not None:
            from .errors import HostError

            raise HostError(
                "the rows of a language model's batch hold their tokens at different places, so "
                f"there is no slice of {role!r}: ask spans.tokens for a mask"
            )
        return _find(spans, role)


def _find(spans: tuple[tuple[str, int, int], ...], role: str) -> slice | None:
    return next((slice(a, b) for name, a, b in spans if name == role and b > a), None)


def _changed(call: AttentionCall, **changes: Any) -> AttentionCall:
    """Return a copy with other values: dataclasses.replace costs ten times as much, per call."""
    new = object.__new__(AttentionCall)
    new.__dict__.update(call.__dict__)
    new.__dict__.update(changes)
    return new


@dataclass
class AttentionCall:
    """One attention primitive inside one site, seen by one control of the stack.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: [B, Hkv, Nk, Dv].
        mask: bool (True = may attend) or additive float, broadcastable to [B, H, Nq, Nk].
        scale: factor on the logits, None for 1/sqrt(D).
        is_causal: as in scaled_dot_product_attention.
        enable_gqa: whether Hkv < H is allowed.
        site: where this happens.
        rows: roles of the denoiser's batch rows (see `slice` for those of this tensor).
        step: where the run stands.
        index: which primitive call inside this one forward of the site (several for Mochi,
            Wan I2V, IP-Adapter).
        heads: bool [H] on the CPU, the heads this control was asked to touch.
        every_head: whether that is all of them.
        plain: whether the stock primitive is scaled_dot_product_attention and nothing else.
        state: this control's own state of this run (what `Control.begin` returned).
        residual: what the layer reads, where a control in the stack `reads_residual`.
        part: which of the site's heads the tensors hold: all, except on several GPUs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    is_causal: bool
    enable_gqa: bool
    site: Site
    rows: Rows
    step: Step
    index: int
    spans_of: Callable[[AttentionCall], Spans]
    base: Callable[..., Tensor]
    rest: tuple[Entry, ...] = ()
    heads: Tensor = field(default_factory=lambda: torch.empty(0))
    state: Any = None
    run: Run | None = None
    role: str = ""
    residual: Residual | None = None
    every_head: bool = False
    plain: bool = False
    part: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def quick(cls, fields: dict[str, Any]) -> AttentionCall:
        """Return a call with these values, all of them given: __init__ costs far more."""
        new = object.__new__(cls)
        new.__dict__.update(fields)
        return new

    def proceed(self, **changes: Any) -> Tensor:
        """Run the rest of the stack and the stock primitive.

        Args:
            **changes: new q, k, v, mask, scale or is_causal for everything further in.

        Returns:
            The attention output [B, H, Nq, Dv].
        """
        call = _changed(self, **changes) if changes else self
        if not call.rest:
            return call.primitive()
        entry, rest = call.rest[0], call.rest[1:]
        return entry.attend(_changed(call, rest=rest))

    def seen_by(
        self, heads: Tensor, state: Any, role: str, every_head: bool = False
    ) -> AttentionCall:
        """Return this call as one control of the stack sees it."""
        return _changed(self, heads=heads, state=state, role=role, every_head=every_head)

    def primitive(self) -> Tensor:
        """Run the model's own attention on this call's tensors, past all controls."""
        return self.base(
            self.q, self.k, self.v, self.mask, self.scale, self.is_causal, self.enable_gqa
        )

    @property
    def spans(self) -> Spans:
        """Token spans and grid of this call."""
        return self.spans_of(self)

    def slice(self, role: str) -> RowSlice | None:
        """Return the rows of this call's tensors that have `role`; None if there are none.

        A site may fold other axes into the batch (a multiple of the denoiser's rows, row
        index slowest) or be called once per row (Mochi).
        """
        if role not in self.rows:
            return None
        at, total, batch = self.rows.slice(role), len(self.rows), self.q.shape[0]
        if batch == total:
            return at
        if batch % total == 0:
            fold = batch // total
            return slice(at.start * fold, at.stop * fold)
        if batch == 1:
            return slice(0, 1) if at.start <= self.index < at.stop else None
        from .errors import HostError

        raise HostError(
            f"{self.site}: attention batch {batch} does not fit the denoiser's {self.rows}"
        )

    def take(self, rows: RowSlice, heads: Tensor | None = None) -> AttentionCall:
        """Return a call on some rows and heads of this one (views where possible).

        Args:
            rows: slice of the batch.
            heads: indices [h] of query heads, None for all.
        """
        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        if heads is not None:
            heads = heads.to(q.device)
            shared = heads // (q.shape[1] // k.shape[1])  # grouped-query attention
            q, k, v = q[:, heads], k[:, shared], v[:, shared]
        mask = _take_mask(self.mask, rows, heads, self.q.shape)
        return _changed(self, q=q, k=k, v=v, mask=mask, rest=())

    def queries_at(self, columns: Tensor) -> AttentionCall:
        """Return a call on some of the queries, which goes through the rest of the stack too.

        Args:
            columns: numbers [n] of the queries. A causal call gets a mask that says so.

        Raises:
            HostError: if the tokens have slices and not masks (denoisers).
        """
        outer, mask = self.spans.tokens, self.mask
        if outer is None:
            from .errors import HostError

            raise HostError("queries_at is for the decoders of language models")
        tokens = outer.at(columns)
        if mask is None and self.is_causal:
            seen = torch.arange(self.k.shape[2], device=self.q.device)
            mask = (seen <= columns[:, None])[None, None]
        elif mask is not None and mask.shape[-2] > 1:
            mask = mask[..., columns, :]
        return _changed(
            self,
            q=self.q[:, :, columns],
            mask=mask,
            is_causal=False,
            spans_of=lambda call: Spans((), (), tokens=tokens),
        )

    def repeat_kv(self, x: Tensor) -> Tensor:
        """Return keys or values [B, Hkv, N, D] with one head per query head [B, H, N, D]."""
        times = self.q.shape[1] // x.shape[1]
        return x if times == 1 else x.repeat_interleave(times, dim=1)


def _take_mask(
    mask: Tensor | None, rows: slice, heads: Tensor | None, shape: torch.Size
) -> Tensor | None:
    if mask is None or mask.ndim < 3:
        return mask
    if mask.ndim == 3:  # [H or 1, Nq, Nk], as attention broadcasts it
        mask = mask[None]
    if mask.shape[0] == shape[0] > 1:
        mask = mask[rows]
    if heads is not None and mask.shape[1] == shape[1] > 1:
        mask = mask[:, heads]
    return mask


WrittenRow = Callable[
    [Tensor, Tensor, Tensor, "Tensor | None", "float | None", int], "Tensor | None"
]
"""Attention of one written token: (q, k, v, mask, scale) as in an `AttentionCall`, and the number
of tokens so far, of which a sliding window holds the last ones; to the output [B, 1, H, Dv], or
None where it must be asked in the usual way."""


Reading = Callable[
    [
        int, Tensor, Tensor, Tensor, "Tensor | None", "float | None", bool, "Tensor | None",
        "Tensor | None", Tensor,
    ],
    "Tensor | None",
]  # fmt: skip
"""What is done to a prompt at a site, for a control that is alone there and keeps it stock.

Called with
- the number of the site,
- q [B, H, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv], mask, scale and is_causal as in an
  `AttentionCall`; beside a mask (FlashAttention has padding there) both hold;
- hidden [B, Nq, width], what the layer reads, where the control asks for it (`reads_residual`);
- heads bool [H] on the CPU, those to touch, None for all of them;
- out [B, Nq, H, Dv], contiguous, of the model's own attention.

Returns the output [B, Nq, H, Dv], which may be `out`, changed in place; or None, with nothing
changed, where it must be asked in the usual way."""


Watch = Callable[[Tensor, Tensor, "Tensor | None", "float | None"], bool]
"""Looks at (q, k, mask, scale) of a call whose output stays the model's own; False, with nothing
done, where the call is of another kind and must be asked in the usual way."""


def STOCK(*_: Any) -> None:
    """The `WrittenRow` of a site where the model's own attention is left as it is."""


@dataclass
class ForwardCall:
    """One forward of the denoiser, seen by one control of the stack.

    Args:
        inputs: the denoiser's arguments by name.
        rows: roles of the batch rows.
        step: where the run stands.
        run: the run (pipeline arguments, guidance scale, scheduler).
        state: this control's own state of this run.
        role: the name that this control's own extra rows carry.
        denoiser: attribute of the pipeline that holds the denoiser.
        cached: whether a diffusers cache is on, which needs passes of constant batch size.
        shift: what controls added to the latents in this step, as far as it is in `inputs`.
        model: the denoiser itself.
        stack: all entries that act at this step, outermost first.
    """

    inputs: dict[str, Any]
    rows: Rows
    step: Step
    run: Run
    base: Callable[[ForwardCall], Tensor]
    extend_inputs: Callable[[dict[str, Any], Rows, slice], dict[str, Any]]
    take_inputs: Callable[[dict[str, Any], Rows, slice], dict[str, Any]]
    denoiser: str = "model"
    cached: bool = False
    rest: tuple[Entry, ...] = ()
    state: Any = None
    role: str = ""
    shift: Tensor | None = None
    model: Any = None
    stack: tuple[Entry, ...] = ()

    def proceed(self) -> Tensor:
        """Run the rest of the stack and the denoiser.

        Returns:
            The denoiser's sample, first dimension = len(self.rows).
        """
        if not self.rest:
            return self.base(self)
        entry, rest = self.rest[0], self.rest[1:]
        return entry.denoise(replace(self, rest=rest))

    def extend(self, source: str, role: str, **changes: Any) -> ForwardCall:
        """Return a call whose batch has one more group: a copy of `source` under `role`.

        Args:
            source: role of the rows to copy.
            role: role of the new rows.
            **changes: denoiser inputs of the new rows, each with first dimension n.
        """
        inputs = self.extend_inputs(self.inputs, self.rows, self.rows.slice(source))
        for name, value in changes.items():
            inputs[name] = _append(name, self.inputs.get(name), value)
        return replace(self, inputs=inputs, rows=self.rows.plus(role))

    def only(self, source: str, role: str, **changes: Any) -> ForwardCall:
        """Return a call on the rows of `source` alone, under `role`: a pass of its own."""
        inputs = self.take_inputs(self.inputs, self.rows, self.rows.slice(source))
        inputs.update(changes)
        return replace(self, inputs=inputs, rows=Rows((role,), self.rows.n))

    @property
    def latents(self) -> Tensor:
        """The latents [n, ...] as the denoiser is given them: scaled, other channels left out."""
        from .hosts.latents import latents

        return latents(self)

    def with_latents(self, x: Tensor) -> ForwardCall:
        """Return a call with other latents [n, ...] in every group; gradients flow to them."""
        from .hosts.latents import with_latents

        return with_latents(self, x)

    def move_latents(self, x: Tensor) -> ForwardCall:
        """Return a call with other latents [n, ...], and give them to the rest of the step.

        The step's other denoiser calls and the scheduler get the difference too.

        Raises:
            HostError: for a bare denoiser, whose caller holds the latents.
        """
        from .hosts.latents import move

        return move(self, x)

    def caught_up(self) -> ForwardCall:
        """Return the call with what `move_latents` added since in this step."""
        from .hosts.latents import caught_up

        return caught_up(self)


def _append(name: str, old: Any, new: Tensor) -> Tensor:
    from .errors import HostError

    if not isinstance(old, Tensor) or old.shape[1:] != new.shape[1:]:
        had = tuple(old.shape) if isinstance(old, Tensor) else old
        raise HostError(
            f"new rows of {name!r} have shape {tuple(new.shape)}, which does not continue {had}: "
            "the prompts must have equal token lengths here (pad them with max_sequence_length)"
        )
    return torch.cat([old, new.to(old)])


@dataclass
class LogitsCall:
    """The logits of the next token of a language model, seen by one control of the stack.

    Args:
        inputs: the arguments of this forward of the whole model by name, without cache and
            switches; always with "input_ids" [B, n] and "attention_mask" [B, past + n].
        images: token ids that stand for images.
        marks: ids of tokens that go around images.
        past: tokens in the cache before this forward; 0 where a prompt is read, and in every
            forward without a cache.
        written: tokens of the answer so far, 0 where the prompt is read.
        step: number of this forward since the prompt.
        run: state of this generation.
        base: returns the model's own logits.
        again: runs the model on (inputs, cache or None, whether controls take part) and
            returns the last logits [B, V] and the cache.
        state: this control's own state of this run.
    """

    inputs: dict[str, Any]
    images: tuple[int, ...]
    marks: tuple[int, ...]
    past: int
    written: int
    step: Step
    run: Run
    base: Callable[[], Tensor]
    again: Callable[[dict[str, Any], Any, bool], tuple[Tensor, Any]]
    rest: tuple[Entry, ...] = ()
    state: Any = None

    def proceed(self) -> Tensor:
        """Run the rest of the stack.

        Returns:
            The logits [B, V] of the last token, float32 or wider.
        """
        if not self.rest:
            return self.base()
        entry, rest = self.rest[0], self.rest[1:]
        return entry.decode(replace(self, rest=rest))


@dataclass
class StepCall:
    """The latents between two steps, seen by the step plane.

    Args:
        latents: the pipeline's latents, as they go into `step` (shape of the pipeline).
        step: the step that comes next; its index is 0 before the first one.
        run: the run.
        state: this control's own state of this run.
    """

    latents: Tensor
    step: Step
    run: Run
    state: Any = None
