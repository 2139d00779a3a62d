"""Where an attention call of ComfyUI happens, from what its models say in `transformer_options`.

| key | set by | holds |
|---|---|---|
| `block` | UNets | ("input" / "middle" / "output", number) |
| `block_index` | all | number of the transformer block, in a UNet within `block` |
| `block_type` | diffusion transformers | "double" or "single" |
| `img_slice` | some transformers with image and text in one sequence | where the image is |
| `activations_shape` | UNets | [B, C, height, width] at this block |
| `grid_sizes` | Wan | (frames, height, width) of the tokens, all of which are the video's |
| `sigmas`, `sample_sigmas` | the sampler | noise level now, and at every step |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnctl.records import Kind, Site, Spans, Step

__all__ = ["kind_in", "name_in", "site_in", "spans_in", "step_in"]

Options = dict[str, Any]


def kind_in(options: Options, queries: int, keys: int) -> Kind:
    """Return the kind of attention of a call with this many queries and keys.

    Attention outside the numbered blocks, such as a text refiner's, is "other": no control's.
    """
    if not {"block", "block_index"} & options.keys():
        return "other"
    if queries != keys:
        return "cross"
    # a transformer's sequence may hold text too, so it counts as joint until it says otherwise
    return "self" if "block" in options else "joint"


def name_in(options: Options, kind: Kind) -> str:
    """Return the name of the site: "middle.0.0.attn1" in a UNet, "double.7" in a transformer."""
    if kind == "other":
        return "outside"
    number = options.get("block_index", 0)
    if "block" in options:
        part, block = options["block"][:2]
        return f"{part}.{block}.{number}.{'attn2' if kind == 'cross' else 'attn1'}"
    part = options.get("block_type", "block")
    return f"{part}.{number}{'.cross' if kind == 'cross' else ''}"


def site_in(options: Options, index: int, q: Tensor, k: Tensor) -> Site:
    """Return the site of a call with q [B, H, Nq, D] and k [B, Hkv, Nk, D]."""
    kind = kind_in(options, q.shape[2], k.shape[2])
    # a transformer's single blocks come after an unknown number of double ones
    counted = "block" not in options and options.get("block_type") != "single"
    layer = options.get("block_index") if counted else None
    return Site(index, name_in(options, kind), kind, layer, q.shape[1], q.shape[3], k.shape[1])


def spans_in(options: Options, kind: Kind, queries: int, keys: int) -> Spans:
    """Return which tokens of a call are what, as far as the model says."""
    grid = grid_in(options, queries)
    image = (("image", 0, queries),)
    if kind == "cross":
        return Spans(image, (("text", 0, keys),), grid)
    if kind == "self" or grid is not None:
        return Spans(image, image, grid)
    if "img_slice" not in options:
        return Spans((), ())
    start, stop = options["img_slice"]
    tokens = (("image", start, stop), ("text", 0, start), ("text", stop, queries))
    return Spans(tokens, tokens)


def grid_in(options: Options, tokens: int) -> tuple[int, int, int] | None:
    """Return the grid (frames, height, width) of the image tokens; None where it is not known."""
    shape: Sequence[int] = options.get("activations_shape") or (0, 0)
    frames, height, width = map(int, options.get("grid_sizes") or (1, *shape[-2:]))
    return (frames, height, width) if frames * height * width == tokens else None


def step_in(options: Options, sigma: Any) -> Step:
    """Return where the run stands.

    Args:
        options: the sampler's; without `sample_sigmas` the number of steps is unknown.
        sigma: noise level now, tensor [B] or a number.
    """
    now = float(sigma.flatten()[0]) if isinstance(sigma, Tensor) else float(sigma)
    levels = options.get("sample_sigmas")
    if levels is None:
        return Step(0, 0, now, lambda: now)
    begun = [i for i, level in enumerate(levels.tolist()[:-1]) if level >= now * (1 - 1e-5)]
    return Step(begun[-1] if begun else 0, len(levels) - 1, now, lambda: now)
