"""The one engine of the latent-gradient methods: look at the maps, step down a loss, look again.

Before the denoiser's own call of a step, the conditional rows run once more with gradients; the
maps of the text tokens at the selected sites make a loss per sample, and the latents move,

    x' = x - s_i dL/dx,      s_i = scale sqrt(r_i),    r_i = linspace(1, decay, steps)_i

x being the latents as the denoiser is given them (variance preserving for every scheduler, so
that a scale means the same for DDIM and Euler). The moved latents go into all denoiser calls of
the step, with CFG in one call or two, and into the scheduler's step.

What it takes care of: the gradient pass ends after the last site that it needs, which saves the
rest of the model in both directions; weights are frozen meanwhile, so that no activation is kept
for their sake; the caller may be in no_grad or inference mode; half precision has a scaled loss,
and samples whose gradient is not finite stay where they are, with a warning.

References:
    Chefer et al., "Attend-and-Excite", 2023 (arXiv 2301.13826), whose step sizes and refinement
    these are.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from attnctl.errors import AttnctlWarning, ControlConflict, HostError, OptionError
from attnctl.processors.windowed import Windowed
from attnctl.records import AttentionCall, ForwardCall, Rows, Step
from attnctl.words.prompts import prompts_of

from . import recordable, recorded
from .maps import Grid, Seen, image_rows, of_sample, seen, sharpened, smoothed, text_maps
from .recorded import Recorder
from .targets import Positions, Target, content_of, targets_of

if TYPE_CHECKING:
    from attnctl.hosts.run import Run
    from attnctl.selectors import Selection
    from attnctl.sites import Sites

__all__ = ["LatentControl", "Look", "Maps", "Pass", "State"]

T = TypeVar("T")
_HALF_SCALE = 2.0**10
"""Factor on the loss in float16, whose smallest number is 6e-8."""


@dataclass(frozen=True)
class Maps:
    """What a loss sees of one sample at one step.

    Args:
        text: [tokens, frames, height, width]; over the tokens they sum to 1 everywhere.
        targets: the objects.
        step: where the run stands.
        content: tokens of the prompt's words; of the objects where the others are not known.
        noun_only: whether an object's map is its noun's, else the mean over all its words.
        drop: columns at either end that `sharp` leaves out.
        sample: which sample of the batch this is.
        prompt: which prompt of the run it belongs to.
        image: image queries and image keys by site, for controls with `image_rows`.
    """

    text: Tensor
    targets: tuple[Target, ...]
    step: Step
    content: Positions = ()
    noun_only: bool = True
    drop: tuple[int, int] = (1, 1)
    sample: int = 0
    prompt: int = 0
    image: tuple[Seen, ...] = ()

    def sharp(self) -> Tensor:
        """Return the maps of all tokens after Attend-and-Excite's softmax; 0 where dropped."""
        first, last = self.drop[0], len(self.text) - self.drop[1]
        inner = sharpened(self.text[first:last])
        ends = inner.new_zeros((1, *inner.shape[1:]))
        before, after = ends.expand(first, -1, -1, -1), ends.expand(self.drop[1], -1, -1, -1)
        return torch.cat([before, inner, after])

    @cached_property
    def smooth(self) -> Tensor:
        """The objects' maps [K, frames, height, width] of Attend-and-Excite: sharp, blurred."""
        return smoothed(self.objects(self.sharp()))

    def objects(self, maps: Tensor) -> Tensor:
        """Return one map an object [K, frames, height, width], the mean over its tokens."""
        return torch.stack(
            [self.word(maps, t.noun if self.noun_only else t.tokens) for t in self.targets]
        )

    def word(self, maps: Tensor, positions: Positions) -> Tensor:
        """Return the map of a word [frames, height, width], the mean over its pieces."""
        # not by a list: its copy to the device waits for the device, its gradient is a sort
        if len(positions) == 1:
            return maps[positions[0]]
        return torch.stack([maps[p] for p in positions]).mean(0)

    def rows(self, places: Tensor) -> Tensor:
        """Return what image tokens attend to in the image [K, frames, height, width].

        Over the image they sum to 1: in joint attention each row is divided by its sum.

        Args:
            places: numbers [K] of the tokens on the flattened grid of the maps.

        Raises:
            HostError: if no site of that grid has image keys.
        """
        if not self.image:
            raise HostError(
                "no selected site with the grid of the words' maps has attention among image "
                "tokens, or the control does not say image_rows = True"
            )
        return image_rows(self.image, places)


@dataclass(eq=False)
class State:
    """What one run of a latent control remembers.

    Args:
        targets: the objects by prompt.
        content: tokens of all words by prompt, () where they are not known.
        step: step whose latents have been moved.
        sites: the sites whose maps are used; None until the first gradient pass.
        noted: of each site the last primitive call with keys that are used: a site may make
            several calls in a forward, not all of them about text.
        ends: site and primitive call that a pass of so many samples needs last.
        ends_at: those at which the pass under way ends; None to run to the model's end.
        may_end: whether passes may, found out once: the walk through thousands of modules takes
            milliseconds, as many as some steps do.
        unknown: what keeps the model from being recorded unasked, likewise.
        weights: the denoiser's, listed once for the same reason.
        seen: queries and text keys of the pass under way, by site.
        image_sites: those whose image keys are used.
        image: queries and image keys of the pass under way, by site.
        memory: what each sample's loss keeps from step to step.
        skipped: (step, sample) whose gradient was not finite.
        account: what the report says about the run.
        passes: gradient passes so far.
        recorded: those that are recorded, and replayed.
    """

    targets: list[tuple[Target, ...]]
    content: list[Positions]
    step: int = -1
    sites: tuple[int, ...] | None = None
    noted: dict[int, int] = field(default_factory=dict)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    ends_at: tuple[int, int] | None = None
    may_end: bool | None = None
    unknown: str | None = None
    weights: list[Tensor] | None = None
    seen: dict[int, list[Seen]] = field(default_factory=dict)
    image_sites: tuple[int, ...] = ()
    image: dict[int, list[Seen]] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    loss_scale: float = _HALF_SCALE
    skipped: list[tuple[int, int]] = field(default_factory=list)
    account: Any = None
    passes: int = 0
    recorded: Recorder = field(default_factory=Recorder)

    def of(self, each: Sequence[T], sample: int, samples: int) -> T:
        """Return what a sample's prompt has; the samples of one prompt follow each other."""
        return each[sample * len(each) // samples]


class _Enough(BaseException):
    """Ends a gradient pass after the last site that is needed."""


@dataclass(frozen=True)
class LatentControl(Windowed):
    """Base of the latent-gradient controls: subclasses say what the loss of a sample is.

    Args:
        words: the objects: None for the concepts of each prompt; else nouns with their
            attributes before them (["red circle", "blue square"], or text with commas), or
            token positions ([[3], [7]]; with attributes [[[2], [3]], [[6], [7]]]).
        scale: s, the step size; 0 is off.
        heads: selector of the cross- and joint-attention sites whose maps are used.
        start: fraction of the run at which it begins.
        stop: fraction of the run at which it ends.
        shrink: of the sites' grids the one is used whose height is nearest to that of the
            latents over `shrink`, as 16x16 is for Stable Diffusion at 512 pixels.
        decay: r at the last step, in [0, 1].
        tokens: "noun", or "phrase" for the mean over all words of an object.
        normalise: divide the gradient by its root mean square first, so that `scale` is that
            of the move, whatever the model.
        keep_norm: scale each sample back to the norm it had (ours): a move then turns the
            latents, and leaves them as large as the noise level wants them.
        refine_at: fractions of the run at which to refine: repeat until the loss is low enough.
        reach: 1 - the loss that is low enough, at each of `refine_at`.
        updates: at most so many repetitions; 0 for no refinement.
        checkpoint: gradient checkpointing: less memory, one more forward.
        at_once: at most so many samples in one gradient pass: fewer take less memory, more take
            less time where the GPU waits for Python. All of them where another control acts on
            every row of the pass, which may be about samples together.
        replay: on CUDA, record the gradient pass as CUDA graphs and replay it from then on,
            without Python: "auto" where it is known to change nothing, True or else fail.
    """

    words: Any | None = None
    scale: float = 20.0
    heads: Any = "all"
    start: float = 0.0
    stop: float = 1.0
    shrink: float = 4.0
    decay: float = 0.5
    tokens: Literal["noun", "phrase"] = "noun"
    normalise: bool = False
    keep_norm: bool = False
    refine_at: tuple[float, float, float] = (0.0, 0.2, 0.4)
    reach: tuple[float, float, float] = (0.05, 0.5, 0.8)
    updates: int = 0
    checkpoint: bool = False
    at_once: int = 2
    replay: bool | Literal["auto"] = "auto"

    kinds: ClassVar[tuple[str, ...]] = ("cross", "joint")
    own_rows_only: ClassVar[bool] = True
    extra: ClassVar[str] = (
        "a forward and a backward of the conditional rows, up to the last site that is needed, "
        "at each step of its window"
    )
    least: ClassVar[int] = 1
    """Fewest objects that the loss needs."""
    drop: ClassVar[tuple[int, int]] = (1, 1)
    """Text columns at either end that the losses leave out, as Attend-and-Excite does."""
    image_rows: ClassVar[bool] = False
    """Whether the loss asks for `Maps.rows`."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise OptionError(f"{self.name}: scale={self.scale} must be finite, 0 or above")
        if not 0 <= self.decay <= 1:
            raise OptionError(f"{self.name}: decay={self.decay} is outside [0, 1]")
        if not self.shrink > 0:
            raise OptionError(f"{self.name}: shrink={self.shrink} must be above 0")
        if self.updates < 0:
            raise OptionError(f"{self.name}: updates={self.updates} must be 0 or above")
        if self.at_once < 1:
            raise OptionError(f"{self.name}: at_once={self.at_once} must be 1 or above")
        if self.replay != "auto" and not isinstance(self.replay, bool):
            raise OptionError(
                f"{self.name}: replay={self.replay!r} is not one of true, false, auto"
            )
        if self.replay is True and self.checkpoint:
            raise OptionError(
                f"{self.name}: a checkpointed pass cannot be recorded: give replay=True or "
                "checkpoint=True"
            )
        if self.tokens not in ("noun", "phrase"):
            raise OptionError(f"{self.name}: tokens={self.tokens!r} is not one of noun, phrase")
        for name in ("refine_at", "reach"):
            if not all(0 <= f <= 1 for f in getattr(self, name)):
                raise OptionError(f"{self.name}: {name}={getattr(self, name)} leaves [0, 1]")
        _ = self.schedule  # checks start and stop

    # -- what a method says ------------------------------------------------------------------

    def loss(self, maps: Maps, memory: dict[str, Any]) -> Tensor:
        """Return the loss of one sample, a scalar.

        Args:
            maps: its maps now.
            memory: what `remember` kept at the sample's step before; empty at the first.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its loss is")

    def shortfall(self, maps: Maps, loss: Tensor) -> Tensor:
        """Return what refinement brings down: the loss, or another scalar."""
        return loss

    def refining(self, maps: Maps, loss: Tensor) -> Tensor:
        """Return what repetitions of a refinement step down: the loss, or another scalar."""
        return loss

    def remember(self, maps: Maps, memory: dict[str, Any]) -> None:
        """Keep in `memory` what the next step's loss needs, after this step's last look."""

    def objects(self, prompt: int, prompts: int) -> Any:
        """Return the objects of a prompt, in the form of `words`.

        Args:
            prompt: its number.
            prompts: how many the run has.
        """
        return self.words

    def choose(self, targets: tuple[Target, ...], columns: int) -> tuple[Target, ...]:
        """Return the objects to steer, of a number of text tokens; placebos return others."""
        return targets

    def direction(self, grad: Tensor) -> Tensor:
        """Return what the latents [n, ...] move against; placebos override it."""
        return grad

    # -- planes ------------------------------------------------------------------------------

    @property
    def neutral(self) -> bool:
        """A scale of 0, or no step."""
        return self.scale == 0 or self.schedule.empty

    def begin(self, run: Run, selection: Selection) -> State:
        """Find the objects of every prompt."""
        if run.pipe is None:
            raise HostError(
                f"{self.name} moves the latents, which a bare denoiser's caller holds: patch the "
                "pipeline instead"
            )
        prompts = prompts_of(run)
        targets = [
            targets_of(prompt, self.objects(i, len(prompts))) for i, prompt in enumerate(prompts)
        ]
        few = next((t for t in targets if len(t) < self.least), None)
        if few is not None:
            raise OptionError(
                f"{self.name} needs at least {self.least} objects and was given {len(few)}: name "
                "them, such as words=['cat', 'dog']"
            )
        content = [content_of(prompt) for prompt in prompts]
        return State(targets, content, recorded=Recorder(must=self.replay is True))

    def attend(self, call: AttentionCall) -> Tensor:
        """Note queries and keys of the gradient pass; the output stays the stock one."""
        state: State = call.state
        index, kind, known = call.site.index, call.site.kind, state.sites is not None
        if kind != "self" and (not known or index in (state.sites or ())):
            _note(state, state.seen, call, seen(call))
        if self.image_rows and kind != "cross" and (not known or index in state.image_sites):
            _note(state, state.image, call, seen(call, "image"))
        if state.ends_at == (index, call.index):
            raise _Enough
        return call.proceed()

    def denoise(self, call: ForwardCall) -> Tensor:
        """Move the latents once a step, before its first conditional call."""
        state: State = call.state
        call = call.caught_up()
        if state.step == call.step.index or "cond" not in call.rows:
            if state.step != call.step.index and "uncond" in call.rows:
                raise HostError(
                    f"{self.name}: this pipeline runs the unconditional branch first, so that its "
                    "latents cannot be moved in time"
                )
            return call.proceed()
        if call.cached:
            raise ControlConflict(
                f"{self.name} needs every block to run, but a diffusers cache is on: call "
                "disable_cache() first"
            )
        state.step = call.step.index
        moved = self._moved(call, state)
        if self.steps_left(call.step) == 1:
            state.recorded.forget()  # what comes after, as decoding the latents, needs memory too
        return call.proceed() if moved is None else call.move_latents(moved).proceed()

    def account(self, state: State, steps: tuple[int, ...], sites: Sites) -> Any:
        """Return what a subclass noted of the run, else what became of `replay`."""
        made = state.recorded
        made.forget()
        if state.account is None and (self.replay is True or made.replayed or made.why):
            return Passes(state.passes, made.replayed, made.why)
        return state.account

    # -- one step ----------------------------------------------------------------------------

    def _moved(self, call: ForwardCall, state: State) -> Tensor | None:
        """Return the latents after this step's updates, None if none moved."""
        if state.weights is None:
            state.weights = list(call.model.parameters())
        with _gradients(call, self.checkpoint, state.weights):
            alone = call.only("cond", call.role)
            alone = replace(alone, inputs=_ordinary(alone.inputs), rest=())
            first = alone.latents.detach().float()
            end = self._move(Pass(self, alone, state, samples=len(first)), first)
        return None if torch.equal(end, first) else end

    def _move(self, run: Pass, x: Tensor) -> Tensor:
        """Return the latents after this step's updates, so many samples at a time."""
        size = self.at_once if run.alone else len(x)
        ends = [
            self._descend(run.part(start, start + size), x[start : start + size])
            for start in range(0, len(x), size)
        ]
        return ends[0] if len(ends) == 1 else torch.cat(ends)

    def _descend(self, run: Pass, x: Tensor) -> Tensor:
        size = self.step_size(run.call.step)
        look = run.look(x)
        target = self.target(run.call.step)
        if target is not None:
            going = look.shortfalls > target
            for _ in range(self.updates):
                if not going.any():
                    break
                met = look.shortfalls <= target
                x = run.update(look, size, going)
                look = run.look(x)
                going = going & ~met  # the one that met the target is moved once more
        x = run.update(look, size, None)
        for maps in look.maps:
            self.remember(maps, run.state.memory.setdefault(maps.sample, {}))
        return x

    def steps_left(self, step: Step) -> int:
        """Return how many steps of the window are to come, this one included."""
        later = (replace(step, index=index) for index in range(step.index, step.count))
        return sum(one in self.schedule for one in later)

    def step_size(self, step: Step) -> float:
        """Return s_i."""
        part = step.index / (step.count - 1) if step.count > 1 else 0.0
        return self.scale * math.sqrt(1 - (1 - self.decay) * min(part, 1.0))

    def target(self, step: Step) -> float | None:
        """Return the loss to reach at this step, None if it is no step of refinement."""
        if not self.updates:
            return None
        for fraction, reach in zip(self.refine_at, self.reach, strict=True):
            if step.index == round(fraction * step.count):
                return 1 - reach
        return None


def _note(
    state: State, into: dict[int, list[Seen]], call: AttentionCall, found: Seen | None
) -> None:
    if found is not None:
        into.setdefault(call.site.index, []).append(found)
        state.noted[call.site.index] = call.index


@dataclass(frozen=True)
class Look:
    """Latents [n, ...] with a graph, the losses [n] they have, and what refinement goes by."""

    x: Tensor
    losses: Tensor
    refining: Tensor
    shortfalls: Tensor
    maps: list[Maps]


@dataclass(frozen=True)
class Passes:
    """How many gradient passes a run took, how many of them were replayed, and why not more."""

    all: int
    replayed: int
    why: str = ""

    def __str__(self) -> str:
        said = f"{self.replayed} of {self.all} gradient passes were replayed"
        return f"{said}: {self.why}" if self.why else said


@dataclass(frozen=True)
class Pass:
    """Gradient passes of one step.

    Args:
        control: whose passes they are.
        call: the conditional rows of some samples.
        state: of the run.
        first: number of the first of these samples.
        samples: how many the run has.
    """

    control: LatentControl
    call: ForwardCall
    state: State
    first: int = 0
    samples: int = 1

    @cached_property
    def alone(self) -> bool:
        """Whether no other control acts in these passes."""
        others = (e for e in self.call.stack if e.control is not self.control)
        return not any(e.attends and not e.control.own_rows_only for e in others)

    def part(self, start: int, stop: int) -> Pass:
        """Return the passes of some of these samples."""
        call, stop = self.call, min(stop, self.call.rows.n)
        if stop - start == call.rows.n:
            return self
        inputs = call.take_inputs(call.inputs, call.rows, slice(start, stop))
        call = replace(call, inputs=inputs, rows=Rows(call.rows.groups, stop - start))
        return replace(self, call=call, first=self.first + start)

    def look(self, x: Tensor, loss: Callable[[Maps], Tensor] | None = None) -> Look:
        """Run the model with gradients and return the losses: the control's, or others."""
        leaf = x.detach().requires_grad_(True)
        maps = self._all_maps(leaf)
        memory, control = self.state.memory, self.control
        losses = [
            control.loss(m, memory.setdefault(m.sample, {})) if loss is None else loss(m)
            for m in maps
        ]
        short = refining = losses
        if control.target(self.call.step) is not None:
            pairs = list(zip(maps, losses, strict=True))
            short = [control.shortfall(m, one).detach() for m, one in pairs]
            refining = [control.refining(m, one) for m, one in pairs]
        return Look(leaf, torch.stack(losses), torch.stack(refining), torch.stack(short), maps)

    def _all_maps(self, x: Tensor) -> list[Maps]:
        """Run the model, and return what it shows of each sample."""
        state = self.state
        state.passes += 1
        if len(x) in state.ends and state.may_end is None:
            state.may_end = _may_end(self.call)
        state.ends_at = state.ends.get(len(x)) if state.may_end else None
        if self._replays(x):
            # the first pass of so many samples finds where it may end
            left = self._left if len(x) in state.ends else None
            text = state.recorded.run(self._text_maps, x, self.call.inputs, left)
        else:
            text = self._text_maps(x, self.call.inputs)
        maps = [self._maps(text, i, len(x)) for i in range(len(x))]
        state.image.clear()
        return maps

    def _left(self) -> int:
        """Return at how many steps there is still such a pass."""
        return self.control.steps_left(self.call.step)

    def _replays(self, x: Tensor) -> bool:
        """Whether the pass may be one that is replayed; the report says why it is not."""
        if self.control.replay is False:
            return False
        why = self._hindrance(x)
        if why:
            self.state.recorded.refuse(why)
        auto = self.control.replay == "auto"
        return not why and not (auto and not recorded.possible(x))

    def _hindrance(self, x: Tensor) -> str:
        """Return why passes have to be run, "" if nothing is against a recording."""
        state, auto = self.state, self.control.replay == "auto"
        if not recorded.possible(x):
            # unasked, nothing is expected of a CPU
            return "" if auto else "the latents are not on CUDA, or under autocast"
        if not self.alone:
            return "another control acts in them"
        if state.may_end is False or self.control.checkpoint:
            return "hooks, checkpointing or adapter scales need the whole forward"
        if state.image_sites:
            return "the loss looks at attention among image tokens"
        if not auto:
            return ""
        if state.unknown is None:
            state.unknown = recordable.unknown(self.call.run.args, self.call.model)
        return state.unknown

    def _text_maps(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the model and return the maps of the text tokens; see `maps.text_maps`."""
        state = self.state
        state.seen.clear()
        state.image.clear()
        call = replace(self.call, inputs=inputs).with_latents(x)
        with contextlib.suppress(_Enough):
            call.base(call)
        self._choose_sites(x)
        assert state.sites is not None
        last = state.sites[-1]
        state.ends[len(x)] = last, state.noted[last]
        text = text_maps([state.seen[index] for index in state.sites], len(x))
        state.seen.clear()
        return text

    def _choose_sites(self, x: Tensor) -> None:
        """Settle, after the first pass, which sites have the grid that is wanted."""
        if self.state.sites is not None:
            return
        grids = {index: calls[0].grid for index, calls in self.state.seen.items()}
        if not grids:
            raise HostError(
                f"{self.control.name}: none of its sites ran with text keys; select other sites"
            )
        best = _nearest(set(grids.values()), x, self.control.shrink)
        self.state.sites = tuple(sorted(i for i, grid in grids.items() if grid == best))
        # those after the last one with text keys would not run in a pass that ends there
        self.state.image_sites = tuple(
            i
            for i, calls in sorted(self.state.image.items())
            if calls[0].grid == best and i <= self.state.sites[-1]
        )

    def _maps(self, text: Tensor, sample: int, samples: int) -> Maps:
        control = self.control
        state = self.state
        number = self.first + sample
        targets = control.choose(state.of(state.targets, number, self.samples), text.shape[1])
        last = max(p for target in targets for p in target.tokens)
        if last >= text.shape[1]:
            raise HostError(
                f"{control.name}: a word has the token position {last}, but there are "
                f"{text.shape[1]} text tokens here, counted from 0"
            )
        content = state.of(state.content, number, self.samples)
        content = content or tuple(sorted({p for t in targets for p in t.tokens}))
        image = [of_sample(state.image[i], sample, samples) for i in state.image_sites]
        prompt = state.of(range(len(state.targets)), number, self.samples)
        return Maps(
            text[sample], targets, self.call.step, content, control.tokens == "noun",
            control.drop, number, prompt, tuple(image),
        )  # fmt: skip

    def update(self, look: Look, size: float, going: Tensor | None) -> Tensor:
        """Return the latents one step down.

        Args:
            look: at the latents before.
            size: step size.
            going: samples [n] that a repetition moves, None for the step's own move of all.
        """
        losses = look.losses if going is None else look.refining
        if not losses.requires_grad:
            return look.x.detach()
        grad, finite = self.gradient(losses, look.x)
        keep = finite if going is None else finite & going
        x = look.x.detach()
        if self.control.normalise:
            grad = grad * x[0].numel() ** 0.5 / _norms(grad)
        moved = x - size * grad
        if self.control.keep_norm:
            moved = moved * _norms(x) / _norms(moved)
        return torch.where(keep.view(-1, *[1] * (x.ndim - 1)), moved, x)

    def gradient(self, losses: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each sample moves against [n, ...], and which are finite [n]."""
        half = next(iter(self.call.inputs.values())).dtype == torch.float16
        factor = self.state.loss_scale if half else 1.0
        (grad,) = torch.autograd.grad(losses.sum() * factor, x)
        grad = self.control.direction(grad / factor)
        finite = torch.isfinite(grad).flatten(1).all(1)
        if not finite.all():
            self._skip(finite)
        return grad, finite

    def _skip(self, finite: Tensor) -> None:
        """Report samples without a finite gradient, and be more careful from now on."""
        state, step = self.state, self.call.step.index
        state.loss_scale = max(1.0, state.loss_scale / 16)
        bad = [self.first + i for i in (~finite).nonzero().flatten().tolist()]
        if not state.skipped:
            warnings.warn(
                f"{self.control.name}: the gradient of sample {bad[0]} at step {step} is not "
                "finite, so its latents are left as they are there (and at later steps like it)",
                AttnctlWarning,
                stacklevel=2,
            )
        state.skipped += [(step, sample) for sample in bad]


def _norms(x: Tensor) -> Tensor:
    """Return the norm of each sample, shaped to go with [n, ...]."""
    norms = x.flatten(1).norm(dim=1).clamp_min(1e-20)
    return norms.view(-1, *[1] * (x.ndim - 1))


def _nearest(grids: set[Grid], x: Tensor, shrink: float) -> Grid:
    if x.ndim < 4 or len(grids) == 1:
        return max(grids)
    height = x.shape[-2] / shrink
    return min(grids, key=lambda grid: abs(math.log(grid[1] / height)))


# -- running a model with gradients -----------------------------------------------------------


@contextlib.contextmanager
def _gradients(call: ForwardCall, checkpoint: bool, weights: list[Tensor]) -> Iterator[None]:
    """Inside, gradients flow to inputs, not to weights; compiled code runs as it was written."""
    model = call.model
    # importing the compiler takes seconds, and without it nothing is compiled
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), stance, _frozen(weights):
        turned = checkpoint and not getattr(model, "is_gradient_checkpointing", True)
        if turned:
            model.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if turned:
                model.disable_gradient_checkpointing()


@contextlib.contextmanager
def _frozen(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, no parameter wants a gradient, so that layers keep no inputs for one."""
    _check_offload(parameters)
    wanting = [p for p in parameters if p.requires_grad]
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)


def _check_offload(parameters: Sequence[Tensor]) -> None:
    if any(p.is_meta for p in parameters):
        raise HostError(
            "sequential CPU offload takes the weights away before the backward pass, which a "
            "latent control needs: use enable_model_cpu_offload(), or checkpoint=True on the GPU"
        )


def _may_end(call: ForwardCall) -> bool:
    """Whether the pass may be broken off: nothing waits for its end.

    Checkpointed blocks run again up to where they ended, hooks may have to put something back,
    and adapters that were scaled for the call are scaled back at its end.
    """
    model = call.model
    if getattr(model, "is_gradient_checkpointing", False):
        return False
    if any(map(_hooked, model.modules())):
        return False
    given = (call.inputs.get(key) for key in ("cross_attention_kwargs", "joint_attention_kwargs"))
    return not any(kwargs and "scale" in kwargs for kwargs in given) and call.rows.n > 0


def _hooked(module: Any) -> bool:
    """Whether accelerate or diffusers have hooks on a module."""
    # a pipeline that names its branches leaves a registry without hooks on the denoiser
    registry = vars(module).get("_diffusers_hook")
    return "_hf_hook" in vars(module) or bool(getattr(registry, "hooks", registry))


def _ordinary(value: Any) -> Any:
    """Return inputs that autograd may keep: copies of tensors made in inference mode."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _ordinary(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_ordinary(one) for one in value)
    return value
