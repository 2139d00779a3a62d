"""Some rows of a decoder's attention computed a second time: what row edits share.

The stock attention runs for all queries; the rows that an edit is about are then computed with
explicit weights, in parts of bounded size, and put in their place. Nothing is kept of the maps.
Where a kernel can do this (`kernel_fits`), it does so in one launch, and what it needs is made
once for all layers (`RowMemory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnctl.errors import HostError
from attnctl.kernels.group_attention import (
    Edit,
    Rows,
    Shared,
    edit_rows,
    edited_row,
    rows_fit,
)
from attnctl.records import AttentionCall, Tokens

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
    """What is done to all later written tokens of a prompt: one edit (`Control.written`).

    Args:
        edit: the edit of a site.
        shared: of all sites' edits.
    """

    def __init__(self, edit: Edit, shared: Shared) -> None:
        self.edit, self.shared = edit, shared

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        total: int,
    ) -> Tensor | None:
        """Return the output [B, 1, H, D], None where the kernel cannot take the call."""
        edit, again = self.edit, self.shared.again
        if again is not None:
            out: Tensor | None = again(
                q, k, v, None, edit.codes, edit.heads, mask, scale, False, total
            )
            if out is not None:
                return out
        self.shared.total, first = total, max(0, total - k.shape[2])
        edit = edit if first == edit.first else edit._replace(first=first)
        return edited_row(q, k, v, edit, mask, scale, shared=self.shared)


class Queries(NamedTuple):
    """Shape and place of a call's queries, for those who would otherwise keep them.

    Args:
        shape: B, H, Nq, D.
        device: where they are.
    """

    shape: torch.Size
    device: torch.device


class EditedPrompt:
    """What is done to a prompt at every site: rows of the stock output edited (`Control.reading`).

    Args:
        role: of the queries to edit, or "all"; where a call is causal, those that see no image
            token are left as they are.
        q: [B, H, Nq, D], the queries of the first call.
        tokens: roles of its tokens.
        edit: the edit, with the codes of every site if these are the same.
        memory: where rows and heads are kept.
        codes: returns the codes of a site from its number and what its layer reads; None for
            those of the edit.
    """

    def __init__(
        self,
        role: str,
        q: Tensor,
        tokens: Tokens,
        edit: Edit,
        memory: RowMemory,
        codes: Callable[[int, Tensor | None], Tensor] | None = None,
    ) -> None:
        self.role, self.tokens, self.q = role, tokens, Queries(q.shape, q.device)
        self.edit, self.memory, self.codes = edit, memory, codes
        labels = tokens.slots_here("image") if tokens.labels is None else tokens.labels
        self.total = labels.shape[1]
        self.shared = Shared(self.total)

    def __call__(
        self, site: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        scale: float | None, causal: bool, hidden: Tensor | None, chosen: Tensor | None,
        out: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Return the output [B, Nq, H, D], None where the kernel cannot take the call."""
        if q.device != self.q.device:  # a model on several GPUs
            return None
        codes = self.edit.codes if self.codes is None else self.codes(site, hidden)
        heads = None if chosen is None else self.memory.heads(site, chosen, q.device)
        again = self.shared.again
        if again is not None:
            done = again(q, k, v, out, codes, heads, mask, scale, causal, self.total)
            if done is not None:
                return out
        first = max(0, self.total - k.shape[2])  # above 0 in a sliding window
        edit = self.edit._replace(codes=codes, heads=heads, first=first)
        rows = self.memory.rows(self.tokens, self.role, self.q, causal)
        fits = edit_rows(q, k, v, out, edit, rows, mask, scale, causal, self.shared)
        return out if fits else None


def _found_rows(batch: int, n: int, tokens: Tokens, role: str, late: bool) -> NDArray[np.int32]:
    """Return the queries of a role in some row, as the table of `Rows`.

    In few steps, each of which takes a while to begin: a model waits for this.

    Args:
        batch: rows.
        n: queries, the last of all tokens so far.
        tokens: roles of the tokens.
        role: the role, or "all".
        late: without those in front of all image tokens of the batch.
    """
    labels = None if tokens.labels is None else tokens.labels.numpy()
    first = 0
    if late:
        image = tokens.slots_here("image").cpu().numpy() if labels is None else labels
        first = max(0, _first_image(image) - (image.shape[1] - n))
    if role == "answer" and tokens.answering is not None:
        return _table(batch, np.arange(max(first, tokens.answering), n))
    if role == "all":
        return _table(batch, np.arange(first, n))
    if role == "text" and labels is not None:
        there = labels[:, labels.shape[1] - n + first :] == 0
    else:
        there = tokens.queries_here(role).cpu().numpy()[:, first:]
    some = there[0] if batch == 1 else np.logical_or.reduce(there, axis=0)
    columns = some.nonzero()[0]
    table = _table(batch, columns + first)
    if batch > 1:
        table[1:] = there[:, columns]
    return table


def _table(batch: int, columns: NDArray[Any]) -> NDArray[np.int32]:
    """Return the table of queries that all rows have."""
    table = np.empty((1 + batch, len(columns)), dtype=np.int32)
    table[0], table[1:] = columns, 1
    return table


def _first_image(image: NDArray[Any]) -> int:
    """Return the first column of [B, N], in bytes, that is 1 in some row; N if none is."""
    n, there = image.shape[1], image.tobytes()
    first = n
    for start in range(0, len(there), n):
        found = there.find(b"\1", start, start + first)
        first = first if found < 0 else found - start
    return first


@dataclass(eq=False)
class RowMemory:
    """What the layers of a forward share about the rows of an edit."""

    _heads: dict[int, Tensor] = field(default_factory=dict)
    _rows: dict[bool, Rows] = field(default_factory=dict)  # by whether early ones are left out
    _of: Tokens | None = None  # whose rows these are
    shared: Shared = field(default_factory=Shared)
    """Of written tokens."""

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

    def rows(self, tokens: Tokens, role: str, q: Tensor | Queries, late: bool = False) -> Rows:
        """Return the queries of a role, or "all"; an edit has one role.

        Args:
            tokens: roles of a call's tokens.
            role: the role.
            q: [B, H, Nq, D], the call's queries.
            late: without those in front of all image tokens of the batch.
        """
        if self._of is not tokens:
            self._of = tokens
            self._rows.clear()
        if late not in self._rows:
            table = _found_rows(q.shape[0], q.shape[2], tokens, role, late)
            self._rows[late] = Rows(torch.from_numpy(table).to(q.device, non_blocking=True))
        return self._rows[late]
