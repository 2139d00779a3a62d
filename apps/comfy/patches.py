"""Controls on a model of ComfyUI: an attention override, and what the sampler has to do.

The override acts only where `transformer_options` holds its own key, so that several nodes, each
with the overrides and wrappers that were there before, stay out of each other's passes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import HostError
from attnctl.processors.guidance.perturbed import PerturbedGuidance
from attnctl.records import Site, Step
from attnctl.selectors import Selection
from attnctl.sites import Sites

from .attention import Attention, Given
from .places import kind_in, name_in, site_in, step_in

__all__ = ["patched"]

_LOG = logging.getLogger("attnctl")
_SERIAL = count()
OVERRIDE, WRAPPER = "optimized_attention_override", "model_function_wrapper"


def patched(model: Any, control: Control) -> Any:
    """Return a clone of a ComfyUI model with a control; the model itself is left alone.

    Args:
        model: a ModelPatcher.
        control: one of `eligible`.
    """
    clone = model.clone()
    if control.neutral:
        return clone
    inside = clone.model_options.setdefault("transformer_options", {})
    node = Node(control, inside.get(OVERRIDE), clone.model_options.get(WRAPPER))
    # the clone may share the inner dict with the model
    clone.model_options["transformer_options"] = {**inside, OVERRIDE: node.attend}
    if isinstance(control, PerturbedGuidance):
        clone.set_model_sampler_post_cfg_function(node.guide)
    else:
        clone.set_model_unet_function_wrapper(node.forward)
    return clone


@dataclass(eq=False)
class Node:
    """One control on one model.

    Args:
        control: the control.
        earlier: the attention override that was there before.
        wrapped: the wrapper of the model's forwards that was there before.
    """

    control: Control
    earlier: Attention | None
    wrapped: Any
    sites: Sites = field(default_factory=Sites)
    by_name: dict[str, Site] = field(default_factory=dict)
    selection: Selection | None = None

    reached: int = 0
    """Calls that the control has had."""

    def __post_init__(self) -> None:
        self.key = f"attnctl/{next(_SERIAL)}"

    def attend(self, attention: Attention, *args: Any, **options: Any) -> Tensor:
        """The override: note the site, or in a pass of ours run the control."""
        given = Given(attention, args, options)
        step: Step | None = given.options.get(self.key)
        site = self._note(given)
        if step is None:
            return self._stock(attention, args, options)
        heads = self._select().get(site.index)
        if heads is None:
            return self._stock(attention, args, options)
        self.reached += 1
        return given.answer(self.control.attend(given.call(site, step, heads, self.earlier)))

    def _stock(self, attention: Attention, args: Any, options: Any) -> Tensor:
        if self.earlier is None:
            return attention(*args, **options)
        return self.earlier(attention, *args, **options)

    def _note(self, given: Given) -> Site:
        kind = kind_in(given.options, given.q.shape[2], given.k.shape[2])
        name = name_in(given.options, kind)
        if name not in self.by_name:
            self.by_name[name] = site_in(given.options, len(self.sites), given.q, given.k)
            self.sites.append(self.by_name[name])
            self.selection = None
        return self.by_name[name]

    def _select(self) -> Selection:
        """Return the selected heads of the sites that are known so far."""
        if self.selection is None:
            if not self.sites:
                raise HostError(
                    f"{self.control.name}: this model called its attention past ComfyUI's "
                    f"{OVERRIDE!r}, so that no control can act on it"
                )
            self.selection = self.sites.select(self.control.selector, self.control.kinds)
            heads = int(sum(mask.sum() for mask in self.selection.values()))
            _LOG.info(
                "%s: %d heads at %d of %d sites", self.control, heads, len(self.selection),
                len(self.sites),
            )  # fmt: skip
        return self.selection

    def guide(self, args: dict[str, Any]) -> Tensor:
        """After guidance of the sampler: add w (c - p), p from a perturbed pass.

        The sampler's `denoised` is an affine function of the model's output, so that the term
        is the same for noise, velocity and clean predictions.
        """
        import comfy.samplers  # type: ignore[import-not-found, unused-ignore]

        control, denoised = self.control, args["denoised"]
        assert isinstance(control, PerturbedGuidance)
        options = args["model_options"]
        inside = options.get("transformer_options", {})
        step = step_in(inside, args["sigma"])
        if step not in control.schedule:
            return denoised
        self._select()
        options = {**options, "transformer_options": {**inside, self.key: step}}
        before = self.reached
        (weak,) = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], options
        )
        self._require_reached(before)
        cond = args["cond_denoised"]
        wide = torch.promote_types(cond.dtype, torch.float32)
        term = control.scale * control.direction(cond.to(wide), weak.to(wide))
        return (denoised.to(wide) + term).to(denoised.dtype)

    def forward(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        """Around a forward of the model: let the control act in it, at the steps of its window.

        The first forward is run twice: once to see the model's sites.
        """
        inside = args["c"].get("transformer_options", {})
        if self.selection is None:
            self._forward(apply_model, args)
            self._select()
        step = step_in(inside, inside.get("sigmas", args["timestep"]))
        if step not in self.control.schedule:
            return self._forward(apply_model, args)
        c = {**args["c"], "transformer_options": {**inside, self.key: step}}
        before = self.reached
        out = self._forward(apply_model, {**args, "c": c})
        self._require_reached(before)
        return out

    def _require_reached(self, before: int) -> None:
        """Refuse a pass without a call: a later node may have put its own override over ours."""
        if self.reached == before:
            raise HostError(
                f"{self.control.name}: no attention call reached it; a node after it may have "
                f"replaced ComfyUI's {OVERRIDE!r}: put this node after that one"
            )

    def _forward(self, apply_model: Any, args: dict[str, Any]) -> Tensor:
        if self.wrapped is not None:
            return self.wrapped(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])
