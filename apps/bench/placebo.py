"""Controls that push as hard as a given one, but not where it points.

A gain that a placebo has too does not come from what the control claims. Each kind of placebo
is a function of the registry: it is given a control, the model's sites and a seed, and returns
the placebo, or None where the kind does not apply to the control.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.processors.guidance import PerturbedGuidance
from attnctl.selectors import Selection
from attnctl.sites import Sites

__all__ = ["KINDS", "NoPlacebo", "placebo", "placebos", "random_heads", "shuffled"]

Maker = Callable[[Control, Sites, int], Control | None]
KINDS: dict[str, Maker] = {}
"""Makers of placebos by the name that tables give their arms."""


class NoPlacebo(OptionError):
    """A kind of placebo applies to a control but cannot be made; the message says why."""


def placebo(name: str) -> Callable[[Maker], Maker]:
    """Decorator: register a kind of placebo, for instance random tokens in place of chosen ones.

    Args:
        name: what tables call it, in a few letters.
    """

    def register(maker: Maker) -> Maker:
        KINDS[name] = maker
        return maker

    return register


def placebos(
    control: Control, sites: Sites, seed: int, say: Callable[[str], None] | None = None
) -> dict[str, Control]:
    """Return the placebos of a control by the name of their kind.

    Args:
        control: the control.
        sites: the model's sites.
        seed: of what placebos draw at random.
        say: is told why a kind that applies could not be made, and when no kind applies.
    """
    found: dict[str, Control] = {}
    tell = say or (lambda text: None)
    for name, maker in KINDS.items():
        try:
            made = maker(control, sites, seed)
        except NoPlacebo as reason:
            tell(f"no placebo {name!r}: {reason}")
            continue
        if made is not None:
            found[name] = made
    if not found:
        tell(
            f"there is no placebo of {control.name} with these options; a gain over stock alone "
            "does not show that it comes from where the control points"
        )
    return found


@placebo("neighbour")
def _neighbour(control: Control, sites: Sites, seed: int) -> Control | None:
    return shuffled(control) if isinstance(control, PerturbedGuidance) else None


@placebo("other heads")
def random_heads(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return the control on as many heads, drawn from those of the model that it leaves alone.

    Args:
        control: any control with an option `heads`; None is returned for others, and where it
            takes all heads already.
        sites: the model's sites.
        seed: of the draw.

    Raises:
        NoPlacebo: if fewer heads are left than it takes.
    """
    if not any(f.name == "heads" for f in dataclasses.fields(control)):
        return None
    control = control.resolve(sites)
    every = _heads(sites.select("all", control.kinds))
    mine = set(_heads(sites.select(control.selector, control.kinds)))
    others = [head for head in every if head not in mine]
    if not others:
        return None
    if len(others) < len(mine):
        raise NoPlacebo(
            f"{control.name} takes {len(mine)} of {len(every)} heads, which leaves "
            f"{len(others)}; as many others need a control of at most half of the heads"
        )
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    chosen = sorted(others[i] for i in order[: len(mine)].tolist())
    return dataclasses.replace(control, heads=_tokens(chosen, sites, control.kinds))  # type: ignore[call-arg]


def _heads(selection: Selection) -> list[tuple[int, int]]:
    """Return (site index, head) of every selected head."""
    return [(i, h) for i, mask in selection.items() for h in mask.nonzero().flatten().tolist()]


def _tokens(heads: list[tuple[int, int]], sites: Sites, kinds: tuple[str, ...]) -> list[str]:
    """Return selector tokens: L3H1-2 where the layer has one site of these kinds, else names."""
    in_layer = Counter(site.layer for site in sites if site.kind in kinds)
    tokens = []
    for site in sites:
        mine = [head for index, head in heads if index == site.index]
        alone = site.layer is not None and in_layer[site.layer] == 1
        start = f"L{site.layer}H" if alone else f"{site.name}:H"
        tokens += [start + span for span in _spans(mine)]
    return tokens


def _spans(numbers: list[int]) -> list[str]:
    """Write 0 1 2 5 as "0-2", "5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def shuffled(control: PerturbedGuidance) -> PerturbedGuidance:
    """Return a placebo: each sample gets its neighbour's term, of the same strength.

    Args:
        control: a perturbation guidance; batches must hold at least two samples.
    """

    class Shuffled(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-shuffled"

        def direction(self, cond: Tensor, weak: Tensor) -> Tensor:
            return super().direction(cond, weak).roll(1, dims=0)

    options: dict[str, Any] = {
        f.name: getattr(control, f.name) for f in dataclasses.fields(control)
    }
    return Shuffled(**options)
