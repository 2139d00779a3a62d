"""Where picture, text and samples lie in an attention call of a text-conditioned model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnctl.errors import HostError
from attnctl.records import AttentionCall

__all__ = ["Placing", "has_text", "place", "rows_of_mask", "text_keys"]


@dataclass(frozen=True)
class Placing:
    """Facts of one call.

    Args:
        rows: the rows of the role, in the batch.
        first: which sample of the run the first of them is.
        samples: samples of the run.
        image: the image tokens among the queries.
        text: the text tokens among the keys.
        grid: (frames, height, width) of the image tokens.
    """

    rows: slice
    first: int
    samples: int
    image: slice
    text: slice
    grid: tuple[int, int, int]


def has_text(call: AttentionCall) -> bool:
    """Whether the keys hold text; a refiner's or the image branch of an adapter's do not."""
    spans = call.spans
    return not spans.k or spans.keys("text") is not None


def place(call: AttentionCall, role: str, control: str) -> Placing | None:
    """Return where things lie; None if the call has no row of the role.

    Args:
        call: a call of cross- or joint attention.
        role: which rows.
        control: name of the control that asks, for errors.

    Raises:
        HostError: if the places are not known, or the rows are no samples.
    """
    rows, spans = call.slice(role), call.spans
    if rows is None:
        return None
    image, text, grid = spans.queries("image"), spans.keys("text"), spans.grid
    if image is None or text is None or grid is None:
        raise HostError(
            f"{call.site}: which tokens are text, and where on the grid the image tokens lie, is "
            "not known here; select other sites"
        )
    count = rows.stop - rows.start
    # one row at a time (Mochi), else a group of rows
    alone = call.q.shape[0] == 1 and len(call.rows) > 1
    if count != call.rows.n and not alone:
        raise HostError(
            f"{call.site}: {count} attention rows for {call.rows.n} samples (frames folded into "
            f"the batch, perhaps); {control} does not know their order: select other sites"
        )
    first = call.index - call.rows.slice(role).start if alone else 0
    return Placing(rows, first, call.rows.n, image, text, grid)


def rows_of_mask(mask: Tensor | None, image: slice) -> Tensor | None:
    """Return the part of an attention mask that belongs to some queries."""
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., image, :]


def text_keys(
    groups: Sequence[Sequence[int]], text: slice, site: object
) -> tuple[tuple[int, ...], ...]:
    """Return token positions counted over all keys of a call.

    Args:
        groups: positions in the text, counted from 0.
        text: the keys of text.
        site: of the call, for errors.

    Raises:
        HostError: if the text has fewer tokens.
    """
    length = text.stop - text.start
    last = max((p for one in groups for p in one), default=0)
    if last >= length:
        raise HostError(
            f"{site}: a word has the token position {last}, but there are {length} text "
            "tokens here, counted from 0"
        )
    return tuple(tuple(text.start + p for p in one) for one in groups)
