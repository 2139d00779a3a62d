"""The attention sites of a model as a table, with tokens counted on a model without weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import attnctl
from attnctl.errors import SelectorError
from attnctl.records import AttentionCall, ForwardCall, Site
from attnctl.selectors import Selection
from attnctl.sites import Sites

from .tables import paragraph, table

__all__ = ["count_tokens", "sites_text"]

KINDS = ("self", "cross", "joint", "text", "causal", "linear", "other")
_SELECTABLE = tuple(kind for kind in KINDS if kind != "linear")
_DRY_STEPS = 4


class _Seen(Exception):
    """Ends a dry run after its first denoiser call."""


@dataclass(frozen=True)
class _Counter(attnctl.Control):
    """Notes (queries, keys) of the first attention call of each site."""

    tokens: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)

    name: ClassVar[str] = "count"
    kinds: ClassVar[tuple[str, ...]] = _SELECTABLE

    def attend(self, call: AttentionCall) -> Any:
        """Count."""
        place = (call.site.denoiser, call.site.index)
        self.tokens.setdefault(place, (call.q.shape[2], call.k.shape[2]))
        return call.proceed()

    def denoise(self, call: ForwardCall) -> Any:
        """Stop after one call of the denoiser."""
        call.proceed()
        raise _Seen


def count_tokens(pipe: Any) -> dict[tuple[str, int], tuple[int, int]]:
    """Return (queries, keys) by (denoiser, site index) at the pipeline's default size.

    Args:
        pipe: a pipeline; one without weights (`models.skeleton`) is enough.

    Returns:
        As many sites as a dry run of one step reaches; none if the pipeline cannot be run so, or
        for a vision-language model, whose tokens depend on what it is asked.
    """
    if not hasattr(pipe, "scheduler"):
        return {}
    counter = _Counter()
    pipe.set_progress_bar_config(disable=True)
    for times in (contextlib.nullcontext, _times_on_cpu):
        # the table says "-" after a failure: a count is a convenience, any model must be listed
        with contextlib.suppress(Exception), times(pipe.scheduler), attnctl.patch(pipe, counter):
            pipe(prompt="", num_inference_steps=_DRY_STEPS)
        if counter.tokens:
            break
    return counter.tokens


@contextlib.contextmanager
def _times_on_cpu(scheduler: Any) -> Iterator[None]:
    """Keep the scheduler's times off the meta device: schedulers look into them."""
    stock = scheduler.set_timesteps

    @functools.wraps(stock)
    def set_timesteps(*args: Any, device: Any = None, **kwargs: Any) -> None:
        stock(*args, device="cpu", **kwargs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def sites_text(pipe: Any, kind: str | None, selector: str | None, width: int | None) -> str:
    """Return the table of a pipeline's sites and a line that sums it up.

    Args:
        pipe: the pipeline, or a vision-language model.
        kind: list only this kind.
        selector: list only these sites, and how many of their heads are selected.
        width: letters per line, None for no limit.

    Raises:
        SelectorError: if nothing matches.
    """
    sites = attnctl.sites(pipe)
    shown = [s for s in sites if kind in (None, s.kind)]
    if not shown:
        have = ", ".join(sorted({s.kind for s in sites}))
        raise SelectorError(f"the model has no {kind} sites; its kinds are: {have}")
    chosen = None if selector is None else _select(sites, kind, selector)
    tokens = count_tokens(pipe)
    if chosen is not None:
        shown = [s for s in shown if (s.denoiser, s.index) in chosen]
    several = len({s.denoiser for s in sites}) > 1
    rows = [_row(s, tokens, chosen, several) for s in shown]
    heads = ["layer", "kind", "heads", "dim", "tokens", "name"]
    if chosen is not None:
        heads.insert(3, "chosen")
    text = table(heads, rows, width, "l" + "l" + "r" * (len(heads) - 3))
    advice = f"{_summary(shown, chosen)}{' --wide: whole names.' if '~' in text else ''}"
    return f"{text}\n{paragraph(advice, width or 1000)}"


def _select(sites: Sites, kind: str | None, selector: str) -> dict[tuple[str, int], int]:
    """Return the number of selected heads by (denoiser, site index)."""
    kinds = _SELECTABLE if kind is None else (kind,)
    chosen: dict[tuple[str, int], int] = {}
    for denoiser in dict.fromkeys(s.denoiser for s in sites):
        mine = Sites(s for s in sites if s.denoiser == denoiser)
        selection: Selection = mine.select(selector, kinds)
        chosen |= {(denoiser, index): int(mask.sum()) for index, mask in selection.items()}
    return chosen


def _row(
    site: Site,
    tokens: dict[tuple[str, int], tuple[int, int]],
    chosen: dict[tuple[str, int], int] | None,
    several: bool,
) -> list[object]:
    place = (site.denoiser, site.index)
    layer = "-" if site.layer is None else f"L{site.layer}"
    name = f"{site.denoiser}.{site.name}" if several else site.name
    row: list[object] = [layer, site.kind, site.heads, site.head_dim, _tokens(tokens.get(place))]
    if chosen is not None:
        row.insert(3, chosen[place])
    return [*row, name]


def _tokens(counted: tuple[int, int] | None) -> str:
    if counted is None:
        return "-"
    queries, keys = counted
    return str(queries) if queries == keys else f"{queries}x{keys}"


def _summary(shown: Sequence[Site], chosen: dict[tuple[str, int], int] | None) -> str:
    text = f"{len(shown)} site{'s' * (len(shown) != 1)}, {sum(s.heads for s in shown)} heads"
    if chosen is not None:
        text += f", {sum(chosen[s.denoiser, s.index] for s in shown)} of them selected"
    return f"{text}. Select heads as L3H1, L0-2, H2, a part of a name, or a kind."
