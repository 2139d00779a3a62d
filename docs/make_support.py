"""Writes `docs/support.md`: which controls act on which models, tried on tiny pipelines.

Run `python docs/make_support.py`, which also writes the options of the controls' pages
(`make_controls.py`); a test compares the file with `page()`. Every entry is
tried: each control is installed on the family's tiny random-weight pipeline, one step is run,
and the control's report must show that it was reached.
"""

from __future__ import annotations

import functools
import re
import runpy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

import attnctl
from attnctl.errors import AttnctlError
from attnctl.hosts import targets
from attnctl.processors.latent.engine import LatentControl
from attnctl.testing import zoo
from attnctl.testing.vlms import VLMS

PAGE = Path(__file__).parent / "support.md"

CFG = {
    ("batched", False): "one call, [uncond, cond]",
    ("batched", True): "one call, [cond, uncond]",
    ("separate", True): "two calls, cond first",
    ("none", False): "none (embedded)",
}
ORDER = ("self", "cross", "joint", "linear", "other")
HEAD = ("name", "model", "pipeline", "denoiser", "CFG", "sites", "grid", "controls")
INTRO = """\
# Supported models

Written by `docs/make_support.py`; do not edit by hand.

Each line is a family of models that the tests build from stock diffusers classes, with random
weights and a tiny configuration. A control is listed where it was installed on that pipeline,
two steps were run, and it was reached. *all* means {controls}.

The classes decide, not the checkpoint: a fine-tune or a distilled version of a model in the
table is served by the same line. A denoiser of another class works too if its attention
modules are built like those of diffusers; `attnctl.sites(pipe)` shows what is found.
[How to add a family](../CONTRIBUTING.md#add-a-model-family).

- **CFG** is how the pipeline runs classifier-free guidance: both branches in one denoiser call,
  one call for each, or no second branch. [What that means for guidance](guidance.md).
- **sites** are the [kinds of attention](concepts.md#site-and-head) there are, text refiners
  left out.
- **grid** says whether the (frames, height, width) of the image tokens is known. Without it
  `seg` blurs with an infinite `sigma` only, and a joint sequence has no named image and text
  tokens.

`radial` drops attention between distant frames; it is listed for videos only.

Limits of single models stand [among the questions](faq.md#what-does-not-work-yet).
"""
REFUSED = """
## What is refused, and why

A control that finds no site of its kinds is refused when it is installed (`pladis` needs
cross-attention, for one). The others are refused at the first step; the error says:
"""

SEEING = """
## Vision-language models

Of transformers: {families}.

The tests run these with random weights and tiny configurations, on `sdpa` and `eager` attention,
in prompts and written tokens. Other models work too if their decoder's attention goes through
transformers' attention interface; `attnctl.sites(model)` shows what is found. FlashAttention
(`flash_attention_2` to `_4`) was tested
[with a stand-in for the package](query_path.md#a-language-model-on-flashattention). Attention of
another kind is refused with what to do.

{controls} act on all of them. [CARVE](carve.md) needs image tokens that
are one grid of one picture. [What of `generate` contrasts refuse](contrast.md#what-is-refused).
"""


@dataclass(frozen=True)
class Entry:
    """What was found out about one family.

    Args:
        family: the family.
        pipeline: class of its pipeline.
        denoisers: class of each denoiser, without repetition.
        kinds: kinds of sites there are, text refiners left out.
        grid: whether the grid of the image tokens is known.
        works: controls that were reached.
        refused: what the others say that admit some of the kinds.
    """

    family: zoo.Family
    pipeline: str
    denoisers: tuple[str, ...]
    kinds: tuple[str, ...]
    grid: bool
    works: tuple[str, ...]
    refused: dict[str, str]


def examine(name: str) -> Entry:
    """Build one family and try every control on it.

    Raises:
        FamilyUnavailable: if the installed diffusers lacks it.
    """
    family = zoo.FAMILIES[name]
    pipe = family.build()
    kinds = {site.kind for site in attnctl.sites(pipe)} - {"text"}
    able = {k: c for k, c in attnctl.controls().items() if kinds & set(c.kinds)}
    if "num_frames" not in family.fixed:
        able.pop("radial", None)
    probe = Probe()
    refused = try_controls(pipe, able, name, probe)
    return Entry(
        family,
        type(pipe).__name__,
        tuple(dict.fromkeys(type(m).__name__ for m in targets(pipe).values())),
        tuple(kind for kind in ORDER if kind in kinds),
        any(probe.grids),
        tuple(key for key in able if key not in refused),
        refused,
    )


@dataclass(frozen=True)
class Probe(attnctl.Control):
    """Notes whether calls know their grid; changes nothing."""

    grids: list[bool] = field(default_factory=list)

    name: ClassVar[str] = "probe"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        """Look at the grid."""
        self.grids.append(call.spans.grid is not None)
        return call.proceed()


def try_controls(
    pipe: Any, able: dict[str, type[attnctl.Control]], name: str, probe: Probe
) -> dict[str, str]:
    """Run controls at every step, else in their default options; return what refusing ones say.

    All together first, since that is one run; one by one if any of them refuses.

    Raises:
        AssertionError: if one was installed and not reached.
    """
    stack = [make(cls, name) for cls in able.values()]
    stack.sort(key=lambda control: control.replaces_softmax)
    try:
        with warnings.catch_warnings(), attnctl.patch(pipe, probe, *stack) as handle:
            # these clips are short
            warnings.filterwarnings("ignore", "radial keeps every block")
            zoo.run(pipe, batch=1, steps=2)
    except AttnctlError as error:
        if len(able) == 1:
            return {key: str(error) for key in able}
        each = (try_controls(pipe, {key: able[key]}, name, probe) for key in able)
        return {key: message for one in each for key, message in one.items()}
    # of two denoisers that share the steps, one may have had none
    reached = {line.control.name for line in handle.report().lines if line.calls}
    assert reached == {"probe", *able}, (name, set(able) - reached)
    return {}


def make(cls: type[attnctl.Control], name: str) -> attnctl.Control:
    """Return a control that acts at every step."""
    if cls.name == "nag":
        return cls(start=0.0, stop=1.0, negative=negative(name))
    if cls.name == "radial":
        return cls(start=0.0, stop=1.0, dense_layers=0, block=32)
    if cls.name == "regulation":  # there is no prompt either
        return cls(start=0.0, stop=1.0, targets=[[1]], restore=[0])
    if cls.name == "spacetime":
        return cls(start=0.0, stop=1.0, layout=[(negative(name), (0.5, 0.5))])
    if cls.name == "initno":  # one look is enough to see that it is reached
        search = {"rounds": 1, "round_steps": 1, "last_steps": 0, "updates": 0}
        return cls(start=0.0, stop=1.0, words=[[1], [2]], **search)
    if issubclass(cls, LatentControl):
        return cls(start=0.0, stop=1.0, words=[[1], [2]], updates=0)
    return cls(start=0.0, stop=1.0)


@functools.cache
def negative(name: str) -> dict[str, Tensor]:
    """Return other text tokens, since the tiny pipelines have no text encoder."""
    _, inputs = zoo.denoiser_inputs(name)
    return {"encoder_hidden_states": inputs["encoder_hidden_states"][:1].flip(1)}


def model_of(family: zoo.Family) -> str:
    """Return the model's name: the builder's docstring up to the first colon or comma."""
    return re.split("[:,\n]", family.pipeline.__doc__ or family.name)[0].rstrip(".")


def row(entry: Entry) -> list[str]:
    """Return one line of the table."""
    return [
        f"`{entry.family.name}`",
        model_of(entry.family),
        f"`{entry.pipeline}`",
        ", ".join(f"`{name}`" for name in entry.denoisers),
        CFG[entry.family.cfg, entry.family.cond_first],
        ", ".join(entry.kinds),
        "yes" if entry.grid else "no",
        _controls(entry.works),
    ]


def for_diffusion() -> list[str]:
    """Return the controls that act on some kind of attention of a diffusion model."""
    return [key for key, cls in attnctl.controls().items() if set(cls.kinds) & set(ORDER)]


def _controls(works: tuple[str, ...]) -> str:
    others = [key for key in for_diffusion() if key not in works]
    if len(others) < len(works):
        return f"all but {', '.join(others)}" if others else "all"
    return ", ".join(works) or "none yet"


def page() -> str:
    """Return the page for the installed diffusers.

    Raises:
        FamilyUnavailable: if it lacks a family of the table.
    """
    entries = [examine(name) for name in zoo.FAMILIES]
    controls = ", ".join(f"`{key}`" for key in for_diffusion())
    lines = [INTRO.format(controls=controls), _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(row(entry)) for entry in entries]
    lines.append(REFUSED)
    lines += [
        f'- `{entry.family.name}`, {", ".join(f"`{key}`" for key in keys)}: "{message}"'
        for entry in entries
        for message, keys in _by_message(entry).items()
    ]
    return "\n".join(lines) + "\n" + seeing()


def seeing() -> str:
    """Return what is said of vision-language models."""
    families = ", ".join((one.model.__doc__ or one.name).rstrip(".") for one in VLMS.values())
    found = [key for key, cls in attnctl.controls().items() if "causal" in cls.kinds]
    return SEEING.format(families=families, controls=", ".join(f"`{key}`" for key in found))


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _by_message(entry: Entry) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key, message in entry.refused.items():
        grouped.setdefault(message, []).append(key)
    return grouped


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page(), encoding="utf-8")
    runpy.run_path(str(PAGE.with_name("make_controls.py")), run_name="__main__")
