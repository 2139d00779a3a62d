"""torch.compile: controls act in compiled denoisers, without graph breaks or recompilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend as Counter

import attnctl
from attnctl.hosts.batch import extend_inputs
from attnctl.hosts.denoiser import binding_of
from attnctl.hosts.run import LOCAL
from attnctl.testing import zoo

NAMES = ["sd1", "sd3", "flux", "wan"]
CASES = [
    (name, how)
    for name in NAMES
    for how in ("wrap", "method", "blocks")
    if (name, how) != ("sd3", "blocks")  # it names no repeated blocks
]


KINDS = {("flux", "blocks"): 2}
"""Graphs of the stock denoiser for one batch size, where not 1: kinds of blocks."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, layers: int = 0) -> Any:
    """The zoo's pipeline, or with only so many layers of each kind: compiling takes time."""
    pipe = zoo.FAMILIES[name].build()
    if layers and name == "sd1":
        pipe.unet = small_unet()
    elif layers:
        for key in ("transformer_blocks", "single_transformer_blocks", "blocks"):
            if hasattr(pipe.transformer, key):
                setattr(pipe.transformer, key, getattr(pipe.transformer, key)[-layers:])
    return pipe


def small_unet() -> nn.Module:
    """One level, no middle, one transformer block."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    ).eval()


def compile_denoiser(pipe: Any, how: str, backend: Any = "eager") -> None:
    name = zoo.get_family(pipe).denoisers[0]
    module = getattr(pipe, name)
    if how == "wrap":
        setattr(pipe, name, torch.compile(module, fullgraph=True, backend=backend))
    elif how == "method":
        module.compile(fullgraph=True, backend=backend)
    else:
        module.compile_repeated_blocks(fullgraph=True, backend=backend)


def stack() -> list[attnctl.Control]:
    """Other rows, u and scale at every step of four, none at the last."""
    return [
        attnctl.SoftPAG(scale=1.0, u=0.3, stop=0.5),
        attnctl.SoftPAG(heads="L0", scale=2.0, u=0.9, start=0.25, stop=0.75),
    ]


def close(one: Tensor, two: Tensor) -> bool:
    return float((one - two).norm()) < 1e-5 * float(two.norm())


@pytest.mark.parametrize(("name", "how"), CASES)
def test_patch_before_compile(name: str, how: str) -> None:
    """Equal to eager, one graph a batch size, no other at any step, run or option."""
    pipe, count = build(name, layers=1), Counter("eager")
    stock = zoo.run(pipe, steps=4)
    handle = attnctl.patch(pipe, *stack())
    eager = zoo.run(pipe, steps=4)
    before = handle.report()
    compile_denoiser(pipe, how, count)
    assert close(zoo.run(pipe, steps=4), eager)
    assert not close(eager, stock)
    after = handle.report()
    # the same attention calls again: nothing was off, and nothing ran twice
    assert [x.calls for x in after.lines] == [2 * x.calls for x in before.lines]
    graphs = count.frame_count
    # rows a sample: 2 to 4 in one call, else 1 to 3; the third size is compiled for any
    assert 1 <= graphs <= 3 * KINDS.get((name, how), 1)
    with torch.compiler.set_stance("fail_on_recompile"):
        zoo.run(pipe, steps=7, seed=1)
        handle.undo()
        for u in (0.1, 1.0):
            with attnctl.patch(pipe, attnctl.SoftPAG(u=u, scale=2 * u, stop=0.6)):
                zoo.run(pipe, steps=3)
    assert count.frame_count == graphs
    if name in ("sd3", "wan"):  # more time, nothing new
        assert close(zoo.run(pipe, steps=4), stock)


@pytest.mark.parametrize(("name", "how"), [("flux", "wrap"), ("wan", "blocks"), ("sd3", "method")])
def test_compile_before_patch(name: str, how: str) -> None:
    pipe, count = build(name, layers=1), Counter("eager")
    stock = zoo.run(pipe)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        eager = zoo.run(pipe)
    compile_denoiser(pipe, how, count)
    assert close(zoo.run(pipe), stock)
    plain = count.frame_count
    for _ in range(6):  # far more often than the limit of recompilations would bear
        with attnctl.patch(pipe, attnctl.SoftPAG()):
            assert close(zoo.run(pipe), eager)
        patched = count.frame_count
        assert close(zoo.run(pipe), stock)
    assert count.frame_count == patched > plain


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_blocks_with_and_without_a_control_do_not_share_code(name: str) -> None:
    """A block compiled without a control must not run for its like with one, nor the reverse."""
    for heads in ("L0", "L1"):
        torch._dynamo.reset()
        pipe = build(name)
        handle = attnctl.patch(pipe, attnctl.SoftPAG(heads=heads))
        eager = zoo.run(pipe, cfg=False)
        calls = handle.report().calls
        compile_denoiser(pipe, "blocks")
        assert close(zoo.run(pipe, cfg=False), eager)
        assert handle.report().calls == 2 * calls


def test_a_patch_is_noticed_while_another_model_is_patched() -> None:
    """The names in the processors' modules are then patched already."""
    first, second = build("sd3", layers=1), build("sd3", layers=1)
    stock = zoo.run(second)
    with attnctl.patch(second, attnctl.SoftPAG()):
        eager = zoo.run(second)
    compile_denoiser(second, "method")
    with attnctl.patch(first, attnctl.SoftPAG()):
        assert close(zoo.run(second), stock)
        with attnctl.patch(second, attnctl.SoftPAG()):
            assert close(zoo.run(second), eager)
        assert close(zoo.run(second), stock)


@pytest.mark.parametrize("passes", ["rows", "calls"])
def test_extra_passes(passes: str) -> None:
    pipe = build("sd3", layers=1)
    attnctl.patch(pipe, attnctl.SoftPAG(passes=passes), attnctl.SEG(passes=passes))
    eager = zoo.run(pipe)
    compile_denoiser(pipe, "method", "aot_eager" if passes == "rows" else "eager")
    assert close(zoo.run(pipe), eager)


# -- a bare denoiser -----------------------------------------------------------------------


def bare() -> tuple[nn.Module, dict[str, Any]]:
    inputs = zoo.denoiser_inputs("sd3")[1]
    return build("sd3", layers=1).transformer, inputs


def output(module: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(**inputs)[0]


def test_a_compiled_wrapper_can_be_patched() -> None:
    module, inputs = bare()
    stock = output(module, inputs)
    with attnctl.patch(module, attnctl.SoftPAG()):
        eager = output(module, inputs)
    wrapper = torch.compile(module, backend="eager", fullgraph=True)
    with attnctl.patch(wrapper, attnctl.SoftPAG()):
        assert close(output(wrapper, inputs), eager)
        assert close(output(module, inputs), eager)
    assert close(output(wrapper, inputs), stock)
    assert type(wrapper) is torch._dynamo.eval_frame.OptimizedModule


def test_a_wrapper_made_after_a_bare_patch_is_refused_rather_than_off() -> None:
    module, inputs = bare()
    stock = output(module, inputs)
    wrapper = torch.compile(module, backend="eager", fullgraph=True)
    with attnctl.patch(module, attnctl.SoftPAG()):
        with pytest.raises(attnctl.HostError, match="past the patch"):
            output(wrapper, inputs)
        with pytest.raises(attnctl.HostError, match="past the patch"), torch.no_grad():
            module.forward(**inputs)
    assert close(output(wrapper, inputs), stock)


def test_an_inactive_control_on_a_bare_denoiser_is_not_refused() -> None:
    module, inputs = bare()
    stock = output(module, inputs)
    wrapper = torch.compile(module, backend="eager", fullgraph=True)
    with attnctl.patch(wrapper, attnctl.SoftPAG(start=0.5), steps=4) as handle:
        assert close(output(wrapper, inputs), stock)
    assert handle.report().calls == 0


def test_a_gradient_is_refused_by_name() -> None:
    module, inputs = bare()
    attnctl.patch(module, attnctl.SoftPAG())
    module.compile(backend="eager", fullgraph=True)
    with pytest.raises(attnctl.HostError, match="no_grad"):
        module(**inputs)[0].sum().backward()


# -- what a control sees -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spy(attnctl.Control):
    """Notes what every attention call looks like."""

    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "spy-test"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        mask = None if call.mask is None else tuple(call.mask.shape)
        shapes = tuple(call.q.shape), tuple(call.k.shape), mask
        where = str(call.site), call.index, str(call.rows), call.step.index
        self.seen.append((where, shapes, call.scale, call.spans))
        return call.proceed()


@pytest.mark.parametrize("name", ["wan-i2v", "mochi", "pixart"])
def test_a_control_sees_the_same_calls(name: str) -> None:
    """Several calls a site (Wan I2V, Mochi) keep their numbers; masks arrive."""
    pipe, spy = build(name, layers=1), Spy()
    attnctl.patch(pipe, spy)
    eager = zoo.run(pipe)
    wanted, spy.seen[:] = list(spy.seen), []
    compile_denoiser(pipe, "method")
    assert close(zoo.run(pipe), eager)
    assert spy.seen == wanted


# -- the real compiler ---------------------------------------------------------------------


class Small(nn.Module):
    """The least denoiser: one stock attention module."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention

        self.config = SimpleNamespace()
        self.attn = Attention(query_dim=16, heads=2, dim_head=8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + self.attn(sample * timestep)


def test_inductor() -> None:
    torch.manual_seed(0)
    module, x = Small(), torch.randn(2, 5, 16)

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [module(x, torch.tensor(t)) for t in (1.0, 0.7, 0.4)]

    stock = run()
    handle = attnctl.patch(module, attnctl.SoftPAG(stop=0.5), rows=("uncond", "cond"), steps=3)
    eager = run()
    module.compile(fullgraph=True)
    handle.reset()
    compiled = run()
    assert not close(eager[0], stock[0]) and torch.equal(eager[2], stock[2])
    assert all(close(a, b) for a, b in zip(compiled, eager, strict=True))


@dataclasses.dataclass(frozen=True)
class Values(attnctl.Control):
    """Returns one of the operator's inputs."""

    name: ClassVar[str] = "values-test"

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return call.v


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_values_themselves_are_a_legal_output(backend: str) -> None:
    """An operator may not return what it was given."""
    module, x = Small(), torch.randn(2, 5, 16)
    attnctl.patch(module, Values())
    with torch.no_grad():
        eager = module(x, torch.tensor(1.0))
        module.compile(fullgraph=True, backend=backend)
        assert close(module(x, torch.tensor(1.0)), eager)
    q = torch.randn(1, 2, 3, 4)
    site = module.attn._attnctl_site
    call = (q, q, q, None, None, False, False, site, 0, "sdpa")
    attend = lambda *_, **part: q  # noqa: E731
    forward = SimpleNamespace(binding=binding_of(module), watches={}, attend=attend)
    LOCAL.forward = forward  # type: ignore[assignment]
    try:
        out = torch.ops.attnctl.attend(*call)
    finally:
        LOCAL.forward = None
    assert torch.equal(out, q) and out.data_ptr() != q.data_ptr()


def test_a_time_for_all_rows_stays_one() -> None:
    """Compiled code looks at strides: an expanded tensor must not become a full one."""
    time = torch.tensor([3.0]).expand(4)
    more = extend_inputs({"timestep": time, "x": torch.ones(4, 2)}, 4, slice(2, 4), ())
    assert more["timestep"].stride() == (0,) and more["timestep"].tolist() == [3.0] * 6
    assert more["x"].shape == (6, 2)
