"""VAR: attention that the sinks hold, given to the rest of the image.

In decoders a few image tokens, mostly background, get attention from every text token, as the
first token of the text does. Let A be the softmax weights of one text row in one head, S the
layer's sinks (text and image; see `sinks.phi`), V the image tokens that are no sinks. Where

    M = sum_{image} A_j >= image_mass    and    sum_V A_j / M >= rho,

the head reads the image, and

    Omega = p sum_S A_j
    A_j <- (1 - p) A_j             for j in S
    A_j <- A_j + Omega A_j / sum_V A    for j in V.

All else, in particular the row's sum, stays as it is. Rows that see no image sink are left
alone. A row's edit is three factors on three groups of keys, so that no map over all queries is
needed: the stock attention runs, and the text rows are computed again.

References:
    Kang, Kim, Kim and Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal
    Models", ICLR 2025 (arXiv 2503.03321). Official code: seilk/VisAttnSink.

Defaults: the paper's: tau 20, p 0.6, image mass 0.2, all layers but the last; rho is 0.8 for
general questions, 0.5 for hallucination and 0.9 for vision-centric tasks, here 0.5.
Deviations: sinks are searched in the prompt only, as in the official code; layers without an
image sink are left alone (official code; the paper does not say). How the official code differs
from the paper: see `VAR.official_repo`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control, register
from attnctl.errors import OptionError
from attnctl.hosts.run import Run
from attnctl.kernels.group_attention import (
    Edit,
    reads_image,
    redistribution,
    regrouped_attention,
)
from attnctl.records import STOCK, AttentionCall, Reading, Tokens, WrittenRow
from attnctl.selectors import Selection
from attnctl.sites import Sites

from .rows import EditedPrompt, EditedRow, edited, kernel_fits, recomputed_rows, tokens_of
from .sinks import PromptCodes, SinkMemory

__all__ = ["VAR", "reads_image", "redistribution"]

_NO_CODES = torch.empty((1, 0), dtype=torch.uint8)


@register
@dataclass(frozen=True)
class VAR(Control):
    """Attention of sinks redistributed to the image, in heads that read the image.

    Args:
        heads: selector, within the layers.
        sink_dims: dimensions of the residual stream that tell sinks; a checkpoint's own
            (`attnctl.calibrate_sink_dims`, presets).
        p_moved: share of the sinks' attention that is moved, 0 to 1; 0 is off. The paper's p.
        rho_nonsink: least share of non-sinks in a head's attention to the image. The paper's
            rho. Above 1 is off.
        tau: least phi of a sink.
        image_mass: least attention of a head to the image.
        first_layer: first layer in which it acts.
        skip_last: whether the last layer is left alone.
        protect: image tokens that are never sinks, by number within the prompt's.
    """

    heads: Any = "all"
    sink_dims: tuple[int, ...] = ()
    p_moved: float = 0.6
    rho_nonsink: float = 0.5
    tau: float = 20.0
    image_mass: float = 0.2
    first_layer: int = 0
    skip_last: bool = True
    protect: tuple[int, ...] = ()

    name: ClassVar[str] = "var"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    replaces_softmax: ClassVar[bool] = True
    reads_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("sink_dims", "protect"):
            object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
            if any(number < 0 for number in getattr(self, name)):
                raise OptionError(
                    f"{self.name}: {name}={getattr(self, name)}: expected 0 or above"
                )
        if not 0 <= self.p_moved <= 1:
            raise OptionError(f"{self.name}: p_moved={self.p_moved} must be 0 to 1")
        if not self.rho_nonsink >= 0:
            raise OptionError(f"{self.name}: rho_nonsink={self.rho_nonsink} must be 0 or above")
        if not self.tau > 0:
            raise OptionError(f"{self.name}: tau={self.tau} must be above 0")
        if not 0 <= self.image_mass <= 1:
            raise OptionError(f"{self.name}: image_mass={self.image_mass} must be 0 to 1")
        if self.first_layer < 0:
            raise OptionError(f"{self.name}: first_layer={self.first_layer} must be 0 or above")

    @classmethod
    def official_repo(cls, **options: Any) -> VAR:
        """Return the control as the official repository (seilk/VisAttnSink) really runs it.

        There p is the share that sinks keep, so that its 0.6 moves 0.4; rho is an upper bound
        on the share of sinks; layers 0 and 1 never have sinks, and the last layer is treated,
        against its own setting.

        Args:
            **options: others, such as sink_dims.
        """
        repo: dict[str, Any] = {"p_moved": 0.4, "rho_nonsink": 0.5, "first_layer": 2}
        return cls(**{**repo, "skip_last": False, **options})

    @property
    def selector(self) -> Any:
        """The heads, without those of layers before the first."""
        return self._heads_without([f"!L0-{self.first_layer - 1}"] if self.first_layer else [])

    def _heads_without(self, words: list[str]) -> str:
        heads = [self.heads] if isinstance(self.heads, str) else list(self.heads)
        named = [w if isinstance(w, str) else "L{}H{}".format(*w) for w in heads]
        return " ".join(named + words)

    @property
    def neutral(self) -> bool:
        """Nothing is moved, no token can be a sink, or no head can be chosen."""
        return self.p_moved == 0 or self.tau == float("inf") or self.rho_nonsink > 1

    def resolve(self, sites: Sites) -> Control:
        """Return the control without the model's last layer, if that is left alone.

        Raises:
            OptionError: if the sink dimensions are not given, or the first layer is not there.
        """
        layers = [s.layer for s in sites if s.kind in self.kinds and s.layer is not None]
        if not layers:
            return self  # the selector says what is missing
        if not self.sink_dims and not self.neutral:
            raise OptionError(
                f"{self.name}: sink_dims is empty. They are the checkpoint's own: take a preset "
                "(attnctl.VAR.for_model), or find them with attnctl.calibrate_sink_dims or "
                "`attnctl sinks`"
            )
        if self.first_layer > max(layers):
            raise OptionError(
                f"{self.name}: first_layer={self.first_layer}; this model has layers 0 to "
                f"{max(layers)}"
            )
        if not self.skip_last:
            return self
        heads = self._heads_without([f"!L{max(layers)}"])
        return dataclasses.replace(self, heads=heads, skip_last=False)

    def begin(self, run: Run, selection: Selection) -> SinkMemory:
        """Return the memory of a prompt's sinks."""
        return SinkMemory(
            dims=self.sink_dims, tau=self.tau, protect=self.protect, sites=len(selection)
        )

    def attend(self, call: AttentionCall) -> Tensor:
        """Run the stock attention, then the text rows with attention redistributed."""
        tokens, state = tokens_of(call, self.name), call.state
        codes = state.codes(call, tokens)
        single = call.q.shape[2] == 1
        if single and not state.act(call.site.index):
            return call.proceed()
        if kernel_fits(call, tokens):
            edit = self._edit(codes, state.heads_of(call))._replace(first=tokens.first)
            return edited(call, edit, lambda: state.rows(tokens, "text", call.q))
        groups = state.groups(call, tokens)
        if single:
            return self._redistribute(call, groups, call.proceed())
        return recomputed_rows(
            call, tokens, "text", lambda some, _, old: self._redistribute(some, groups, old)
        )

    def written(self, call: AttentionCall) -> WrittenRow | None:
        """Return the edit of one row, where the kernel can run: sinks are in the prompt."""
        tokens = tokens_of(call, self.name)
        if not call.state.act(call.site.index):
            return STOCK
        if not kernel_fits(call, tokens):
            return None
        codes = call.state.codes(call, tokens)
        return EditedRow(self._edit(codes, call.state.heads_of(call)), call.state.shared)

    def row_edit(self, site: int, state: Any, tokens: Tokens, rows: int) -> Edit | None:
        """Return the edit of one row; without an image sink it is none."""
        codes = state.known(site, rows)
        return None if codes is None else self._edit(codes, None)

    def reading(self, call: AttentionCall) -> Reading | None:
        """Return the edit of a prompt's rows, where the kernel can run."""
        tokens, state = tokens_of(call, self.name), call.state
        if call.q.shape[2] == 1 or call.residual is None or not kernel_fits(call, tokens):
            return None
        edit = self._edit(_NO_CODES, None)  # each site has its own
        codes = PromptCodes(state, call, call.residual, tokens)
        return EditedPrompt("text", call.q, tokens, edit, state, codes)

    def _edit(self, codes: Tensor, heads: Tensor | None) -> Edit:
        return Edit(codes, self.p_moved, True, self.rho_nonsink, self.image_mass, heads)

    def _redistribute(self, call: AttentionCall, groups: Tensor, old: Tensor) -> Tensor:
        new, masses = regrouped_attention(
            call.q, call.k, call.v, groups,
            lambda masses: redistribution(masses, self._where(call, masses), self.p_moved),
            call.mask, call.scale,
        )  # fmt: skip
        # heads that are not chosen keep the stock output to the bit
        return torch.where(self._where(call, masses)[..., None], new.to(old.dtype), old)

    def _where(self, call: AttentionCall, masses: Tensor) -> Tensor:
        chosen = reads_image(masses, self.rho_nonsink, self.image_mass)
        if call.every_head:
            return chosen
        return chosen & call.heads.to(chosen.device)[:, None]
