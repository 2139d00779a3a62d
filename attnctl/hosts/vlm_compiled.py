"""Written tokens of a patched decoder in compiled code.

With a static cache `generate` compiles the model's call and, on a GPU, replays it as a CUDA
graph. What controls do to a written token there is an edit of one row of attention, the same for
all tokens after a prompt: `Control.row_edit` says which. Code is compiled for the numbers of the
edits (a `Form`); what differs from prompt to prompt, which keys they are about, lies in tensors
that stay where they are and are filled anew. Bookkeeping stays with Python, around that code.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adopt import Uncopied, original_class
from .vlm_tap import stock_attention
from .vlm_tokens import tokens_of

if TYPE_CHECKING:
    from ..kernels.group_attention import Edit
    from ..stack import Entry
    from .vlm_tokens import Sequence

__all__ = ["CompiledDecoder", "Filling", "Form", "Lookup", "compiler_options"]

_MOST_FORMS = 8
"""Forms that a decoder keeps, and shapes of the tensors of each."""


def compiler_options(model: Any, config: Any) -> dict[str, Any] | None:
    """Return the options of torch.compile that `generate` would use, None if it would not.

    Args:
        model: the model.
        config: the `CompileConfig` that the user gave, None for the model's own.
    """
    if "llama4" in model.config.model_type:  # as transformers has it
        return None
    if config is None:
        from transformers import CompileConfig

        config = getattr(model, "_default_compile_config", CompileConfig)()
    options: dict[str, Any] = config.to_dict()
    return options


class Lookup(Uncopied):
    """Where code that is being compiled finds the form it is compiled for; None for eager code."""

    form: Form | None = None


@dataclass(eq=False)
class Filling:
    """What a form's tensors hold after one prompt.

    Args:
        form: the form.
        codes: uint8 [B, P] for each of its sites.
        heads: bool [H] on the CPU for each of its sites.
        owners: by site, whose edit it is.
        rows: batch size.
        keys: the caches' room, of the largest.
        most: tokens up to which a token has the same place in every cache.
    """

    form: Form
    codes: list[Tensor]
    heads: list[Tensor]
    owners: dict[int, Entry]
    rows: int
    keys: int
    most: int


class Form:
    """A compiled call of a model with certain edits of written tokens.

    Args:
        cls: the model's class.
        edits: by site: its number among them, whether some heads only, and the numbers that
            `ops.call` takes.
        stock: the attention function of sites without an edit.
        device: where the decoder is.
        options: of torch.compile.
    """

    def __init__(
        self,
        cls: type,
        edits: dict[int, tuple[int, bool, tuple[float, bool, float, float]]],
        stock: Callable[..., Any],
        device: torch.device,
        options: dict[str, Any],
    ) -> None:
        from ..kernels.group_attention import ops

        self.edits, self.stock, self.operator = edits, stock, ops.call
        self.counts = _fixed((ops.COUNTS,), torch.int32, device)
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.codes = self.heads = self.counts
        self.holds: Filling | None = None
        self.run = torch.compile(_call_of(cls), **options)

    def fill(self, filling: Filling) -> None:
        """Let the tensors hold what a prompt is about, if they hold something else."""
        if self.holds is filling or not self.edits:
            return
        shape = len(self.edits), filling.rows, filling.keys
        if shape not in self.known:
            if len(self.known) >= _MOST_FORMS:
                self.known.clear()
            chosen = len(self.edits), len(filling.heads[0])
            self.known[shape] = (
                _fixed(shape, torch.uint8, self.counts.device),
                _fixed(chosen, torch.uint8, self.counts.device),
            )
        self.codes, self.heads = self.known[shape]
        tokens = filling.codes[0].shape[1]
        self.codes[:, :, :tokens].copy_(torch.stack(filling.codes))
        self.codes[:, :, tokens:].zero_()  # of a prompt before, or never filled
        self.heads.copy_(torch.stack(filling.heads))
        self.holds = filling

    def attend(
        self,
        site: int,
        module: nn.Module,
        call: tuple[Tensor, Tensor, Tensor, Tensor | None],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Return one site's attention [B, 1, H, Dv]: what is compiled."""
        if site not in self.edits:
            out: tuple[Tensor, Tensor | None] = self.stock(module, *call, **kwargs)
            return out
        at, some, numbers = self.edits[site]
        heads = self.heads[at] if some else None
        row = self.operator(
            *call, self.codes[at], heads, self.counts, numbers, kwargs.get("scaling")
        )
        return row, None


def _fixed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that CUDA graphs read where they are, without a copy for each replay."""
    with torch.inference_mode(False):  # may be filled outside of it later
        x = torch.zeros(shape, dtype=dtype, device=device)
    torch._dynamo.mark_static_address(x)
    return x


def _call_of(cls: Any) -> Callable[..., Any]:
    """Return a class's own call as a function that shares no compiled code with another."""
    stock = cls.__call__

    def call(model: Any, **kwargs: Any) -> Any:
        return stock(model, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


_FORMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Form]] = weakref.WeakKeyDictionary()
"""The forms of each decoder. Compiling takes long, so they outlive a patch, not the decoder."""


class CompiledDecoder:
    """The compiled forms of one decoder.

    Args:
        decoder: the decoder.
        modules: its attention modules by site index.
    """

    def __init__(self, decoder: nn.Module, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.lookup = Lookup()
        self.forms = _FORMS.setdefault(decoder, {})
        self.lock = threading.RLock()

    def clear(self) -> None:
        """Forget the prompts that the forms were filled for."""
        with self.lock:
            for form in self.forms.values():
                form.holds = None

    def run(self, model: Any, filling: Filling, kwargs: dict[str, Any]) -> Any:
        """Run compiled code; one thread at a time, since the tensors are shared."""
        form, before = filling.form, self.lookup.form
        with self.lock:
            form.fill(filling)
            self.lookup.form = form
            try:
                return form.run(model, **kwargs)
            finally:
                self.lookup.form = before

    def filling(
        self, model: Any, options: dict[str, Any], sequence: Sequence, active: list[Entry],
        rows: int, cache: Any,
    ) -> Filling | None:  # fmt: skip
        """Return the form for a written token and what it is to hold; None to run eagerly.

        Args:
            model: the model to call.
            options: of torch.compile.
            sequence: what is known of the tokens.
            active: entries that act.
            rows: batch size.
            cache: the cache.
        """
        key = tuple(e.serial for e in active), rows, id(model), repr(options)
        if key not in sequence.fillings:
            found = self._made(model, options, sequence, active, rows, cache)
            sequence.fillings[key] = found
        filling: Filling | None = sequence.fillings[key]
        if filling is not None and sequence.seen >= filling.most:  # a window that moves
            return None
        return filling

    def _made(
        self, model: Any, options: dict[str, Any], sequence: Sequence, active: list[Entry],
        rows: int, cache: Any,
    ) -> Filling | None:  # fmt: skip
        owners = _owners(active)
        caches = None if owners is None else self._caches(owners, cache)
        if owners is None or caches is None or not self._plain():
            return None
        device = caches[0].device if caches else next(model.parameters()).device
        sizes = [keys.shape[2] for keys in caches] or [1 << 62]
        tokens = tokens_of(sequence, sequence.seen, rows, 1, max(sizes), device)
        edits: list[Edit] = []
        for site, entry in owners.items():
            edit = entry.control.row_edit(site, entry.state(sequence.run), tokens, rows)
            if edit is None:
                return None
            edits.append(edit)
        numbers = {
            site: (
                i, site not in entry.entire,
                (float(edit.strength), bool(edit.move), float(edit.rho), float(edit.least)),
            )
            for i, ((site, entry), edit) in enumerate(zip(owners.items(), edits, strict=True))
        }  # fmt: skip
        longest = max((edit.codes.shape[1] for edit in edits), default=0)
        return Filling(
            self._form(model, numbers, device, options),
            [_wide(edit.codes.expand(rows, -1), longest) for edit in edits],
            [entry.selection[site] for site, entry in owners.items()],
            owners, rows, max(sizes), min(sizes),
        )  # fmt: skip

    def _caches(self, owners: dict[int, Entry], cache: Any) -> list[Tensor] | None:
        """Return the keys of the sites' caches; None if they are not static, on one device."""
        layers = getattr(cache, "layers", ())
        found = []
        for site in owners:
            at: Any = self.modules[site].layer_idx
            keys = getattr(layers[at], "keys", None) if at < len(layers) else None
            if not isinstance(keys, Tensor) or not getattr(layers[at], "is_compileable", False):
                return None
            found.append(keys)
        return found if len({keys.device for keys in found}) < 2 else None

    def _plain(self) -> bool:
        """Whether attention is scaled_dot_product_attention, which the edits are made for."""
        named = {m.__dict__["config"]._attn_implementation for m in self.modules}
        return named == {"sdpa"}

    def _form(
        self, model: Any, numbers: Any, device: torch.device, options: dict[str, Any]
    ) -> Form:
        cls = original_class(model)
        key = tuple(numbers.items()), cls, device, repr(options)
        if key not in self.forms:
            if len(self.forms) >= _MOST_FORMS:
                self.forms.clear()
            stock = stock_attention(self.modules[0])
            self.forms[key] = Form(cls, numbers, stock, device, options)
        return self.forms[key]


def _wide(codes: Tensor, n: int) -> Tensor:
    return codes if codes.shape[1] == n else nn.functional.pad(codes, (0, n - codes.shape[1]))


def _owners(active: list[Entry]) -> dict[int, Entry] | None:
    """Return which entry acts at which site; None if several do at one."""
    found: dict[int, Entry] = {}
    for entry in active:
        for site in entry.selection if entry.attends else ():
            if site in found:
                return None
            found[site] = entry
    return found
