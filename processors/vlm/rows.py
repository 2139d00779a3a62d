"""Some rows of a decoder's attention computed a second time: what row edits share.

The stock attention runs for all queries; the rows that an edit is about are then computed with
explicit weights, in parts of bounded size, and put in their place. Nothing is kept of the maps.
Where a kernel can do this (`kernel_fits`), it does so in one launch, and what it needs is made
once for all layers (`RowMemory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnctl.errors import HostError
from attnctl.kernels.group_attention import (
    Edit,
    Rows,
    edit_rows,
    edited_row,
    rows_fit,
)
from attnctl.records import AttentionCall, PromptCall, Residual, Tokens

__all__ = [
    "EditedPrompt",
    "EditedRow",
    "RowMemory",
    "edited",
    "kernel_fits",
    "recomputed_rows",
    "tokens_of",
]

_CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits held at once."""


def tokens_of(call: AttentionCall, name: str) -> Tokens:
    """Return the roles of a call's tokens.

    Args:
        call: the call.
        name: of the control, for the message.

    Raises:
        HostError: outside of a language model's decoder.
    """
    tokens = call.spans.tokens
    if tokens is None:
        raise HostError(f"{name} needs the decoder of a language model, got {call.site}")
    return tokens


def recomputed_rows(
    call: AttentionCall,
    tokens: Tokens,
    role: str,
    compute: Callable[[AttentionCall, Tokens, Tensor], Tensor],
) -> Tensor:
    """Return a call's output with the rows of a role computed anew.

    Args:
        call: the call; the rest of the stack runs on it once, for all rows.
        tokens: roles of its tokens.
        role: role of the queries to compute, or "all" for every query.
        compute: given a call on some queries, their tokens and their rows [B, H, R, Dv] of the
            output so far, returns these rows anew.
    """
    out = call.proceed()
    for columns in _parts(call, tokens, role):
        some = call.queries_at(columns)
        few, old = tokens_of(some, role), out[:, :, columns]
        new = compute(some, few, old)
        if role != "all":  # a batch's rows hold their tokens at different places
            new = torch.where(few.queries(role)[:, None, :, None], new, old)
        out = out.index_copy(2, columns, new)
    return out


def _parts(call: AttentionCall, tokens: Tokens, role: str) -> Iterator[Tensor]:
    """Yield the numbers of the queries of a role in some row, in parts of bounded size."""
    batch, heads, queries, _ = call.q.shape
    if role == "all":
        columns = torch.arange(queries, device=call.q.device)
    else:
        columns = tokens.columns(role)
    most = max(1, _CHUNK_ELEMENTS // (batch * heads * call.k.shape[2]))
    if len(columns):
        yield from columns.split(most)


def kernel_fits(call: AttentionCall, tokens: Tokens) -> bool:
    """Whether `edited` can take a call: nothing acts further in, and the kernel is there."""
    known = call.q.shape[2] > 1 or tokens.written
    return known and call.plain and not call.rest and rows_fit(call.q, call.k, call.v, call.mask)


def edited(call: AttentionCall, edit: Edit, rows: Callable[[], Rows]) -> Tensor:
    """Return a call's output with some rows edited by the kernel.

    Args:
        call: a call that `kernel_fits`.
        edit: the edit.
        rows: returns the queries to edit; not asked for a written token.
    """
    if call.q.shape[2] == 1:
        row = edited_row(call.q, call.k, call.v, edit, call.mask, call.scale)
        assert row is not None
        return row.transpose(1, 2)
    out = call.proceed().transpose(1, 2).contiguous()
    done = edit_rows(
        call.q, call.k, call.v, out, edit, rows(), call.mask, call.scale, call.is_causal
    )
    assert done
    return out.transpose(1, 2)


class EditedRow:
    """What is done to all later written tokens of a prompt: one edit (`Control.written`)."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        first: int,
    ) -> Tensor | None:
        """Return the output [B, 1, H, D], None where the kernel cannot take the call."""
        edit = self.edit if first == self.edit.first else self.edit._replace(first=first)
        return edited_row(q, k, v, edit, mask, scale)


class EditedPrompt:
    """What is done to a prompt at every site: rows of the stock output edited (`Control.reading`).

    Args:
        rows: the queries to edit.
        late: those of them that see an image token where a call is causal; the others are
            left as they are.
        total: tokens so far, those of this forward included.
        edit: returns the edit of a site from its number, the residual stream and the chosen
            heads beside the queries.
        memory: where the heads are kept.
    """

    def __init__(
        self,
        rows: Rows,
        late: Rows,
        total: int,
        edit: Callable[[int, Residual | None, Tensor | None], Edit],
        memory: RowMemory,
    ) -> None:
        self.rows, self.late, self.total = rows, late, total
        self.edit, self.memory = edit, memory
        self.device = rows.columns.device

    def __call__(self, call: PromptCall) -> Tensor | None:
        """Return the output [B, Nq, H, D], None where the kernel cannot take the call."""
        site, q, k, v, mask, scale, causal, residual, chosen, out = call
        if q.device != self.device:  # a model on several GPUs
            return None
        heads = None if chosen is None else self.memory.heads(site, chosen, q.device)
        edit = self.edit(site, residual, heads)
        if k.shape[2] < self.total:  # a sliding window
            edit = edit._replace(first=self.total - k.shape[2])
        rows = self.late if causal else self.rows
        done = edit_rows(q, k, v, out, edit, rows, mask, scale, causal)
        return out if done else None


def _before_images(image: Tensor, columns: Tensor, queries: int) -> int:
    """Return how many of a forward's queries, by number, come before all images of the batch.

    Args:
        image: bool [B, T], the image tokens among all tokens so far.
        columns: [R], numbers of queries in order.
        queries: number of the forward's tokens, the last of T.
    """
    there = image[0] if image.shape[0] == 1 else image.any(dim=0)
    first = int(there.view(torch.uint8).argmax())
    if not first and not there[0]:  # no image
        return len(columns)
    return int(torch.searchsorted(columns, first - (image.shape[1] - queries)))


@dataclass(eq=False)
class RowMemory:
    """What the layers of a forward share about the rows of an edit."""

    _heads: dict[int, Tensor] = field(default_factory=dict)
    _rows: tuple[Tokens, Rows, Rows] | None = None

    def heads(self, site: int, chosen: Tensor, device: torch.device) -> Tensor:
        """Return a site's chosen heads, bool [H], as uint8 beside the queries."""
        if site not in self._heads:
            self._heads[site] = chosen.to(device, torch.uint8)
        return self._heads[site]

    def heads_of(self, call: AttentionCall) -> Tensor | None:
        """Return a call's chosen heads uint8 [H] beside the queries, None for all of them."""
        if call.every_head:
            return None
        return self.heads(call.site.index, call.heads, call.q.device)

    def rows(self, call: AttentionCall, tokens: Tokens, role: str) -> Rows:
        """Return the queries of a role, or "all"; an edit has one role."""
        return self._found_rows(call, tokens, role)[1]

    def late_rows(self, call: AttentionCall, tokens: Tokens, role: str) -> Rows:
        """Return the same without those in front of all image tokens of the batch."""
        return self._found_rows(call, tokens, role)[2]

    def _found_rows(
        self, call: AttentionCall, tokens: Tokens, role: str
    ) -> tuple[Tokens, Rows, Rows]:
        if self._rows is None or self._rows[0] is not tokens:
            batch, _, n, _ = call.q.shape
            if role == "all":
                columns, flags = torch.arange(n), torch.ones((batch, n), dtype=torch.bool)
            else:
                columns, flags = tokens.rows(role)
            early = _before_images(tokens.slots_here("image"), columns, n)
            both = torch.cat([columns[None], flags]).int()  # go there at once
            both = both.to(call.q.device, non_blocking=True)
            late = both[:, early:] if batch == 1 else both[:, early:].contiguous()
            self._rows = tokens, Rows(both[0], both[1:]), Rows(late[0], late[1:])
        return self._rows
