"""The record of one tiny model family, the registry of them, and running them."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "CallRecorder",
    "Family",
    "FamilyUnavailable",
    "Text",
    "denoiser_calls",
    "denoiser_inputs",
    "family",
    "get_family",
    "make",
    "need",
    "placed",
    "rows",
    "run",
]

CFG_SCALE = 3.0
"""The guidance scale of a call with guidance on."""


class FamilyUnavailable(RuntimeError):
    """The installed diffusers has no class for this family."""


def need(name: str) -> Any:
    """The diffusers class ``name``; :class:`FamilyUnavailable` where it cannot be had."""
    import diffusers

    try:
        cls = getattr(diffusers, name, None)
    except (ImportError, RuntimeError) as error:  # its lazy import failed
        raise FamilyUnavailable(f"diffusers {diffusers.__version__}: {error}") from error
    if cls is None or type(cls).__name__ == "DummyObject":
        raise FamilyUnavailable(f"diffusers {diffusers.__version__} has no usable {name}")
    return cls


def make(name: str, **config: Any) -> Any:
    """Construct the diffusers class ``name``, see :func:`need`."""
    return need(name)(**config)


def rows(tag: str, seed: int, count: int, *shape: int) -> Tensor:
    """Seeded normal tensor ``[count, *shape]``; row i depends on ``tag``, ``seed``, i only."""
    made = []
    for row in range(count):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{tag}/{seed}/{row}".encode()))
        made.append(torch.randn(shape, generator=generator))
    return torch.stack(made)


@dataclass(frozen=True)
class Text:
    """Shape of the text inputs of a pipeline and the names of its keywords.

    ``mask`` is the keyword of the text mask ("" for none): rows get different valid lengths.
    ``pooled`` is the width of ``pooled_prompt_embeds`` (0 for none). ``listed`` gives the
    embeddings as a list of rows of different lengths, ``trim`` cuts the padding that all rows
    share, so that the negative text has fewer tokens.
    """

    tokens: int
    dim: int
    pooled: int = 0
    mask: str = ""
    mask_dtype: torch.dtype = torch.long
    listed: bool = False
    trim: bool = False

    def lengths(self, count: int, sign: str) -> list[int]:
        """Valid length of each row: full, then shorter; the negative text is the shortest."""
        full = self.tokens if sign == "prompt" else self.tokens // 2
        return [max(2, full - 3 * row) for row in range(count)]

    def _one(self, sign: str, seed: int, count: int) -> dict[str, Any]:
        """The inputs of one sign, under the positive keywords."""
        lengths = self.lengths(count, sign)
        tokens = max(lengths) if self.trim else self.tokens
        embeds = rows(sign, seed, count, tokens, self.dim)
        made: dict[str, Any] = {"prompt_embeds": embeds}
        if self.listed:
            made["prompt_embeds"] = [row[:n] for row, n in zip(embeds, lengths, strict=True)]
        if self.pooled:
            made["pooled_prompt_embeds"] = rows(f"{sign}-pooled", seed, count, self.pooled)
        if self.mask:
            valid = torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]
            made[self.mask] = valid.to(self.mask_dtype)
        return made

    def inputs(self, seed: int, count: int, *, negative: bool, repeat: int = 1) -> dict[str, Any]:
        """The text keywords of a call for ``count`` prompts, each row ``repeat`` times."""
        made = self._one("prompt", seed, count)
        if negative:
            made |= {f"negative_{k}": v for k, v in self._one("negative", seed, count).items()}
        return {k: _repeat(v, repeat) for k, v in made.items()}


@dataclass(frozen=True)
class Family:
    """One tiny stock pipeline: how to build it, how to call it and how it does guidance.

    ``cfg`` is "batched" (both branches in one denoiser call), "separate" (one call a branch) or
    "none" (no second branch); ``cond_first`` tells the order of the rows or calls. ``denoisers``
    are attributes of the pipeline. ``scale`` is the keyword of the guidance scale, ``off`` its
    value without guidance. ``images`` is the keyword of the number of samples a
    prompt, "" where the pipeline does not repeat given embeddings (they are repeated here).
    ``fixed`` are keywords of every call, ``extra(pipe, batch, seed)`` gives more.
    """

    name: str
    pipeline: Callable[[], Any]
    text: Text
    fixed: dict[str, Any]
    cfg: str
    denoisers: tuple[str, ...] = ("transformer",)
    scale: str = "guidance_scale"
    off: float = 1.0
    cond_first: bool = False
    images: str = ""
    extra: Callable[[Any, int, int], dict[str, Any]] | None = None
    notes: str = ""

    def build(self, seed: int = 0) -> Any:
        """The pipeline with seeded random weights, fp32, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.pipeline()
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    _wake(part.float().eval())
        pipe.set_progress_bar_config(disable=True)
        pipe._zoo_family = self.name
        return pipe

    def call(
        self,
        pipe: Any,
        *,
        batch: int = 2,
        steps: int = 2,
        cfg: bool = True,
        seed: int = 0,
        num_images: int = 1,
    ) -> dict[str, Any]:
        """Keywords of one call of ``pipe`` that returns latents (it uses the generators up)."""
        cfg = cfg and self.cfg != "none"
        repeat = 1 if self.images else num_images
        kwargs = self.text.inputs(seed, batch, negative=cfg, repeat=repeat)
        kwargs |= {"num_inference_steps": steps, "output_type": "latent", **self.fixed}
        kwargs["generator"] = _generators(seed, batch * num_images)
        if self.cfg != "none":
            kwargs[self.scale] = CFG_SCALE if cfg else self.off
        if self.images:
            kwargs[self.images] = num_images
        if self.extra is not None:
            kwargs |= self.extra(pipe, batch * repeat, seed)
        return kwargs


FAMILIES: dict[str, Family] = {}
"""The registered families by name, in order."""


def family(name: str, **facts: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register the decorated pipeline builder as the family ``name``."""

    def add(builder: Callable[[], Any]) -> Callable[[], Any]:
        if name in FAMILIES:
            raise ValueError(f"family {name} is registered twice")
        FAMILIES[name] = Family(name=name, pipeline=builder, **facts)
        return builder

    return add


def get_family(name_or_pipe: Any) -> Family:
    """The family of a name, or of a pipeline that :meth:`Family.build` made."""
    if isinstance(name_or_pipe, Family):
        return name_or_pipe
    name = name_or_pipe if isinstance(name_or_pipe, str) else name_or_pipe._zoo_family
    return FAMILIES[name]


def run(family_or_pipe: Any, **overrides: Any) -> Tensor:
    """Latents of one call. ``overrides``: keywords of :meth:`Family.call`, or of the pipeline."""
    fam, pipe = _resolve(family_or_pipe)
    wanted = {k: overrides.pop(k) for k in _ASK if k in overrides}
    with torch.no_grad():
        out = pipe(**(fam.call(pipe, **wanted) | overrides), return_dict=False)
    return out[0]


def placed(
    call: dict[str, Any], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """The keywords of a call with their tensors on a device, floating-point ones in a dtype."""
    return {key: _put(value, device, dtype) for key, value in call.items()}


def _put(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


class CallRecorder:
    """Records the inputs of every call of the given modules, by parameter name."""

    def __init__(self, *modules: nn.Module, limit: int | None = None) -> None:
        self.modules = modules
        self.limit = limit
        self.calls: list[tuple[nn.Module, dict[str, Any]]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> CallRecorder:
        for module in self.modules:
            hook = module.register_forward_pre_hook(self._note, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> bool:
        while self._handles:
            self._handles.pop().remove()
        return kind is _Enough

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        bound = dict(zip(names, args, strict=False)) | kwargs
        self.calls.append((module, {k: _clone(v) for k, v in bound.items()}))
        if self.limit is not None and len(self.calls) >= self.limit:
            raise _Enough


def denoiser_calls(
    family_or_pipe: Any, *, limit: int | None = None, **overrides: Any
) -> list[tuple[nn.Module, dict[str, Any]]]:
    """``(module, kwargs)`` of the denoiser calls of one pipeline run, at most ``limit``."""
    fam, pipe = _resolve(family_or_pipe)
    parts = [getattr(pipe, name) for name in fam.denoisers if getattr(pipe, name) is not None]
    with CallRecorder(*parts, limit=limit) as recorder:
        run(pipe, **overrides)
    return recorder.calls


def denoiser_inputs(name: Any, **overrides: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of a family and the keywords of its first call in a pipeline run."""
    return denoiser_calls(name, limit=1, **overrides)[0]


class _Enough(BaseException):
    """Ends a run once the recorder has what it wants."""


_ASK = tuple(
    p.name for p in inspect.signature(Family.call).parameters.values() if p.kind is p.KEYWORD_ONLY
)


def _resolve(family_or_pipe: Any) -> tuple[Family, Any]:
    """Family and pipeline, built where only a name is given."""
    fam = get_family(family_or_pipe)
    named = isinstance(family_or_pipe, (str, Family))
    return fam, fam.build() if named else family_or_pipe


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """One seeded generator a sample, so that a sample doesn't depend on the batch."""
    return [torch.Generator().manual_seed(1000 * seed + row) for row in range(count)]


def _repeat(value: Any, times: int) -> Any:
    """Each row of a tensor or list ``times`` times."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, dim=0)
    return [row for row in value for _ in range(times)]


def _clone(value: Any) -> Any:
    """A detached copy of the tensors of a nested value."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    return value


def _wake(module: nn.Module) -> None:
    """Give constant parameters random values and make attention uneven, in place.

    Zero-initialised gates and output layers would cut attention off from the output; small q and
    k weights would make every attention map almost uniform; small output weights and gates would
    leave its effect slight.
    """
    with torch.no_grad():
        for name, param in module.named_parameters():
            if param.numel() == 0:
                continue
            first = param.flatten()[0]
            if bool((param == first).all()) and float(first) in (0.0, 1.0):
                scale = 0.2 if param.ndim < 2 else param[0].numel() ** -0.5
                param.add_(torch.randn_like(param), alpha=scale)
            elif any(part in name for part in _RAISED) and param.ndim == 2:
                param.mul_(2.0)


_RAISED = (
    *("to_q.", "to_k.", "add_q_proj.", "add_k_proj.", "to_out.", "to_add_out."),  # attention
    *("time_text_embed.", "time_guidance_embed.", "time_step_proj."),  # gates, with the next
    *("modulation", "norm.linear.", "norm1.linear.", "norm1_context.linear."),
)
