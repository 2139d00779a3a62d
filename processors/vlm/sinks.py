"""Attention sinks of a decoder: tokens that get attention and carry no content.

Sinks are told by the residual stream x that a layer reads. In a few fixed dimensions of the
model, D_sink, they are far above the rest:

    phi(x) = max_{d in D_sink} |x_d| / sqrt(mean_d x_d^2)    >= tau.

References:
    Kang, Kim, Kim and Hwang, "See What You Are Told: Visual Attention Sink in Large Multimodal
    Models", ICLR 2025 (arXiv 2503.03321): phi, tau = 20, two dimensions per model.
    Sun, Chen, Kolter and Liu, "Massive Activations in Large Language Models", 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import HostError, OptionError
from attnctl.hosts.vlm_tokens import fit_rows
from attnctl.kernels.group_attention import codes_call
from attnctl.records import AttentionCall, Residual, Tokens

from .rows import RowMemory

__all__ = ["PromptCodes", "SinkMemory", "phi", "rms_normed"]


def rms_normed(x: Tensor) -> Tensor:
    """Return x / sqrt(mean_d x_d^2) over the last dimension, in float32 at least; 0 for 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(wide.dtype).tiny
    return wide * wide.square().mean(-1, keepdim=True).clamp_min(tiny).rsqrt()


def phi(x: Tensor, dims: Sequence[int] | Tensor) -> Tensor:
    """Return max_{d in dims} |x_d| / sqrt(mean_d x_d^2).

    Args:
        x: [..., width], the residual stream before the norm.
        dims: the sink dimensions.

    Returns:
        [...] in float32 (float64 for float64 inputs); at most sqrt(width).

    Raises:
        OptionError: if a dimension is outside the width.
    """
    if not isinstance(dims, Tensor):
        dims = dims_tensor(dims, x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(wide.dtype).tiny
    rms = wide.square().mean(-1).clamp_min(tiny).sqrt()
    return wide[..., dims].abs().amax(-1) / rms


def dims_tensor(dims: Sequence[int], x: Tensor) -> Tensor:
    """Return sink dimensions as an index on the device of x [..., width].

    Raises:
        OptionError: if a dimension is outside the width.
    """
    if max(dims) >= x.shape[-1]:
        raise OptionError(
            f"sink dimension {max(dims)} is outside this model's {x.shape[-1]}: the dimensions "
            "are those of another checkpoint; attnctl.calibrate_sink_dims finds them"
        )
    return _dims_on(tuple(map(int, dims)), x.device)


@functools.cache
def _dims_on(dims: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # for those who want gradients, too
        return torch.tensor(dims, device=device)


@dataclass(eq=False)
class SinkMemory(RowMemory):
    """Which prompt tokens are sinks, layer by layer, for as long as their cache is in use.

    Found when the prompt is read. Written tokens never become sinks, so that beams of a prompt
    share its sinks and may be reordered. Kept as codes: 1 text sink, 2 image sink, 3 other image
    token, 0 the rest.

    Args:
        dims: sink dimensions.
        tau: least phi of a sink.
        protect: image tokens that are never sinks, by number from 0 within a prompt's image
            tokens.
        sites: how many sites are asked for in a forward, to make room for.
    """

    dims: tuple[int, ...] = ()
    tau: float = 20.0
    protect: tuple[int, ...] = ()
    sites: int = 1
    _writer: tuple[Tokens, Any] | None = None
    _codes: dict[int, Tensor] = field(default_factory=dict)
    _groups: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    _acts: dict[int, bool] = field(default_factory=dict)

    def codes(self, call: AttentionCall, tokens: Tokens) -> Tensor:
        """Return the codes [B, P] of the first tokens, uint8."""
        if call.residual is None and call.q.shape[2] == 1:  # a written token, no sink
            known = self.known(call.site.index, call.q.shape[0])
            if known is not None:
                return known
        return self.codes_at(
            call.site.index, call.residual, tokens, call.step.index, call.q.shape[0]
        )

    def codes_at(
        self, site: int, residual: Residual | None, tokens: Tokens, step: int, rows: int
    ) -> Tensor:
        """Return the codes [B, P] of the first tokens at a site, uint8.

        Args:
            site: its number.
            residual: what its layer reads.
            tokens: roles of the tokens of this forward.
            step: number of this forward.
            rows: batch size.

        Raises:
            HostError: if the residual stream is not known.
        """
        if residual is None:
            raise HostError(
                f"the residual stream of site {site} is not known: its layer was not called in "
                "the usual way, so that no sinks can be found"
            )
        at = step, residual.past
        if self._seen.get(site) != at:
            self._seen[site] = at
            if residual.past < residual.prompt:
                self._read(site, residual, tokens)
        codes = self._codes[site]
        return codes if codes.shape[0] == rows else fit_rows(codes, rows)

    def known(self, site: int, rows: int) -> Tensor | None:
        """Return the codes [B, P] of a prompt that has been read at a site, None of another."""
        codes = self._codes.get(site)
        return None if codes is None else fit_rows(codes, rows)

    def groups(self, call: AttentionCall, tokens: Tokens) -> Tensor:
        """Return masks [B, 3, P] of the first keys: text sinks, image sinks, other image tokens.

        Floating, 0 and 1, in the type that weights are computed in.
        """
        site, codes = call.site.index, self.codes(call, tokens)
        if site not in self._groups:
            wide = torch.promote_types(call.q.dtype, torch.float32)
            parts = [self._codes[site] == code for code in (1, 2, 3)]
            self._groups[site] = torch.stack(parts, dim=1).to(wide)
        return fit_rows(self._groups[site][..., tokens.first :], codes.shape[0])

    def act(self, site: int) -> bool:
        """Whether some row of the prompt has an image sink at a site.

        Asked for one written token after another: the answers for all layers are fetched
        from the device together.
        """
        if site not in self._acts:
            known = self._codes
            if len({codes.shape for codes in known.values()}) > 1:
                known = {site: known[site]}  # later layers have yet to read this part of a prompt
            codes = torch.stack([each.to(known[site].device) for each in known.values()])
            acts = (codes == 2).flatten(1).any(1).tolist()
            self._acts.update(zip(known, acts, strict=True))
        return self._acts[site]

    def _read(self, site: int, residual: Residual, tokens: Tokens) -> None:
        """Find the sinks among the tokens of this forward, and note the codes of all so far."""
        codes = self._found_codes(residual, tokens)
        old = self._codes.get(site)
        if old is not None and residual.past:
            old = fit_rows(old, codes.shape[0])[:, : residual.past]
            gap = residual.past - old.shape[1]  # tokens written between two parts of a prompt
            codes = torch.cat([torch.nn.functional.pad(old, (0, gap)), codes], dim=1)
        self.keep(site, self._seen[site], codes)

    def keep(self, site: int, at: tuple[int, int], codes: Tensor) -> None:
        """Note the codes of all tokens so far at a site, found in one forward."""
        self._seen[site], self._codes[site] = at, codes
        self._groups.pop(site, None)
        self._acts.clear()

    def writer(self, tokens: Tokens) -> Any:
        """Return the kernel's call that finds these tokens' codes; None without one."""
        return self._writer[1] if self._writer is not None and self._writer[0] is tokens else None

    def _found_codes(self, residual: Residual, tokens: Tokens) -> Tensor:
        """Return the codes [B, N] of the tokens of this forward."""
        x = residual.hidden
        write = self._writer_for(residual, tokens)
        if write is not None:
            codes: Tensor = write(x)
            return codes
        found = self.found(residual, tokens).to(torch.uint8)
        image = tokens.slots("image")[:, residual.past :]
        return torch.where(image, 3 - found, found)

    def _writer_for(self, residual: Residual, tokens: Tokens) -> Any:
        """Return the kernel's call for this stream, which the layers share; None without one."""
        x, known = residual.hidden, self._writer
        if known is not None and known[0] is tokens and (known[1] is None or known[1].takes(x)):
            return known[1]
        made = None
        if type(self).found is SinkMemory.found:
            labels = self._labels(tokens, residual.past).to(x.device, non_blocking=True)
            limit = residual.prompt - residual.past
            made = codes_call(x, self._dims(x), labels, self.tau, limit, self.sites)
        self._writer = tokens, made
        return made

    def _labels(self, tokens: Tokens, past: int) -> Tensor:
        """Return what the kernel is told of the tokens of this forward."""
        labels = tokens.labels_there()
        if self.protect:
            labels = labels.masked_fill(self._protected(labels == 1), 3)
        return labels[:, past:] if past else labels

    def _dims(self, x: Tensor) -> Tensor:
        return dims_tensor(self.dims, x)

    def found(self, residual: Residual, tokens: Tokens) -> Tensor:
        """Return which tokens of this forward are sinks, bool [B, N]."""
        x = residual.hidden
        sinks = phi(x, self._dims(x)) >= self.tau
        sinks = sinks & ~tokens.slots("pad")[:, residual.past :]
        written = max(0, residual.past + x.shape[1] - residual.prompt)  # without a cache
        if written:
            sinks[:, -written:] = False
        if self.protect:
            image = tokens.slots("image")
            sinks = sinks & ~self._protected(image)[:, residual.past :]
        return sinks

    def _protected(self, image: Tensor) -> Tensor:
        number = image.cumsum(1) - 1
        chosen = torch.tensor(self.protect, device=image.device)
        return image & torch.isin(number, chosen)


class PromptCodes:
    """Codes of a prompt's tokens at one site after another of a forward (`SinkMemory.codes_at`).

    Args:
        memory: where they are kept.
        call: the forward's first call.
        residual: what its layer reads.
        tokens: roles of its tokens.
    """

    def __init__(
        self, memory: SinkMemory, call: AttentionCall, residual: Residual, tokens: Tokens
    ) -> None:
        self.memory, self.tokens, self.rows = memory, tokens, call.q.shape[0]
        self.step, self.past, self.prompt = call.step.index, residual.past, residual.prompt
        self.at = self.step, self.past
        self.writer: Any = None
        self.whole = not self.past and residual.hidden.shape[0] == self.rows

    def __call__(self, site: int, hidden: Tensor | None) -> Tensor:
        """Return the codes [B, P] at a site whose layer reads `hidden` [B, N, width]."""
        memory, writer = self.memory, self.writer
        if writer is not None and hidden is not None and memory._seen.get(site) != self.at:
            codes: Tensor | None = writer.next(hidden)
            if codes is not None:  # of a whole prompt: nothing else is kept of it yet
                memory._seen[site], memory._codes[site] = self.at, codes
                return codes
        residual = None if hidden is None else Residual(hidden, self.past, self.prompt)
        codes = memory.codes_at(site, residual, self.tokens, self.step, self.rows)
        self.writer = memory.writer(self.tokens) if self.whole else None
        return codes
