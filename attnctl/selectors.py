"""One grammar for sites and heads, used by every control, preset, file and command.

A selector is a list of tokens separated by commas, blanks or "+"; the union is selected and
tokens that begin with "!" are taken away afterwards.

| token | selects |
|---|---|
| `all` | every head of every site the control admits |
| `L13H9`, `L13`, `L3-7`, `L3-7H0-3`, `H2` | heads by layer number and head number (from 0) |
| `transformer_blocks.1`, `attn2`, `up_blocks.0.attentions.1-2` | sites whose dotted name \
contains these whole components (`blocks.1` never matches `blocks.10`) |
| `down`, `mid`, `up` | the UNet parts |
| `d2`, `m0`, `u0.4-9` | UNet part, block, and transformer layers within it |
| `self`, `cross`, `joint`, `causal` | by kind |
| any of the name forms followed by `:H0-3` | only these heads |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import SelectorError, nearest
from .records import Site

__all__ = ["Selection", "select"]

Selection = dict[int, Tensor]
"""Bool [H] per site index; only sites with at least one selected head."""

_RANGE = r"(\d+)(?:-(\d+))?"
_LAYER = re.compile(rf"(?:L{_RANGE})?(?:H{_RANGE})?")
_UNET = re.compile(rf"([dmu]){_RANGE}(?:\.{_RANGE})?")
_PARTS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}
_UNET_PARTS = {"d": "down_blocks", "m": "mid_block", "u": "up_blocks"}
_KINDS = ("self", "cross", "joint", "text", "causal", "linear", "other")


def select(
    spec: str | Iterable[str | tuple[int, int]], sites: Sequence[Site], kinds: Sequence[str]
) -> Selection:
    """Return the heads that a selector names.

    Args:
        spec: a selector string, or a list of tokens and `(layer, head)` pairs.
        sites: the model's sites.
        kinds: site kinds that the control admits; others are never selected.

    Raises:
        SelectorError: on a malformed token, and on any token that matches nothing.
    """
    admitted = [s for s in sites if s.kind in kinds]
    if not admitted:
        have = sorted({s.kind for s in sites})
        raise SelectorError(
            f"this control acts on {'/'.join(kinds)} attention, "
            f"but the model has only {'/'.join(have)} sites{_which(kinds, have)}"
        )
    tokens = _tokens(spec)
    if not tokens:
        raise SelectorError(
            "the selector is empty: name at least one head or site, such as 'L3H1' or 'all'"
        )
    chosen: Selection = {}
    for token in sorted(tokens, key=lambda t: t.startswith("!")):
        negative = token.startswith("!")
        for index, mask in _match(token.removeprefix("!"), admitted, sites).items():
            old = chosen.get(index, torch.zeros_like(mask))
            chosen[index] = old & ~mask if negative else old | mask
    chosen = {i: m for i, m in sorted(chosen.items()) if m.any()}
    if not chosen:
        raise SelectorError(f"the selector {spec!r} takes away everything that it selects")
    return chosen


def _which(kinds: Sequence[str], have: Sequence[str]) -> str:
    """Say which library's models a control is for, where it met one of the other."""
    if "causal" not in kinds and "causal" in have:
        return ": it is for diffusion models, and this is a language model's decoder"
    if set(kinds) == {"causal"}:
        return ": it is for vision-language models, and this is a diffusion model"
    return ""


def _tokens(spec: str | Iterable[str | tuple[int, int]]) -> list[str]:
    if isinstance(spec, str):
        words = [w for w in re.split(r"[,+\s]+", spec) if w]
    else:
        words = [w if isinstance(w, str) else "L{}H{}".format(*w) for w in spec]
    # "!L3" alone means "all but L3"
    return ["all", *words] if words and all(w.startswith("!") for w in words) else words


def _match(token: str, admitted: list[Site], every: Sequence[Site]) -> Selection:
    layer = _LAYER.fullmatch(token)
    if layer and token:
        return _by_layer(token, layer, admitted)
    path, _, heads = token.partition(":H")
    found = [s for s in admitted if _named(path, s, admitted)]
    if not found:
        raise SelectorError(_nothing(token, path, admitted, every))
    span = _span(*_head_range(heads, token)) if heads else None
    return _heads(token, found, span)


def _by_layer(token: str, match: re.Match[str], admitted: list[Site]) -> Selection:
    a, b, c, d = match.groups()
    layers = _span(a, b) if a else None
    numbered = [s for s in admitted if s.layer is not None]
    found = [s for s in numbered if layers is None or s.layer in layers]
    if not found:
        have = sorted({s.layer for s in numbered if s.layer is not None})
        text = f"layers {have[0]} to {have[-1]}" if have else "no numbered layers"
        raise SelectorError(f"selector {token!r} matches nothing: this control can act on {text}")
    return _heads(token, found, _span(c, d) if c else None)


def _heads(token: str, found: list[Site], span: range | None) -> Selection:
    result = {}
    for site in found:
        mask = torch.ones(site.heads, dtype=torch.bool)
        if span is not None:
            mask = torch.tensor([h in span for h in range(site.heads)])
        if mask.any():
            result[site.index] = mask
    if span is not None and (not result or span.stop > max(s.heads for s in found)):
        most = max(s.heads for s in found)
        raise SelectorError(
            f"selector {token!r} matches nothing: {found[0]} has heads 0 to {most - 1}"
        )
    return result


def _named(path: str, site: Site, sites: Sequence[Site]) -> bool:
    if path == "all" or (path in _KINDS and path == site.kind):
        return True
    unet = _UNET.fullmatch(path)
    if unet:
        return _in_unet(unet, site, sites)
    want = _PARTS.get(path, path).split(".")
    have = site.name.split(".")
    if site.denoiser == want[0]:
        have = [site.denoiser, *have]
    starts = range(len(have) - len(want) + 1)
    return any(all(map(_component, want, have[i : i + len(want)])) for i in starts)


def _component(want: str, have: str) -> bool:
    """Whole-component match; "3-7" matches the numbers 3 to 7, "*" anything."""
    if want in (have, "*"):
        return True
    span = re.fullmatch(_RANGE, want)
    return bool(span and span[2] and have.isdigit() and int(have) in _span(*span.groups()))


def _in_unet(match: re.Match[str], site: Site, sites: Sequence[Site]) -> bool:
    part, a, b, c, d = match.groups()
    components = site.name.split(".")
    if components[0] != _UNET_PARTS[part]:
        return False
    block = 0 if part == "m" else int(components[1])
    if block not in _span(a, b):
        return False
    if c is None:
        return True
    prefix = components[: 1 if part == "m" else 2]
    inside = sorted(
        {
            s.layer
            for s in sites
            if s.layer is not None and s.name.split(".")[: len(prefix)] == prefix
        }
    )
    return site.layer is not None and inside.index(site.layer) in _span(c, d)


def _span(first: str, last: str | None) -> range:
    a = int(first)
    b = int(last) if last is not None else a
    if b < a:
        raise SelectorError(f"the range {first}-{last} runs backwards")
    return range(a, b + 1)


def _head_range(text: str, token: str) -> tuple[str, str | None]:
    match = re.fullmatch(_RANGE, text)
    if match is None:
        raise SelectorError(f"selector {token!r}: expected heads such as ':H2' or ':H0-3'")
    return match[1], match[2]


def _nothing(token: str, path: str, admitted: list[Site], every: Sequence[Site]) -> str:
    other = next((s for s in every if _named(path, s, every)), None)
    if other is not None:
        kinds = "/".join(sorted({s.kind for s in admitted}))
        return (
            f"selector {token!r} matches only sites such as {other} ({other.kind} attention), "
            f"but this control acts on {kinds} attention"
        )
    names = [s.name for s in admitted]
    blocks = sorted({name.rsplit(".", 1)[0] for name in names} | {n.split(".")[0] for n in names})
    hint = nearest(path, [*names, *blocks, *_PARTS, "all"], most=2) or (
        f" The {len(names)} sites are {names[0]} to {names[-1]}; attnctl.sites(...) lists them."
    )
    return f"selector {token!r} matches nothing.{hint}"
