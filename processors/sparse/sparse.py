"""What sparse attention of videos shares: when it is sparse, and how a call is computed.

A pattern says which blocks of keys each block of queries keeps; the rest is the same for all of
them: layers and steps that stay dense, heads, padding of the text, another order of the tokens.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import AttnctlWarning, HostError, OptionError
from attnctl.kernels import BlockMask, TileOrder, block_sparse_attention
from attnctl.records import AttentionCall, Step
from attnctl.schedule import Schedule, Window

from .account import SparseAccount
from .radial_plan import attention_share
from .shapes import VideoTokens, paddings, video_tokens

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection
    from attnctl.sites import Sites

__all__ = ["Pattern", "SparseAttention", "SparseSteps"]


@dataclass(frozen=True)
class SparseSteps(Schedule):
    """Steps inside the windows, without those of `dense`."""

    dense: Schedule = dataclasses.field(default_factory=lambda: Schedule(()))

    def __contains__(self, step: Step) -> bool:
        return super().__contains__(step) and step not in self.dense


class Pattern(NamedTuple):
    """What is kept of a sequence.

    Args:
        mask: kept blocks, of the tokens in `order`.
        order: None for the order in which the model has them.
    """

    mask: BlockMask
    order: TileOrder | None = None


@dataclass
class _State:
    """Of one run.

    Args:
        told: names of controls that warned of a full mask; of the whole run.
        patterns: by sequence and kind of attention.
        computed: part of the blocks, by step and site.
        share: part of a dense step's time in self-attention.
    """

    told: set[str] = dataclasses.field(default_factory=set)
    patterns: dict[tuple[VideoTokens, bool], Pattern] = dataclasses.field(default_factory=dict)
    computed: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    share: float = 0.0


@dataclass(frozen=True)
class SparseAttention(Control):
    """Block-sparse self-attention of video models.

    Args:
        dense_layers: how many of the first blocks stay dense.
        start: fraction of the run up to which all attention stays dense.
        stop: fraction of the run from which it is dense again.
        dense_steps: further windows of dense steps, such as "steps:0-12 0.9-1".
        heads: selector; the heads not named stay dense, which then costs both.
        backend: of `attnctl.kernels.block_sparse_attention`.
    """

    dense_layers: int = 1
    start: float = 0.25
    stop: float = 1.0
    dense_steps: str = ""
    heads: Any = "all"
    backend: str = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    replaces_softmax: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dense_layers < 0:
            raise OptionError(f"{self.name}: dense_layers={self.dense_layers}, expected 0 or more")
        _ = self.schedule

    @property
    def selector(self) -> Any:
        """The heads."""
        return self.heads

    @property
    def schedule(self) -> Schedule:
        """Steps at which attention is sparse."""
        window = Window(self.start, self.stop)
        return SparseSteps((window,), Schedule.of(self.dense_steps))

    @property
    def neutral(self) -> bool:
        """No step is sparse."""
        return self.schedule.empty

    @abstractmethod
    def pattern(self, tokens: VideoTokens, joint: bool) -> Pattern:
        """Return what is kept of a sequence; called once for each that a run meets.

        Args:
            tokens: where the video lies, and how many of the last tokens are no keys.
            joint: whether text takes part in the attention.
        """

    def begin(self, run: Run, selection: Selection) -> _State:
        """Return the state of one run."""
        return _State(run.cache.setdefault("sparse/told", set()))

    def account(self, state: _State, steps: tuple[int, ...], sites: Sites) -> SparseAccount | None:
        """Return what was computed in each layer and step; None if all of it was dense."""
        if not state.computed:
            return None
        layers = {s.layer: s.index for s in sites if s.kind in self.kinds and s.layer is not None}
        table = [[state.computed.get((i, at), 1.0) for at in layers.values()] for i in steps]
        computed = torch.tensor(table, dtype=torch.float64)
        return SparseAccount(computed, steps, tuple(layers), state.share)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the kept blocks; dense layers go on as they are."""
        if call.site.layer is not None and call.site.layer < self.dense_layers:
            return call.proceed()
        tokens = video_tokens(call, self.name)
        if call.is_causal:
            raise OptionError(f"{self.name}: {call.site} is causal; its mask is not")
        if not bool(call.heads.any()):  # on several GPUs the heads may all be at others
            return call.proceed()
        sparse = self._sparse(call, tokens)
        if bool(call.heads.all()):
            return sparse
        chosen = call.heads.to(sparse.device)[:, None, None]
        return torch.where(chosen, sparse, call.proceed())

    def _sparse(self, call: AttentionCall, tokens: VideoTokens) -> Tensor:
        """Return sparse attention; rows of equal padding at once."""
        padding = paddings(call, tokens.after, self.name)
        out = None
        for pad in sorted(set(padding)):
            rows = [i for i, p in enumerate(padding) if p == pad]
            some = len(rows) < len(padding)
            q, k, v = (x[rows] if some else x for x in (call.q, call.k, call.v))
            part = self._rows(call, q, k, v, tokens._replace(padding=pad))
            if not some:
                return part
            out = part.new_empty((len(padding), *part.shape[1:])) if out is None else out
            out = out.index_copy(0, torch.tensor(rows, device=part.device), part)
        assert out is not None
        return out

    def _rows(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, tokens: VideoTokens
    ) -> Tensor:
        """Return the output of rows that share a pattern."""
        mask, order = self._pattern(call, tokens)
        _take_down(call, mask)
        compute = self._kernel(call, mask)
        if order is None:
            return compute(q, k[:, :, : mask.nk], v[:, :, : mask.nk])
        if tokens.padding:
            raise HostError(
                f"{self.name}: {call.site} pads the text by {tokens.padding} tokens, which a "
                "pattern with its own order of tokens cannot leave out"
            )
        # the order has the text behind the video
        q, k, v = (order.sort(torch.roll(x, -tokens.before, 2)) for x in (q, k, v))
        return torch.roll(order.unsort(compute(q, k, v)), tokens.before, 2)

    def _kernel(
        self, call: AttentionCall, mask: BlockMask
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = block_sparse_attention(
                q, k, v, mask, scale=call.scale, backend=self.backend
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        return compute

    def _pattern(self, call: AttentionCall, tokens: VideoTokens) -> Pattern:
        state = call.state if isinstance(call.state, _State) else _State()
        key = (tokens, call.site.kind == "joint")
        if key not in state.patterns:
            mask, order = self.pattern(*key)
            state.patterns[key] = Pattern(mask.take_heads(call.part), order)
            self._warn_if_full(state.patterns[key].mask, state)
        return state.patterns[key]

    def _warn_if_full(self, mask: BlockMask, state: _State) -> None:
        if self.name in state.told or mask.density < 1:
            return
        state.told.add(self.name)
        warnings.warn(
            f"{self.name} keeps every block of {mask}: the video is too short or too small for "
            "it to save anything",
            AttnctlWarning,
            stacklevel=2,
        )


def _take_down(call: AttentionCall, mask: BlockMask) -> None:
    """Note what a call computes; the last one of a step and site counts."""
    if isinstance(call.state, _State):
        both = 0 if bool(call.heads.all()) else 1
        call.state.computed[call.step.index, call.site.index] = mask.density + both
        call.state.share = attention_share(mask.nq, call.site.heads * call.site.head_dim)
