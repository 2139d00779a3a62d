"""What differs between denoiser families, as data.

A family says which block lists hold the main blocks (in execution order), what each
attention attribute of a block is, where text stands in a joint sequence, and how to read the
token grid from the denoiser's inputs. Unknown classes get `GENERIC`: sites by structure, no
grid, so that controls which need spans refuse by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from ..records import Kind, Site, Spans

__all__ = ["FAMILIES", "GENERIC", "Family", "Geometry", "family_of", "spans"]

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """Image tokens of one forward.

    Args:
        grid: (frames, height, width) of the noisy image or video tokens, None if unknown.
        refs: clean reference tokens appended to them.
    """

    grid: tuple[int, int, int] | None
    refs: int = 0

    @property
    def tokens(self) -> int | None:
        """Noisy image tokens, None if unknown."""
        return None if self.grid is None else self.grid[0] * self.grid[1] * self.grid[2]


Grid = Callable[[Any, Inputs], Geometry]


def _patch(config: Any) -> tuple[int, int]:
    """Return (frames, pixels) per patch from a model config."""
    size = getattr(config, "patch_size", 1)
    if isinstance(size, (tuple, list)):
        return size[0], size[1]
    return getattr(config, "patch_size_t", None) or 1, size


def latent_grid(config: Any, inputs: Inputs) -> Geometry:
    """Latents [B, C, H, W] or [B, C, F, H, W]."""
    x = next(iter(inputs.values()))
    frames = x.shape[2] if x.ndim == 5 else 1
    pt, p = _patch(config)
    return Geometry((-(-frames // pt), x.shape[-2] // p, x.shape[-1] // p))


def frames_first_grid(config: Any, inputs: Inputs) -> Geometry:
    """Latents [B, F, C, H, W]."""
    x = inputs["hidden_states"]
    pt, p = _patch(config)
    return Geometry((-(-x.shape[1] // pt), x.shape[-2] // p, x.shape[-1] // p))


_READ_IDS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Grids by the very tensor of ids: reading it waits for the GPU, and a run keeps one tensor."""


def ids_grid(config: Any, inputs: Inputs) -> Geometry:
    """Packed tokens with position ids [N, 3+] or [B, N, 3+], columns (time, row, column, ...)."""
    ids = inputs["img_ids"]
    if ids not in _READ_IDS:
        _READ_IDS[ids] = _read_ids(ids)
    return _READ_IDS[ids]


def _read_ids(ids: Any) -> Geometry:
    ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    noisy = ids[ids[:, 0] == ids[0, 0]]
    high, wide = (int(noisy[:, i].max() - noisy[:, i].min()) + 1 for i in (1, 2))
    if high * wide != len(noisy):
        return Geometry(None)
    return Geometry((1, high, wide), refs=len(ids) - len(noisy))


def shapes_grid(config: Any, inputs: Inputs) -> Geometry:
    """Packed tokens with `img_shapes`: per row a list of (frames, height, width)."""
    first, *refs = inputs["img_shapes"][0]
    return Geometry(tuple(first), refs=sum(f * h * w for f, h, w in refs))


def named_grid(config: Any, inputs: Inputs) -> Geometry:
    """Packed tokens with the latent size as plain arguments."""
    frames, high, wide = (inputs.get(k) for k in ("num_frames", "height", "width"))
    return Geometry((frames or 1, high, wide) if high and wide else None)


def packed_grid(config: Any, inputs: Inputs) -> Geometry:
    """Latents whose tokens follow each row's own text: known for texts of one length only."""
    lengths = inputs["encoder_attention_mask"].sum(-1)
    if bool((lengths != lengths[0]).any()):
        return Geometry(None)
    return latent_grid(config, inputs)


def no_grid(config: Any, inputs: Inputs) -> Geometry:
    """Nothing is known of this model's tokens."""
    return Geometry(None)


@dataclass(frozen=True)
class Family:
    """Facts about one denoiser family.

    Args:
        blocks: block lists in execution order; other attention modules are unnumbered.
        kinds: kind by the name of the attention attribute.
        text_first: whether text precedes image in a joint sequence.
        grid: reads the token grid from (model config, denoiser inputs).
        pyramid: whether self-attention runs at several resolutions (UNets).
        unbatched: inputs whose first dimension is never the batch.
        text_inputs: denoiser inputs that come from the prompt's token embeddings.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    text_first: bool = False
    grid: Grid = no_grid
    pyramid: bool = False
    unbatched: tuple[str, ...] = ("image_rotary_emb", "rope_interpolation_scale")
    text_inputs: tuple[str, ...] = (
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_mask",
    )


_SEPARATE: dict[str, Kind] = {"attn1": "self", "attn2": "cross"}
_JOINT: dict[str, Kind] = {"attn": "joint", "attn1": "joint"}
_DOUBLE_SINGLE = ("transformer_blocks", "single_transformer_blocks")

GENERIC = Family(blocks=())
FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family(
        ("down_blocks", "mid_block", "up_blocks"), _SEPARATE, grid=latent_grid, pyramid=True
    ),
    "SD3Transformer2DModel": Family(kinds={"attn": "joint", "attn2": "self"}, grid=latent_grid),
    "FluxTransformer2DModel": Family(_DOUBLE_SINGLE, _JOINT, text_first=True, grid=ids_grid),
    "ChromaTransformer2DModel": Family(_DOUBLE_SINGLE, _JOINT, text_first=True, grid=ids_grid),
    "Flux2Transformer2DModel": Family(_DOUBLE_SINGLE, _JOINT, text_first=True, grid=ids_grid),
    "QwenImageTransformer2DModel": Family(kinds=_JOINT, text_first=True, grid=shapes_grid),
    "PixArtTransformer2DModel": Family(kinds=_SEPARATE, grid=latent_grid),
    "SanaTransformer2DModel": Family(
        kinds={"attn1": "linear", "attn2": "cross"}, grid=latent_grid
    ),
    "HunyuanDiT2DModel": Family(("blocks",), _SEPARATE, grid=latent_grid),
    "AuraFlowTransformer2DModel": Family(
        ("joint_transformer_blocks", "single_transformer_blocks"),
        _JOINT,
        text_first=True,
        grid=latent_grid,
    ),
    "Lumina2Transformer2DModel": Family(("layers",), _JOINT, text_first=True, grid=packed_grid),
    "CogView4Transformer2DModel": Family(kinds=_JOINT, text_first=True, grid=latent_grid),
    "CogVideoXTransformer3DModel": Family(kinds=_JOINT, text_first=True, grid=frames_first_grid),
    "WanTransformer3DModel": Family(("blocks",), _SEPARATE, grid=latent_grid),
    "WanVACETransformer3DModel": Family(("blocks", "vace_blocks"), _SEPARATE, grid=latent_grid),
    "HunyuanVideoTransformer3DModel": Family(_DOUBLE_SINGLE, _JOINT, grid=latent_grid),
    "LTXVideoTransformer3DModel": Family(kinds=_SEPARATE, grid=named_grid),
    "MochiTransformer3DModel": Family(kinds=_JOINT, grid=latent_grid),
    "AllegroTransformer3DModel": Family(kinds=_SEPARATE, grid=latent_grid),
}


def family_of(cls: type) -> Family:
    """Return the family of a denoiser class or of its nearest known base."""
    return next((FAMILIES[c.__name__] for c in cls.__mro__ if c.__name__ in FAMILIES), GENERIC)


def spans(
    family: Family, site: Site, geometry: Geometry, nq: int, nk: int, cross_role: str
) -> Spans:
    """Return the token spans of one attention call.

    Args:
        family: the denoiser's family.
        site: where the call happens.
        geometry: image tokens of this forward.
        nq: queries.
        nk: keys.
        cross_role: what the keys of a cross-attention call are ("text" or "ip").
    """
    if site.kind == "text":
        return Spans((("text", 0, nq),), (("text", 0, nk),))
    if site.kind == "cross":
        return Spans(
            _image(geometry, nq, family), ((cross_role, 0, nk),), _grid(geometry, nq, family)
        )
    if site.kind != "joint":
        image = _image(geometry, nq, family)
        return Spans(
            image, image if nk == nq else (("image", 0, nk),), _grid(geometry, nq, family)
        )
    tokens = geometry.tokens
    if tokens is None or nk < tokens + geometry.refs:
        return Spans((), ())
    text = nk - tokens - geometry.refs
    shift = text if family.text_first else 0
    parts = [("image", shift, shift + tokens)]
    if geometry.refs:
        parts.append(("ref", shift + tokens, shift + tokens + geometry.refs))
    start = 0 if family.text_first else tokens + geometry.refs
    parts.append(("text", start, start + text))
    joint = tuple(sorted(parts, key=lambda p: p[1]))
    return Spans(joint, joint, geometry.grid)


def _image(geometry: Geometry, n: int, family: Family) -> tuple[tuple[str, int, int], ...]:
    tokens = geometry.tokens
    if geometry.refs and tokens is not None and n == tokens + geometry.refs:
        return (("image", 0, tokens), ("ref", tokens, n))
    return (("image", 0, n),)


def _grid(geometry: Geometry, n: int, family: Family) -> tuple[int, int, int] | None:
    if geometry.grid is None:
        return None
    frames, high, wide = geometry.grid
    if geometry.tokens == n or geometry.tokens == n - geometry.refs:
        return geometry.grid
    while family.pyramid and frames * high * wide > n:
        high, wide = -(-high // 2), -(-wide // 2)
    return (frames, high, wide) if frames * high * wide == n else None
