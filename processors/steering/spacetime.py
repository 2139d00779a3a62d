"""SpaceTime: objects placed by local descriptions, each attended to inside its own region.

In every cross-attention, with g the output for the whole prompt, s_i for the description of
object i ("a photo of the red circle") and m_i its region, the conditional rows become

    (1 - sum_i w_i) g + sum_i w_i s_i,   w_i = lambda m_i / max(1, lambda sum_j m_j)

which is the paper's convex combination at every pixel, or with mode "guidance"

    g + sum_i lambda m_i (s_i - g_u)

as in the released code, g_u being the output of the unconditional rows.

Layout "fit" orders the objects of each picture as its noise wants them, see `fitting`.

References:
    Wu et al., "Harnessing the Spatial-Temporal Attention of Diffusion Models for High-Fidelity
    Text-to-Image Synthesis", ICCV 2023 (arXiv 2304.03869): the attention rule.

Deviations: the layout is given or fitted, where the paper trains a predictor; lambda is a
straight line over the run, the same for all objects, where the paper optimises it for each object
and step (the released optimisation moves it by less than 0.01; `fit_weights` chooses the line); a
token lies in a disc if its middle does, not its corner; overlapping regions share the weight, so
that the combination stays convex. The descriptions' keys and values do not change over the steps:
one pass per object, at the first step, makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from attnctl.control import register
from attnctl.errors import HostError, OptionError
from attnctl.processors.analysis.placing import Placing, has_text, place
from attnctl.processors.guidance.heads import head_indices, put
from attnctl.processors.windowed import Windowed
from attnctl.records import AttentionCall, ForwardCall, Step
from attnctl.words import concepts
from attnctl.words.prompts import Prompt, prompts_of

from .fitting import differences, fitted
from .regions import checked_region, coverage

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection

__all__ = ["Local", "SpaceTime", "mixed", "side_by_side"]

GUIDANCE = 5.0
"""Sum of the weights of all objects in the released code."""


@dataclass(frozen=True)
class Local:
    """One object of one prompt.

    Args:
        description: the text, or denoiser inputs such as {"encoder_hidden_states": [1, T, C]}.
        region: as `regions.checked_region` returns it.
    """

    description: Any
    region: Any


def side_by_side(prompt: str) -> dict[str, tuple[float, float, float, float]]:
    """Return a layout that puts a prompt's concepts next to each other, from left to right."""
    found = [concept.phrase for concept in concepts(prompt)]
    return {
        f"{phrase}#{phrase.number}" if str(phrase) in map(str, found[:i]) else str(phrase): (
            i / len(found), 0.0, (i + 1) / len(found), 1.0,
        )
        for i, phrase in enumerate(found)
    }  # fmt: skip


def mixed(
    whole: Tensor, local: Tensor, weights: Tensor, unconditional: Tensor | None = None
) -> Tensor:
    """Return the rule of the module docstring.

    Args:
        whole: g [b, h, m, d].
        local: s_i [n, b, h, m, d].
        weights: lambda m_i [n, b, m].
        unconditional: g_u [b, h, m, d] for mode "guidance", None for the convex combination.

    Returns:
        [b, h, m, d]; tokens outside all regions are those of g, bit for bit.
    """
    touched = (weights > 0).any(0)[:, None, :, None]
    each = weights.to(whole.dtype)[:, :, None, :, None]
    if unconditional is None:
        each = each / each.sum(0).clamp_min(1)
        new = (1 - each.sum(0)) * whole + (each * local).sum(0)
    else:
        new = whole + (each * (local - unconditional)).sum(0)
    return torch.where(touched, new, whole)


@dataclass(eq=False)
class Scene:
    """State of one run.

    Args:
        objects: by prompt.
        inputs: denoiser inputs of each object's description [n, ...]; made at the first step.
        keys: (keys, values, mask) of every object by site.
        ready: whether the keys were read.
        fitted: regions of the objects of each sample, in place of theirs; empty if none were
            fitted.
    """

    objects: list[list[Local]]
    inputs: list[list[Mapping[str, Tensor]]]
    keys: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = field(default_factory=dict)
    ready: bool = False
    fitted: list[list[Any]] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Objects of the prompt that has most."""
        return max(map(len, self.objects))

    def prompt(self, sample: int, samples: int) -> int:
        """Return which prompt a sample belongs to; samples of one prompt follow each other."""
        return sample * len(self.objects) // samples

    def rows(self, i: int, samples: int) -> dict[str, Tensor]:
        """Return the denoiser inputs of the i-th object of every sample.

        A sample with fewer objects gets another of its own: its region there is empty.
        """
        chosen = []
        for sample in range(samples):
            mine = self.inputs[self.prompt(sample, samples)]
            chosen.append(mine[i] if i < len(mine) else mine[0])
        return {name: torch.cat([one[name] for one in chosen]) for name in chosen[0]}

    def regions(self, sample: int, samples: int) -> list[Any]:
        """Return the regions of a sample's objects."""
        if self.fitted:
            return self.fitted[sample]
        return [one.region for one in self.objects[self.prompt(sample, samples)]]

    def weights(self, where: Placing, device: torch.device) -> Tensor:
        """Return every object's region [n, b, m] on the grid of a call."""
        count = where.rows.stop - where.rows.start
        nothing = torch.zeros(math.prod(where.grid), device=device)
        each = []
        for sample in range(where.first, where.first + count):
            mine = self.regions(sample, where.samples)
            maps = [coverage(region, where.grid, device) for region in mine]
            each.append(torch.stack([*maps, *[nothing] * (self.most - len(maps))]))
        return torch.stack(each, dim=1)


@register
@dataclass(frozen=True)
class SpaceTime(Windowed):
    """Objects placed by local descriptions.

    Args:
        layout: {phrase: region} for every prompt, or a list of such, one per prompt; regions as
            (x, y), (x, y, radius), (left, top, right, bottom), all from 0 to 1, or a mask [h, w].
            Or "row": the concepts of each prompt next to each other, from left to right; or
            "fit": the same in the order that fits the noise of each picture, at the
            cost of one more pass.
            For pipelines called with embeddings a list of (denoiser inputs, region).
        heads: selector; cross-attention sites.
        lam: lambda; None for 0.7 (convex) or 5 / objects (guidance). 0 is off, without a slope.
        slope: what is added to lambda by the end of the run, in proportion to the steps done;
            it stops at 0.
        mode: "convex" (lambda in [0, 1]) or "guidance".
        template: makes the description of a phrase.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
    """

    layout: Any = "row"
    heads: Any = "all"
    lam: float | None = None
    slope: float = 0.0
    mode: Literal["convex", "guidance"] = "convex"
    template: str = "a photo of the {}"
    start: float = 0.0
    stop: float = 1.0

    name: ClassVar[str] = "spacetime"
    extra: ClassVar[str] = "a pass for each object, at the first step"
    kinds: ClassVar[tuple[str, ...]] = ("cross",)
    adds_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("convex", "guidance"):
            raise OptionError(f"{self.name}: mode={self.mode!r} must be convex or guidance")
        most = 1.0 if self.mode == "convex" else math.inf
        if self.lam is not None and not (0 <= self.lam <= most and self.lam < math.inf):
            raise OptionError(
                f"{self.name}: lam={self.lam} must be "
                + ("in [0, 1] in mode 'convex'" if most == 1 else "finite, 0 or above")
            )
        end = (0.7 if self.lam is None else self.lam) + self.slope
        if not math.isfinite(self.slope) or end > most + 1e-9:
            raise OptionError(
                f"{self.name}: slope={self.slope} must be finite, and not lead lambda above 1 in "
                f"mode 'convex' (its end is {end:g})"
            )
        if "{}" not in self.template:
            raise OptionError(f"{self.name}: template={self.template!r} must hold a {{}}")
        _ = self.schedule
        for one in self._layouts():
            for name, region in one:
                checked_region(region, str(name))

    def _layouts(self) -> list[list[tuple[Any, Any]]]:
        """Return the given layouts as lists of (phrase, region); none for a word."""
        if isinstance(self.layout, str):
            if self.layout not in ("row", "fit"):
                raise OptionError(f"{self.name}: layout={self.layout!r}; as a word 'row' or 'fit'")
            return []
        if isinstance(self.layout, Mapping):
            return [list(self.layout.items())]
        if not isinstance(self.layout, Sequence):
            raise OptionError(f"{self.name}: layout={self.layout!r} must be a mapping or a list")
        if all(isinstance(one, Mapping) for one in self.layout):
            return [list(one.items()) for one in self.layout]
        return [list(self.layout)]

    @property
    def neutral(self) -> bool:
        """lambda = 0, or no object."""
        nothing = not isinstance(self.layout, str) and not any(self._layouts())
        return self.lam == self.slope == 0 or nothing or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> Scene:
        """Find the objects of each prompt and encode their descriptions."""
        prompts = prompts_of(run)
        objects = [self._objects(prompt, i, len(prompts)) for i, prompt in enumerate(prompts)]
        known: dict[str, Mapping[str, Tensor]] = {}
        for one in [one for mine in objects for one in mine]:
            if isinstance(one.description, str) and one.description not in known:
                inputs = run.text_inputs(one.description)
                known[one.description] = {k: v[:1] for k, v in inputs.items()}
        encoded = [
            [
                known[o.description] if isinstance(o.description, str) else o.description
                for o in one
            ]
            for one in objects
        ]
        return Scene(objects, encoded)

    def _objects(self, prompt: Prompt, i: int, prompts: int) -> list[Local]:
        mine = self.places(prompt, i, prompts)
        return [Local(self._describe(n, prompt), checked_region(r, str(n))) for n, r in mine]

    def places(self, prompt: Prompt, i: int, prompts: int) -> list[tuple[Any, Any]]:
        """Return the (phrase, region) of every object of prompt i of a number of prompts.

        Raises:
            OptionError: if there is none, or the layouts are no more than one and not as many.
            HostError: if the prompt is not known, and the layout is to be read from it.
        """
        if isinstance(self.layout, str):
            if prompt.text is None:
                raise HostError(
                    f"{self.name}: layout={self.layout!r} reads the prompt, but this run got "
                    "embeddings: give a list of (denoiser inputs, region)"
                )
            mine: list[tuple[Any, Any]] = list(side_by_side(prompt.text).items())
        else:
            layouts = self._layouts()
            if len(layouts) not in (1, prompts):
                raise OptionError(
                    f"{self.name}: {len(layouts)} layouts for {prompts} prompts; give one for all "
                    "or one each"
                )
            mine = layouts[i if len(layouts) > 1 else 0]
        if not mine:
            raise OptionError(f"{self.name}: the prompt {prompt.text!r} has no object to place")
        return mine

    def _describe(self, phrase: Any, prompt: Prompt) -> Any:
        if isinstance(phrase, Mapping):
            return phrase
        if prompt.text is not None:
            prompt.find([phrase])  # a phrase that is not in the prompt is an error
        return self.template.format(str(phrase).partition("#")[0])

    def denoise(self, call: ForwardCall) -> Tensor:
        """Before the first forward, run each object's description once, to read its keys."""
        if "cond" in call.rows and not call.state.ready:
            whole = None
            if self.layout == "fit":  # before keys are known, so that nothing is mixed in
                whole = replace(call.only("cond", "cond"), rest=()).proceed()
            each = []
            for i in range(call.state.most):
                own = call.only("cond", call.role, **call.state.rows(i, call.rows.n))
                each.append(replace(own, rest=()).proceed())  # not used further: no guidance
            if whole is not None:
                self._place(call, whole, each)
            call.state.ready = True
        return call.proceed()

    def _place(self, call: ForwardCall, whole: Tensor, each: list[Tensor]) -> None:
        """Choose the regions of each sample's objects."""
        scene: Scene = call.state
        channels = call.latents.shape[1]
        apart = torch.stack([differences(one, whole, channels) for one in each], dim=1).cpu()
        for sample, mine in enumerate(apart):
            count = len(scene.objects[scene.prompt(sample, len(apart))])
            scene.fitted.append(self.arranged(mine[:count]))

    def arranged(self, apart: Tensor) -> list[Any]:
        """Return the regions of the objects of one sample for layout "fit".

        Args:
            apart: how far each object's prediction is from that for the whole prompt [n, h, w].
        """
        return list(fitted(apart))

    def attend(self, call: AttentionCall) -> Tensor:
        """Read keys in the objects' own passes; mix in the conditional rows."""
        out = call.proceed()
        if not has_text(call):
            return out
        known = call.state.keys.setdefault(call.site.index, [])
        if call.slice(call.role) is not None:
            known.append((call.k, call.v, call.mask))
            return out
        where = place(call, "cond", self.name)
        if where is None or not known:
            return out
        heads = head_indices(call)
        rows = call.take(where.rows)
        local = torch.stack(
            [
                replace(rows, k=k, v=v, mask=mask).take(slice(None), heads).primitive()
                for k, v, mask in known
            ]
        )
        weights = self._lam(len(known), call.step) * call.state.weights(where, call.q.device)
        mine = out if heads is None else out[:, heads]
        base = self._unconditional(call, mine) if self.mode == "guidance" else None
        return put(out, mixed(mine[where.rows], local, weights, base), where.rows, heads, call)

    def _lam(self, objects: int, step: Step) -> float:
        """Return lambda at a step."""
        lam = self.lam
        if lam is None:
            lam = 0.7 if self.mode == "convex" else GUIDANCE / objects
        return max(0.0, lam + self.slope * step.fraction) if self.slope else lam

    def _unconditional(self, call: AttentionCall, out: Tensor) -> Tensor:
        rows = call.slice("uncond")
        if rows is None:
            raise HostError(
                f"{self.name}: mode 'guidance' needs the unconditional rows in the same call; "
                "this run has none there: take mode='convex'"
            )
        return out[rows]
