"""Patched objects look, copy, pickle and save like stock ones, and come back exactly."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnctl
from attnctl.hosts import tap
from attnctl.hosts.adopt import Adopted, Front, adopt, original_class, release
from attnctl.testing import zoo

NAMES = ["sd1", "sd3", "flux"]


def build(name: str) -> Any:
    return zoo.FAMILIES[name].build()


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, zoo.get_family(pipe).denoisers[0])


def parts(pipe: Any) -> list[Any]:
    """Every object that a patch may touch."""
    return [pipe, pipe.scheduler, *denoiser(pipe).modules()]


def traces(obj: Any) -> list[str]:
    """What a patch left on an object."""
    found = [key for key in vars(obj) if "attnctl" in key]
    return found + [c.__name__ for c in type(obj).__mro__ if "attnctl" in c.__module__]


def named(pipe: Any, name: str) -> Any:
    """Make a pipeline that the zoo did not build known to it."""
    pipe._zoo_family = name
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the mechanism alone -------------------------------------------------------------------


class Loud:
    """Mixin of these tests."""

    def __call__(self, x: int) -> int:
        return 10 * super().__call__(x)  # type: ignore[misc]

    def extra(self) -> int:
        return super().extra() + 1  # type: ignore[misc]


class Plain:
    """Docs."""

    def __init__(self, x: int = 1) -> None:
        self.x = x

    def __call__(self, x: int) -> int:
        """Add."""
        return self.x + x


class Rich(Plain):
    def extra(self) -> int:
        return 1


def test_one_object_gets_the_mixin_and_looks_the_same() -> None:
    mine, other = Plain(), Plain()
    adopt(mine, Loud)
    assert (mine(1), other(1)) == (20, 2)
    assert type(mine) == type(other) and type(mine) in (int, Plain)  # noqa: E721
    assert type(mine) not in {Plain} and type(mine) != Rich  # noqa: E721
    assert isinstance(mine, Plain) and original_class(mine) is original_class(other) is Plain
    for key in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(mine), key) == getattr(Plain, key)
    assert inspect.signature(mine.__call__) == inspect.signature(other.__call__)
    assert mine.__call__.__doc__ == "Add."
    release(mine)
    assert type(mine) is Plain and mine(1) == 2 and vars(mine) == {"x": 1}


def test_a_method_that_the_class_lacks_stays_unknown() -> None:
    mine, rich = Plain(), Rich()
    adopt(mine, Loud)
    adopt(rich, Loud)
    assert not hasattr(mine, "extra") and rich.extra() == 2


def test_it_is_counted() -> None:
    mine = Plain()
    adopt(mine, Loud)
    adopt(mine, Loud)
    assert mine(1) == 20  # not 200
    release(mine)
    assert mine(1) == 20
    release(mine)
    assert type(mine) is Plain


def test_bound_methods_outlive_the_release() -> None:
    mine = Plain()
    adopt(mine, Loud)
    call = mine.__call__
    release(mine)
    assert call(1) == 2


def tenfold(stock: Any) -> Any:
    def call(self: Any, x: int) -> int:
        found: int = stock(self, x)
        return 10 * found if isinstance(self, Adopted) else found

    return call


class Fronted:
    """Mixin whose methods are made from the class's own."""

    __call__ = Front(tenfold)
    absent = Front(tenfold)


def test_a_method_made_from_the_stock_one_looks_and_lasts_like_it() -> None:
    mine, rich = Plain(), Rich()
    adopt(mine, Fronted)
    adopt(rich, Fronted)
    assert mine(1) == rich(1) == 20
    assert inspect.signature(mine.__call__) == inspect.signature(Plain().__call__)
    assert mine.__call__.__doc__ == "Add."
    # torch.compile counts by code object
    assert type(mine).__call__.__code__ is not type(rich).__call__.__code__
    assert not hasattr(rich, "absent")  # what the class lacks stays unknown
    call = mine.__call__
    release(mine)
    assert call(1) == mine(1) == 2 and type(mine) is Plain


def test_the_subclass_makes_objects_of_the_original_class() -> None:
    mine = Plain()
    adopt(mine, Loud)
    assert type(type(mine)(3)) is Plain and type(mine)(3).x == 3


def test_copies_are_of_the_original_class() -> None:
    mine = Plain(5)
    adopt(mine, Loud)
    copies = [copy.copy(mine), copy.deepcopy(mine)]
    copies += [pickle.loads(pickle.dumps(mine, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in copies:
        assert type(twin) is Plain and vars(twin) == {"x": 5}
    assert mine(1) == 60 and b"attnctl" not in pickle.dumps(mine)


def test_a_class_changed_by_somebody_else_is_left_with_a_warning() -> None:
    mine = Plain()
    adopt(mine, Loud)
    theirs = type("Theirs", (type(mine),), {})
    mine.__class__ = theirs
    with pytest.warns(attnctl.AttnctlWarning, match="changed after the patch"):
        release(mine)
    assert type(mine) is theirs


# -- pipelines, denoisers, schedulers ------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_and_signatures_stay(name: str) -> None:
    pipe, twin = build(name), build(name)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert traces(pipe) and traces(denoiser(pipe)) and isinstance(pipe, type(twin))
        for mine, stock in zip(parts(pipe), parts(twin), strict=True):
            assert type(mine).__name__ == type(stock).__name__
            assert type(mine).__module__ == type(stock).__module__
        for mine, stock in ((pipe, twin), (denoiser(pipe), denoiser(twin))):
            assert inspect.signature(mine.__call__) == inspect.signature(stock.__call__)
        assert inspect.signature(denoiser(pipe).forward).parameters
        assert repr(denoiser(pipe)) == repr(denoiser(twin))
        assert dict(pipe.config) == dict(twin.config)
        made = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert type(made) is type(twin.scheduler) and not traces(made)
        assert not traces(type(pipe)(**pipe.components))
    assert not any(traces(p) for p in parts(pipe))


@pytest.mark.parametrize("name", NAMES)
def test_a_deep_copy_is_stock_and_the_original_stays_patched(name: str) -> None:
    pipe = build(name)
    stock = zoo.run(pipe)
    handle = attnctl.patch(pipe, attnctl.SoftPAG())
    controlled = zoo.run(pipe)
    twin = copy.deepcopy(pipe)
    assert not any(traces(p) for p in parts(twin))
    assert torch.equal(zoo.run(twin), stock)
    assert torch.equal(zoo.run(pipe), controlled)
    with attnctl.patch(twin, attnctl.SoftPAG()):
        assert torch.equal(zoo.run(twin), controlled)
    handle.undo()
    assert torch.equal(zoo.run(twin), stock) and torch.equal(zoo.run(pipe), stock)


@pytest.mark.parametrize("name", NAMES)
def test_a_pickled_denoiser_is_stock(name: str) -> None:
    pipe, other = build(name), build(name)
    stock = zoo.run(pipe)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        controlled = zoo.run(pipe)
        data = pickle.dumps(denoiser(pipe))
        file = io.BytesIO()
        torch.save(denoiser(pipe), file)
        scheduler = pickle.dumps(pipe.scheduler)
        assert torch.equal(zoo.run(pipe), controlled)
    assert b"attnctl" not in data + file.getvalue() + scheduler
    other.scheduler = pickle.loads(scheduler)
    file.seek(0)
    for twin in (pickle.loads(data), torch.load(file, weights_only=False)):
        setattr(other, zoo.get_family(pipe).denoisers[0], twin)
        assert not any(traces(p) for p in parts(other))
        assert torch.equal(zoo.run(other), stock)


def test_a_copy_of_one_block_is_stock() -> None:
    pipe = build("sd3")
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        block = copy.deepcopy(pipe.transformer.transformer_blocks[0])
        shallow = copy.copy(pipe.transformer.transformer_blocks[0].attn)
    assert not any(traces(m) for m in block.modules()) and not traces(shallow)


@pytest.mark.parametrize("name", NAMES)
def test_saving_while_patched_leaves_no_trace(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    stock, keys = zoo.run(pipe), list(denoiser(pipe).state_dict())
    pipe.save_pretrained(tmp_path / "stock")
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert list(denoiser(pipe).state_dict()) == keys
        names = [n for n, _ in denoiser(pipe).named_buffers()]
        zoo.run(pipe)
        pipe.save_pretrained(tmp_path / "patched")
    assert names == [n for n, _ in denoiser(pipe).named_buffers()]
    files = [p.relative_to(tmp_path / "stock") for p in (tmp_path / "stock").rglob("*.*")]
    assert len(files) > 4
    for file in files:
        data = (tmp_path / "patched" / file).read_bytes()
        assert b"attnctl" not in data
        assert data == (tmp_path / "stock" / file).read_bytes()
    missing = {k: None for k, v in pipe.components.items() if v is None}
    again = named(type(pipe).from_pretrained(tmp_path / "patched", **missing), name)
    assert not any(traces(p) for p in parts(again))
    assert torch.equal(zoo.run(again), stock)


def test_loading_a_state_dict_while_patched() -> None:
    pipe, other = build("sd3"), zoo.FAMILIES["sd3"].build(seed=1)
    with attnctl.patch(other, attnctl.SoftPAG()):
        wanted = zoo.run(other)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        pipe.transformer.load_state_dict(other.transformer.state_dict())
        assert torch.equal(zoo.run(pipe), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_after_the_patch(name: str) -> None:
    pipe, other = build(name), build(name)
    call = zoo.get_family(pipe).call
    other.to(torch.bfloat16)

    def half(pipe: Any) -> Tensor:
        values = call(pipe)
        values = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in values.items()}
        return pipe(**values)[0]

    plain = half(other)
    with attnctl.patch(other, attnctl.SoftPAG()):
        wanted = half(other)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        pipe.to(torch.bfloat16)
        got = half(pipe)
    assert got.dtype is torch.bfloat16 and not torch.equal(got, plain)
    assert torch.equal(got, wanted) and torch.equal(half(pipe), plain)


# -- several owners ------------------------------------------------------------------------


def test_a_scheduler_shared_by_two_patched_pipelines() -> None:
    """Undoing one patch leaves the other's step counting alone."""
    one = build("sd3")
    two = named(type(one)(**one.components), "sd3")
    early = attnctl.SoftPAG(start=0.0, stop=0.5)
    first = attnctl.patch(one, early)
    wanted = zoo.run(one)
    second = attnctl.patch(two, attnctl.SoftPAG(start=0.0, stop=0.5))
    assert torch.equal(zoo.run(two), wanted)
    first.undo()
    assert torch.equal(zoo.run(two), wanted)
    second.undo()
    assert not any(traces(p) for p in parts(one))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_handles_undone_in_either_order(order: tuple[int, int]) -> None:
    pipe = build("sd3")
    controls = [attnctl.SoftPAG(heads="L0"), attnctl.SEG(heads="L1-2")]
    alone = []
    for control in controls:
        with attnctl.patch(pipe, control):
            alone.append(zoo.run(pipe))
    stock = zoo.run(pipe)
    handles = [attnctl.patch(pipe, control) for control in controls]
    both = zoo.run(pipe)
    assert not any(torch.equal(both, other) for other in (*alone, stock))
    handles[order[0]].undo()
    assert torch.equal(zoo.run(pipe), alone[order[1]])
    handles[order[1]].undo()
    assert torch.equal(zoo.run(pipe), stock)
    assert not any(traces(p) for p in parts(pipe))


def test_bare_and_pipeline_patches_of_one_denoiser() -> None:
    pipe = build("flux")
    stock = zoo.run(pipe)
    bare = attnctl.patch(pipe.transformer, attnctl.SEG(heads="L0", scale=1.0))
    only_bare = zoo.run(pipe)
    through = attnctl.patch(pipe, attnctl.SoftPAG())
    both = zoo.run(pipe)
    assert not torch.equal(only_bare, stock) and not torch.equal(both, only_bare)
    bare.undo()
    with attnctl.patch(build("flux"), attnctl.SoftPAG()) as other:
        assert torch.equal(zoo.run(pipe), zoo.run(other.target))
    through.undo()
    assert torch.equal(zoo.run(pipe), stock)


def test_a_module_cannot_be_a_site_of_two_models() -> None:
    pipe = build("sd3")
    stock = zoo.run(pipe)
    block = pipe.transformer.transformer_blocks[0]
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        wanted = zoo.run(pipe)
        with pytest.raises(attnctl.HostError, match="another patched model"):
            attnctl.patch(block, attnctl.SEG())
        assert torch.equal(zoo.run(pipe), wanted)
    assert torch.equal(zoo.run(pipe), stock)
    assert not any(traces(p) for p in parts(pipe))


def test_controls_leave_with_their_pipeline() -> None:
    """A patched pipeline that is collected takes its controls out of a shared denoiser."""
    pipe = build("sd3")
    twin = type(pipe)(**pipe.components)
    stock = zoo.run(pipe)
    attnctl.patch(twin, attnctl.SoftPAG())
    assert traces(pipe.transformer)
    del twin
    gc.collect()
    assert torch.equal(zoo.run(pipe), stock)
    assert not any(traces(m) for m in pipe.transformer.modules())


def test_names_come_back_after_patches_that_nobody_undid() -> None:
    from diffusers.models import attention_processor

    attnctl.patch(build("sd3"), attnctl.SoftPAG())
    gc.collect()
    with attnctl.patch(build("flux"), attnctl.SoftPAG()):
        assert attention_processor.F is torch.nn.functional


def test_undo_inside_a_running_pipeline() -> None:
    pipe = build("sd3")
    stock = zoo.run(pipe, steps=3)
    handle = attnctl.patch(pipe, attnctl.SoftPAG())

    def stop(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        handle.undo()
        return values

    got = zoo.run(pipe, steps=3, callback_on_step_end=stop)
    with attnctl.patch(pipe, attnctl.SoftPAG(stop=0.3)):
        wanted = zoo.run(pipe, steps=3)
    assert torch.equal(got, wanted) and torch.equal(zoo.run(pipe, steps=3), stock)


def test_no_warning_is_given_by_any_of_it() -> None:
    pipe = build("sd3")
    with warnings.catch_warnings():
        warnings.simplefilter("error", attnctl.AttnctlWarning)
        with attnctl.patch(pipe, attnctl.SoftPAG()):
            copy.deepcopy(pipe)
            zoo.run(pipe)
    assert isinstance(pipe.transformer, nn.Module)


# -- attention modules of diffusers -----------------------------------------------------------


class Asked(attnctl.Control):
    """Is asked at cross-attention and goes on."""

    name = "asked-test"
    kinds = ("cross",)

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return call.proceed()


class Signatures:
    """Stands in for `inspect` and counts."""

    count = 0

    def signature(self, method: Any) -> inspect.Signature:
        self.count += 1
        return inspect.signature(method)


def test_a_site_spares_the_look_at_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_processor as theirs

    seen = Signatures()
    monkeypatch.setattr(theirs, "inspect", seen)
    unet = build("sd1").unet
    sites = len(attnctl.sites(unet).select(kinds=("cross",)))
    draw = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, 4, 8, 12, generator=draw),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(
            1, 10, unet.config.cross_attention_dim, generator=draw
        ),
    }

    def run(**more: Any) -> tuple[Tensor, int]:
        before = seen.count
        with torch.no_grad():
            out = unet(**inputs, **more)[0]
        return out, seen.count - before

    stock, looks = run()
    with attnctl.patch(unet, Asked()):
        same, fewer = run()
        assert torch.equal(same, stock) and fewer == looks - sites
        # with arguments, diffusers itself says which the processor takes
        same, again = run(cross_attention_kwargs={"unknown": 1})
        assert torch.equal(same, stock) and again == looks
    assert run()[1] == looks


def test_a_forward_that_does_more_is_left_alone() -> None:
    from diffusers.models.attention_processor import Attention

    assert tap._inspects(Attention.forward)
    assert not tap._inspects(nn.Linear.forward)

    def other(self: Any, hidden_states: Tensor) -> Tensor:
        return self.something_new(hidden_states)

    other.__qualname__, other.__module__ = "Attention.forward", Attention.forward.__module__
    assert not tap._inspects(other)


def test_a_forward_that_is_replaced_under_the_patch_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers.models.attention_processor import Attention

    calls, stock = list[Any](), Attention.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return stock(self, *args, **kwargs)

    attn = Attention(8, heads=2, dim_head=4)
    x = torch.randn(1, 3, 8)
    wanted = attn(x)
    ref: Any = SimpleNamespace(serial=0)
    for replaced_before in (False, True):
        calls.clear()
        if replaced_before:
            monkeypatch.setattr(Attention, "forward", other)
        tap.hook(attn, ref)
        try:
            assert torch.equal(attn(x), wanted) and len(calls) == replaced_before
            monkeypatch.setattr(Attention, "forward", other)
            assert torch.equal(attn(x), wanted) and len(calls) == 1 + replaced_before
            monkeypatch.undo()
            assert torch.equal(attn(x), wanted) and len(calls) == 1 + replaced_before
        finally:
            tap.unhook(attn)


def test_a_processor_that_went_out_of_reach() -> None:
    from diffusers.models import attention_processor as theirs

    unet = build("sd1").unet
    sites = attnctl.sites(unet)
    at = next(iter(sites.select(kinds=("cross",))))
    module = unet.get_submodule(sites[at].name)
    before, names = module.processor, theirs.F
    first, second = attnctl.patch(unet, Asked()), attnctl.patch(unet, Asked())
    try:
        assert theirs.F is not names
        module.set_processor(theirs.AttnProcessor())
        first.undo()
        assert theirs.F is not names
        for _ in range(2):  # and a control that would be passed by is refused, at every call
            with pytest.raises(attnctl.HostError, match="past any control"), torch.no_grad():
                unet(
                    torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, unet.config.cross_attention_dim)
                )
    finally:
        second.undo()
        module.set_processor(before)
    assert theirs.F is names
