"""PAI: attention to the image raised where the answer is made.

With a = scale q k^T the logits of a row and alpha >= 0, in the chosen rows, heads and layers

    a_j <- a_j + alpha |a_j|    for the image tokens j

before the softmax. Logits above 0 grow by the factor 1 + alpha, those below 0 shrink in size.

References:
    Liu, Zheng and Chen, "Paying More Attention to Image: A Training-Free Method for Alleviating
    Hallucination in LVLMs", 2024 (arXiv 2407.21771): the attention part. The second part, a
    contrast with a pass without the image, is no attention control.

Defaults: alpha 0.2, layers 2 to the last, the answer row: the official command line's.
Deviations: grouped queries work; the rows that predict the first token are always among the
answer's (in the official code they are left out when the second part is on); |a| is taken
before the mask, so that a masked image token stays masked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import Control, register
from attnctl.errors import OptionError
from attnctl.hosts.run import Run
from attnctl.kernels.group_attention import Edit
from attnctl.records import AttentionCall, Reading, Tokens, WrittenRow
from attnctl.selectors import Selection
from attnctl.sites import Sites

from .rows import (
    EditedPrompt,
    EditedRow,
    RowMemory,
    edited,
    kernel_fits,
    recomputed_rows,
    tokens_of,
)

__all__ = ["PAI", "add_bias", "raised_logits"]


def raised_logits(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Return what is added to the logits.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D], H a multiple of Hkv.
        weights: alpha times the scale of the logits at the image tokens and 0 elsewhere,
            broadcastable to [B, H, Nq, Nk].

    Returns:
        weights |q k^T|, [B, H, Nq, Nk] in the dtype of q.
    """
    batch, heads, queries, width = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, width)  # keys are never repeated
    size = (grouped @ k.transpose(-1, -2)).view(batch, heads, queries, -1)
    return size.abs() * weights


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Return a bias on the logits and the call's own mask as one additive mask."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask.to(bias.dtype)


@dataclass(eq=False)
class RaisedKeys(RowMemory):
    """What the layers of a forward share: the keys to raise, and the weights of one row."""

    weights: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)
    _codes: tuple[Tokens, Tensor] | None = None

    def codes(self, tokens: Tokens, raised: Callable[[Tokens], Tensor]) -> Tensor:
        """Return the keys to raise, uint8 [B, Nk]."""
        if self._codes is None or self._codes[0] is not tokens:
            self._codes = tokens, raised(tokens).view(torch.uint8)
        return self._codes[1]


@register
@dataclass(frozen=True)
class PAI(Control):
    """Attention to the image raised in the rows that predict the answer.

    Args:
        heads: selector, within the layers.
        alpha: alpha >= 0; 0 is off.
        rows: "answer" (the prompt's last token and what is written), "text" (all text tokens)
            or "all" (image tokens too).
        first_layer: first layer in which it acts.
        last_layer: last layer in which it acts, None for the model's last.
    """

    heads: Any = "all"
    alpha: float = 0.2
    rows: Literal["answer", "text", "all"] = "answer"
    first_layer: int = 2
    last_layer: int | None = None

    name: ClassVar[str] = "pai"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise OptionError(f"{self.name}: alpha={self.alpha} must be finite, 0 or above")
        if self.rows not in ("answer", "text", "all"):
            raise OptionError(f"{self.name}: rows={self.rows!r} must be answer, text or all")
        last = math.inf if self.last_layer is None else self.last_layer
        if not 0 <= self.first_layer <= last:
            raise OptionError(
                f"{self.name}: layers {self.first_layer} to {self.last_layer}; expected "
                "0 <= first_layer <= last_layer"
            )

    @property
    def selector(self) -> Any:
        """The heads, without those of layers outside the range."""
        words = [self.heads] if isinstance(self.heads, str) else list(self.heads)
        if self.first_layer > 0:
            words.append(f"!L0-{self.first_layer - 1}")
        if self.last_layer is not None:
            words.append(f"!L{self.last_layer + 1}-{2**31}")
        return " ".join(w if isinstance(w, str) else "L{}H{}".format(*w) for w in words)

    @property
    def neutral(self) -> bool:
        """alpha = 0."""
        return self.alpha == 0

    def resolve(self, sites: Sites) -> Control:
        """Return the control with an open range where it ends at the model's last layer.

        Raises:
            OptionError: if the model has fewer layers than the range names.
        """
        layers = [s.layer for s in sites if s.kind in self.kinds and s.layer is not None]
        if not layers:
            return self  # the selector says what is missing
        if max(self.first_layer, self.last_layer or 0) > max(layers):
            raise OptionError(
                f"{self.name}: layers {self.first_layer} to "
                f"{'the last' if self.last_layer is None else self.last_layer} are not all "
                f"there: this model has layers 0 to {max(layers)}"
            )
        ends = self.last_layer == max(layers)
        return dataclasses.replace(self, last_layer=None) if ends else self

    def begin(self, run: Run, selection: Selection) -> RaisedKeys:
        """Return room for what the layers of a forward share."""
        return RaisedKeys()

    def attend(self, call: AttentionCall) -> Tensor:
        """Run the stock attention, then the rows with raised logits again."""
        tokens = tokens_of(call, self.name)
        if kernel_fits(call, tokens):
            state: RaisedKeys = call.state
            codes = state.codes(tokens, self.raised)
            edit = Edit(codes, self.alpha, heads=state.heads_of(call))
            return edited(call, edit, lambda: state.rows(tokens, self.rows, call.q))
        if call.q.shape[2] == 1:  # a written token
            return self._raise(call, tokens)
        return recomputed_rows(
            call, tokens, self.rows, lambda some, few, _: self._raise(some, few)
        )

    def written(self, call: AttentionCall) -> WrittenRow | None:
        """Return the edit of one row, where the kernel can run: images are in the prompt."""
        tokens = tokens_of(call, self.name)
        if type(self).raised is not PAI.raised or not kernel_fits(call, tokens):
            return None
        codes = tokens.labels_there()
        edit = Edit(codes, self.alpha, heads=call.state.heads_of(call))
        return EditedRow(edit, call.state.shared)

    def row_edit(self, site: int, state: Any, tokens: Tokens, rows: int) -> Edit | None:
        """Return the edit of one row."""
        if type(self).raised is not PAI.raised:
            return None
        return Edit(tokens.labels_there(), self.alpha)

    def reading(self, call: AttentionCall) -> Reading | None:
        """Return the edit of a prompt's rows, where the kernel can run."""
        tokens, state = tokens_of(call, self.name), call.state
        if type(self).raised is not PAI.raised or call.q.shape[2] == 1:
            return None
        if not kernel_fits(call, tokens):
            return None
        edit = Edit(tokens.labels_there(), self.alpha)
        return EditedPrompt(self.rows, call.q, tokens, edit, state)

    def _raise(self, call: AttentionCall, tokens: Tokens) -> Tensor:
        bias = raised_logits(call.q, call.k, self._weights(call, tokens))
        return call.proceed(mask=add_bias(call.mask, bias), is_causal=False)

    def _weights(self, call: AttentionCall, tokens: Tokens) -> Tensor:
        """Return alpha times the scale where logits are to be raised."""
        single, shared = call.q.shape[2] == 1, call.state.weights
        which = -1 if call.every_head else call.site.index
        known = shared.get(which)
        at = (call.step.index, call.k.shape, call.scale)
        if single and known is not None and known[0] == at:
            return known[1]
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        where = self.raised(tokens)[:, None, None]
        if single:
            where = where & self._chosen(call, tokens)[:, None, :, None]
        if not call.every_head:
            where = where & call.heads.to(where.device)[:, None, None]
        weights = where.to(call.q.dtype) * (self.alpha * scale)
        if single:
            shared[which] = (at, weights)
        return weights

    def raised(self, tokens: Tokens) -> Tensor:
        """Return the keys whose logits are raised, bool [B, Nk]."""
        return tokens.keys("image")

    def _chosen(self, call: AttentionCall, tokens: Tokens) -> Tensor:
        """Return the rows to treat, bool [B, Nq]."""
        if self.rows == "all":
            return call.q.new_ones((1, call.q.shape[2]), dtype=torch.bool)
        return tokens.queries(self.rows)
