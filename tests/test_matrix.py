"""Every family of the matrix: sites seen, neutral and undo bit-exact, guidance right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnctl
from attnctl.hosts import targets
from attnctl.hosts.discover import discover
from attnctl.processors.latent.engine import LatentControl
from attnctl.testing import zoo

LISTS = ("zimage",)  # takes a list of samples
LINEAR = ("sana",)  # its self-attention has no softmax, so it has cross-attention sites only
EVERY = [name for name in zoo.FAMILIES if name not in LISTS]
FAMILIES = [name for name in EVERY if name not in LINEAR]


@functools.cache
def built(name: str) -> Any:
    try:
        return zoo.FAMILIES[name].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))


@functools.cache
def stock(name: str, **kwargs: Any) -> Tensor:
    return zoo.run(built(name), **kwargs)


def neutral(name: str) -> list[attnctl.Control]:
    if name in LINEAR:
        return [attnctl.PLADIS(lam=0.0), attnctl.NAG(scale=1.0)]
    return [attnctl.SoftPAG(scale=0.0), attnctl.PAG(u=0.0), attnctl.SLG(start=1, stop=1)]


def strong(name: str) -> attnctl.Control:
    return attnctl.PLADIS() if name in LINEAR else attnctl.SoftPAG()


@pytest.mark.parametrize("name", EVERY)
def test_neutral_and_undo_are_bit_exact(name: str) -> None:
    pipe, before = built(name), stock(name)
    keys = {n: set(vars(m)) for n, m in targets(pipe).items()}
    for control in neutral(name):
        with attnctl.patch(pipe, control):
            assert torch.equal(zoo.run(pipe), before)
    handle = attnctl.patch(pipe, strong(name))
    assert not torch.equal(zoo.run(pipe), before)
    handle.undo()
    assert torch.equal(zoo.run(pipe), before)
    assert {n: set(vars(m)) for n, m in targets(pipe).items()} == keys


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", EVERY)
def test_undo_after_an_exception_inside_the_pipeline(name: str, error: type) -> None:
    pipe, before = built(name), stock(name)
    last = [m for m in targets(pipe).values() for m in discover(m)[1]][-1]

    def fail(*_: Any) -> None:
        raise error("stop")

    hook = last.register_forward_pre_hook(fail)
    try:
        with pytest.raises(error), attnctl.patch(pipe, strong(name)):
            zoo.run(pipe)
    finally:
        hook.remove()
    assert torch.equal(zoo.run(pipe), before)


@pytest.mark.parametrize("name", EVERY)
def test_every_selected_site_is_reached(name: str) -> None:
    pipe = built(name)
    with attnctl.patch(pipe, strong(name)) as handle:
        zoo.run(pipe)
        report = handle.report()
    assert all(line.sites_hit == line.sites > 0 for line in report.lines)
    assert {step for line in report.lines for step in line.steps} == {0, 1}


# -- the guidance term against a second, independent implementation ------------------------


class IdentityAttention:
    """Identity maps at all self- and joint-attention sites, by plain hooks of this test."""

    def __init__(self, pipe: Any, patch: pytest.MonkeyPatch) -> None:
        self.on = self.inside = False
        for module in targets(pipe).values():
            sites, modules = discover(module)
            for site, attention in zip(sites, modules, strict=True):
                if site.kind in ("self", "joint"):
                    self._watch(attention)
                space = type(attention.processor).__call__.__globals__
                for key in ("F", "dispatch_attention_fn"):
                    if key in space and not isinstance(space[key], Switch):
                        patch.setitem(space, key, Switch(space[key], self))

    def _watch(self, attention: nn.Module) -> None:
        attention.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        attention.register_forward_hook(lambda *_: setattr(self, "inside", False))


class Switch:
    """Stands for F or dispatch_attention_fn and returns the values while switched on."""

    def __init__(self, original: Any, state: IdentityAttention) -> None:
        self.original, self.state = original, state

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.original, name)
        return Switch(found, self.state) if name == "scaled_dot_product_attention" else found

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.on and self.state.inside:
            return v
        return self.original(q, k, v, *args, **kwargs)

    def __instancecheck__(self, other: Any) -> bool:
        return False


def second_half(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[batch // 2 :] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {k: second_half(v, batch) for k, v in value.items()}
    if isinstance(value, list) and len(value) == batch and not isinstance(value[0], Tensor):
        return value[batch // 2 :]
    return value


def three_passes(
    pipe: Any, state: IdentityAttention, weight: float, cfg: str, g: float
) -> dict[str, Callable[..., Any]]:
    """Replace each denoiser's forward by: u and c as they are, p on its own, c' from the sheet.

    c' = c + (w / g) (c - p) with guidance (the pipeline multiplies it by g), else
    c + w (c - p): another way to the same sum than adding the term to every branch.
    """
    order: dict[str, Any] = {"n": 0}
    rescales = cfg == "separate" and pipe._zoo_family in ("qwenimage", "lumina2")

    def make(forward: Callable[..., Any], signature: list[str]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inputs = {**dict(zip(signature, args, strict=False)), **kwargs}
            out = forward(**inputs)
            sample = out[0]
            batch = sample.shape[0]
            order["n"] += 1
            if cfg == "separate" and order["n"] % 2 == 0:
                kept = order.get("term")
                return out if kept is None else (sample + kept, *out[1:])
            state.on = True
            try:
                mine = inputs
                if cfg == "batched":
                    ids = {k: v for k, v in inputs.items() if k.endswith("_ids")}
                    mine = {k: second_half(v, batch) for k, v in inputs.items()} | ids
                weak = forward(**mine)[0]
            finally:
                state.on = False
            n = weak.shape[0]
            cond = sample[-n:]
            if rescales:  # the pipeline's mix is not affine: the term goes to both branches
                order["term"] = weight * (cond - weak)
            factor = weight if cfg == "none" or rescales else weight / g
            new = torch.cat([sample[:-n], cond + factor * (cond - weak)])
            return (new,) if isinstance(out, tuple) else type(out)(sample=new)

        return run

    import inspect

    return {
        n: make(m.forward, list(inspect.signature(m.forward).parameters))
        for n, m in targets(pipe).items()
    }


@pytest.fixture
def fresh(request: pytest.FixtureRequest) -> Iterator[Any]:
    try:
        yield zoo.FAMILIES[request.param].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_equals_three_passes(
    name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = zoo.FAMILIES[name]
    cfg = family.cfg if guided else "none"
    if guided and cfg == "none":
        pytest.skip("guidance-distilled: there is no second branch")
    pipe = built(name)
    weight = 0.7
    with attnctl.patch(pipe, attnctl.PAG(scale=weight)):
        ours = zoo.run(pipe, cfg=guided)
    other = family.build()
    state = IdentityAttention(other, monkeypatch)
    for attr, forward in three_passes(other, state, weight, cfg, zoo.core.CFG_SCALE).items():
        monkeypatch.setattr(getattr(other, attr), "forward", forward)
    theirs = zoo.run(other, cfg=guided)
    plain = stock(name, cfg=guided)
    assert (ours - plain).abs().max() > 100 * (ours - theirs).abs().max()
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan", "mochi", "hunyuanvideo", "pixart"])
def test_batch_equals_single_samples(name: str, passes: str) -> None:
    """A batch with two images a prompt gives what each sample gives alone."""
    pipe = built(name)
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=1.0, passes=passes)):
        together = zoo.run(pipe, batch=2, num_images=2)
        alone = zoo.run(pipe, batch=1, num_images=1)
    assert together.shape[0] == 4 * alone.shape[0] or together.shape[0] == 4
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:1], alone[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    pipe = zoo.FAMILIES[name].build().to(dtype)
    call = zoo.placed(zoo.FAMILIES[name].call(pipe), "cpu", dtype)
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=1.0)):
        out = pipe(**call)[0]
    with attnctl.patch(built(name), attnctl.SoftPAG(scale=1.0)):
        exact = zoo.run(built(name))
    assert (out.float() - exact).norm() / exact.norm() < 0.1


@pytest.mark.filterwarnings("ignore:radial keeps every block")  # of some clips as short as these
@pytest.mark.parametrize("name", EVERY)
def test_all_controls_at_once(name: str) -> None:
    """The whole stack runs on every family that admits its sites, and undoes exactly."""
    # lumina2 packs texts of unequal length, where controls that need spans refuse
    options = {"batch": 1} if name == "lumina2" else {}
    pipe, before = built(name), stock(name, **options)
    kinds = {s.kind for s in attnctl.sites(pipe)}
    mild: dict[str, dict[str, Any]] = {
        "pladis": {"lam": 1.5},
        "nag": {"negative": negative_of(pipe)},
        "slg": {"scale": 0.3, "start": 0.0, "stop": 1.0},
        "radial": {"block": 32, "dense_layers": 0, "start": 0.0},
        "regulation": {"targets": [[1], [2]], "restore": [0], "stop": 1.0},
        "spacetime": {"layout": [(negative_of(pipe), (0.3, 0.5, 0.4))]},
    }
    mild |= {key: {"words": [[1], [2]], "scale": 0.3} for key in latent_controls()}
    mild["initno"] |= {"rounds": 1, "round_steps": 1, "last_steps": 0}
    if name in LINEAR:  # no self-attention map to keep apart
        mild["initno"]["conflict"] = 0.0
    refused = {"nag"} if name == "mochi" else set()
    if "num_frames" not in zoo.FAMILIES[name].fixed:
        refused.add("radial")
    if name == "latte":  # folds frames into the batch: where its tokens lie is not known
        refused |= {"regulation", "spacetime", *latent_controls()}
    stack = []
    for key, cls in attnctl.controls().items():
        if kinds & set(cls.kinds) and key not in refused:
            stack.append(cls(**mild.get(key, {"scale": 0.3})))
    stack.sort(key=lambda control: control.replaces_softmax)
    with attnctl.patch(pipe, *stack) as handle:
        out = zoo.run(pipe, **options)
        hit = {line.control.name for line in handle.report().lines if line.calls}
    assert torch.isfinite(out).all() and not torch.equal(out, before)
    assert hit == {c.name for c in stack}
    assert torch.equal(zoo.run(pipe, **options), before)


@pytest.mark.parametrize("name", ["sd1", "sd3", "sana", "wan"])
def test_controls_without_a_site_are_refused(name: str) -> None:
    """Those for other kinds of attention, and those for language models, everywhere."""
    pipe = built(name)
    kinds = {s.kind for s in attnctl.sites(pipe)}
    others = [c for c in attnctl.controls().values() if not kinds & set(c.kinds)]
    assert "pai" in {cls.name for cls in others}
    for cls in others:
        with pytest.raises(attnctl.SelectorError, match=f"acts on {'/'.join(cls.kinds)}"):
            attnctl.patch(pipe, cls())


def test_nag_says_that_mochi_attends_to_one_row_at_a_time() -> None:
    pipe = built("mochi")
    control = attnctl.NAG(negative=negative_of(pipe))
    with pytest.raises(attnctl.HostError, match="one row at a time"), attnctl.patch(pipe, control):
        zoo.run(pipe)


def latent_controls() -> list[str]:
    """Controls that steer by the maps of words."""
    known = attnctl.controls().items()
    return [key for key, cls in known if issubclass(cls, LatentControl)]


def negative_of(pipe: Any) -> dict[str, Tensor]:
    """Other text tokens of the right shape, from the inputs of a recorded denoiser call."""
    _, inputs = zoo.denoiser_inputs(pipe._zoo_family)
    return {"encoder_hidden_states": inputs["encoder_hidden_states"][:1].flip(1)}


def test_linear_attention_is_refused_by_name() -> None:
    with pytest.raises(attnctl.SelectorError, match="linear"):
        attnctl.patch(built("sana"), attnctl.SoftPAG())


def test_a_list_of_samples_is_refused_by_name() -> None:
    pipe = built("zimage")
    with pytest.raises(attnctl.HostError, match="list"), attnctl.patch(pipe, attnctl.SoftPAG()):
        zoo.run(pipe)
