"""Controls that push as hard as a given one, but not where it points.

A gain that a placebo has too does not come from what the control claims. Each kind of placebo
is a function of the registry: it is given a control, the model's sites and a seed, and returns
the placebo, or None where the kind does not apply to the control.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.control import Control
from attnctl.errors import OptionError
from attnctl.hosts.run import Run
from attnctl.processors.guidance import PerturbedGuidance
from attnctl.processors.steering import Regulation
from attnctl.processors.vlm import PAI, VAR
from attnctl.processors.vlm.sinks import SinkMemory
from attnctl.records import Residual, Tokens
from attnctl.selectors import Selection
from attnctl.sites import Sites
from attnctl.words.prompts import Prompt

__all__ = [
    "KINDS",
    "NoPlacebo",
    "other_prompt_tokens",
    "other_tokens",
    "placebo",
    "placebos",
    "random_heads",
    "shuffled",
]

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


@placebo("other prompt tokens")
def other_prompt_tokens(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return the control with as many tokens of the text drawn at random, none of its own.

    Args:
        control: Attention Regulation; None is returned for others.
        sites: the model's sites.
        seed: of the draw, with the prompt.
    """
    if not isinstance(control, Regulation):
        return None

    class OtherTokens(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-other-tokens"

        def groups(self, prompt: Prompt) -> list[list[int]]:
            mine: list[list[int]] = super().groups(prompt)
            taken = {*prompt.borders(), *(p for one in mine for p in one)}
            others = [p for p in range(prompt.length()) if p not in taken]
            drawn = torch.Generator().manual_seed(seed + zlib.crc32((prompt.text or "").encode()))
            order = iter(torch.randperm(len(others), generator=drawn).tolist())
            return [[others[i] for _, i in zip(one, order, strict=False)] for one in mine]

    return OtherTokens(**_options(control))


def shuffled(control: PerturbedGuidance) -> PerturbedGuidance:
    """Return a placebo: each sample gets its neighbour's term, of the same strength.

    Args:
        control: a perturbation guidance; batches must hold at least two samples.
    """

    class Shuffled(type(control)):  # type: ignore[misc]
        name: ClassVar[str] = f"{control.name}-shuffled"

        def direction(self, cond: Tensor, weak: Tensor) -> Tensor:
            return super().direction(cond, weak).roll(1, dims=0)

    return Shuffled(**_options(control))


def _options(control: Control) -> dict[str, Any]:
    return {f.name: getattr(control, f.name) for f in dataclasses.fields(control)}


@placebo("other tokens")
def other_tokens(control: Control, sites: Sites, seed: int) -> Control | None:
    """Return a control of a language model that takes other tokens for what it acts on.

    PAI raises the text in place of the image; VAR takes as many image tokens, drawn at random,
    for the image's sinks. None is returned for other controls.

    Args:
        control: any control.
        sites: the model's sites.
        seed: of the draw.
    """
    options: dict[str, Any] = {
        f.name: getattr(control, f.name) for f in dataclasses.fields(control)
    }
    if isinstance(control, PAI):
        return TextRaised(**options)
    if isinstance(control, VAR):
        return RandomSinks(**options, seed=seed)
    return None


@dataclasses.dataclass(frozen=True)
class TextRaised(PAI):
    """PAI that raises the text."""

    name: ClassVar[str] = "pai-text"

    def raised(self, tokens: Tokens) -> Tensor:
        """Return the text."""
        return tokens.keys("text")


@dataclasses.dataclass(frozen=True)
class RandomSinks(VAR):
    """VAR that takes as many image tokens, drawn at random, for the image's sinks.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    name: ClassVar[str] = "var-random"

    def begin(self, run: Run, selection: Selection) -> SinkMemory:
        """Return a memory of random tokens."""
        draw = torch.Generator().manual_seed(self.seed)
        return RandomMemory(self.sink_dims, self.tau, self.protect, draw)


class RandomMemory(SinkMemory):
    """Draws image tokens in place of the image's sinks, as many in each row.

    Args:
        dims: as in `SinkMemory`.
        tau: as in `SinkMemory`.
        protect: as in `SinkMemory`.
        draw: source of the draws.
    """

    def __init__(
        self, dims: tuple[int, ...], tau: float, protect: tuple[int, ...], draw: torch.Generator
    ) -> None:
        super().__init__(dims=dims, tau=tau, protect=protect)
        self.draw = draw

    def found(self, residual: Residual, tokens: Tokens) -> Tensor:
        """Return the text's sinks and random image tokens."""
        sinks = super().found(residual, tokens)
        image = tokens.slots("image")[:, residual.past :]
        order = torch.rand(sinks.shape, generator=self.draw).to(sinks.device)
        rank = order.masked_fill(~image, 2.0).argsort(1).argsort(1)
        many = (sinks & image).sum(1, keepdim=True)
        return (sinks & ~image) | (image & (rank < many))
