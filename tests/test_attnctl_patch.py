"""patch and its handle: targets, stacks, conflicts, reports, bare denoisers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.testing import zoo


@functools.cache
def sd3() -> Any:
    return zoo.FAMILIES["sd3"].build()


@dataclasses.dataclass(frozen=True)
class Dense(attnctl.Control):
    """Computes attention itself."""

    heads: str = "all"
    name: ClassVar[str] = "dense-test"
    replaces_softmax: ClassVar[bool] = True

    @property
    def selector(self) -> Any:
        return self.heads

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return call.primitive()


def test_conflicts_name_both_and_an_order() -> None:
    pipe, first, second = sd3(), Dense(), Dense()
    with pytest.raises(attnctl.ControlConflict, match=r"dense-test.* and dense-test.*different"):
        attnctl.patch(pipe, first, second)
    with pytest.raises(attnctl.ControlConflict, match="list softpag before dense-test"):
        attnctl.patch(pipe, Dense(), attnctl.SoftPAG())
    with pytest.raises(attnctl.ControlConflict, match="second object"):
        attnctl.patch(pipe, first, first)
    with attnctl.patch(pipe, first), pytest.raises(attnctl.ControlConflict, match="already"):
        attnctl.patch(pipe, first)
    with attnctl.patch(pipe, attnctl.SoftPAG(), Dense()):
        pass
    with attnctl.patch(pipe, Dense("L0"), Dense("L1"), attnctl.SoftPAG(heads="L2")):
        pass
    assert type(pipe).__mro__[1].__name__ == "DiffusionPipeline"


def test_a_failed_patch_leaves_nothing_behind() -> None:
    pipe = sd3()
    before = (type(pipe), type(pipe.transformer), set(vars(pipe.transformer)))
    for bad in (attnctl.SoftPAG(heads="L99"), attnctl.PLADIS()):
        with pytest.raises(attnctl.SelectorError):
            attnctl.patch(pipe, attnctl.SoftPAG(), bad)
    assert (type(pipe), type(pipe.transformer), set(vars(pipe.transformer))) == before


@pytest.mark.parametrize(
    ("target", "controls", "error", "message"),
    [
        ("sd3", (), attnctl.OptionError, "at least one control"),
        ("sd3", ("softpag",), attnctl.OptionError, "expected a control"),
        ("text", (attnctl.SoftPAG(),), attnctl.HostError, "cannot patch a str"),
        ("linear", (attnctl.SoftPAG(),), attnctl.HostError, "no attention module"),
    ],
)
def test_wrong_calls(target: str, controls: tuple[Any, ...], error: type, message: str) -> None:
    targets = {"sd3": sd3(), "text": "a string", "linear": torch.nn.Linear(2, 2)}
    with pytest.raises(error, match=message):
        attnctl.patch(targets[target], *controls)


def test_report_says_what_was_touched() -> None:
    pipe = sd3()
    with attnctl.patch(pipe, attnctl.SoftPAG(heads="L1H0-1", stop=0.5)) as handle:
        assert handle.report().calls == 0 and "no step yet" in str(handle.report())
        zoo.run(pipe, steps=4)
    (line,) = handle.report().lines
    assert (line.sites, line.heads, line.calls, line.steps) == (1, 2, 2, (0, 1))
    assert "2 heads of 1 site," in str(handle.report()) and "steps 0-1" in str(handle.report())
    assert "undone" in repr(handle)


def test_undo_in_any_order_and_twice() -> None:
    pipe, before = sd3(), zoo.run(sd3())
    first = attnctl.patch(pipe, attnctl.SoftPAG(heads="L0"))
    alone = zoo.run(pipe)
    second = attnctl.patch(pipe, attnctl.SEG(heads="L1", scale=1.0))
    first.undo()
    first.undo()
    assert not torch.equal(zoo.run(pipe), before)
    second.undo()
    assert torch.equal(zoo.run(pipe), before)
    with attnctl.patch(pipe, attnctl.SoftPAG(heads="L0")):
        assert torch.equal(zoo.run(pipe), alone)


def test_guidance_controls_add_up_in_any_order() -> None:
    pipe = sd3()
    pair = attnctl.SoftPAG(scale=0.5), attnctl.SEG(scale=0.5)
    with attnctl.patch(pipe, *pair):
        a = zoo.run(pipe)
    with attnctl.patch(pipe, *reversed(pair)):
        b = zoo.run(pipe)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_only_the_patched_pipeline_is_changed() -> None:
    """Another pipeline over the same transformer stays stock."""
    pipe = sd3()
    before = zoo.run(pipe)
    other = type(pipe)(**pipe.components)
    other._zoo_family = "sd3"
    other.set_progress_bar_config(disable=True)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert torch.equal(zoo.run(other), before)
        assert not torch.equal(zoo.run(pipe), before)


# -- bare denoisers ------------------------------------------------------------------------


def bare() -> tuple[Any, dict[str, Any]]:
    module, inputs = zoo.denoiser_inputs("sd3")
    return module, dict(inputs, return_dict=False)


@torch.no_grad()
def test_bare_rows_are_all_conditional_unless_told() -> None:
    module, inputs = bare()
    stock = module(**inputs)[0]
    n = stock.shape[0] // 2
    with attnctl.patch(module, attnctl.PAG(scale=1.0)) as handle:
        all_cond = module(**inputs)[0]
        with handle.rows("uncond", "cond"):
            told = module(**inputs)[0]
    with attnctl.patch(module, attnctl.PAG(scale=1.0), rows=("uncond", "cond")):
        assert torch.equal(module(**inputs)[0], told)
    term = all_cond - stock
    torch.testing.assert_close(told[n:] - stock[n:], term[n:], rtol=1e-3, atol=1e-4)
    # the unconditional rows get the conditional rows' term, so that u + g (c - u) keeps it
    torch.testing.assert_close(told[:n] - stock[:n], term[n:], rtol=1e-3, atol=1e-4)
    assert torch.equal(module(**inputs)[0], stock)


@torch.no_grad()
def test_bare_steps_follow_the_time_input() -> None:
    module, inputs = bare()
    time = inputs["timestep"]
    with attnctl.patch(module, attnctl.PAG(stop=0.5), steps=4) as handle:
        for scale in (1.0, 0.9, 0.9, 0.5, 0.2, 1.0):
            module(**{**inputs, "timestep": time * scale})
    assert handle.report().lines[0].steps == (0, 1)
    assert handle.report().lines[0].forwards == 4


@dataclasses.dataclass(frozen=True)
class SeesGrids(attnctl.Control):
    """Keeps the grids of its calls in a list of the test's."""

    seen: Any = None
    name: ClassVar[str] = "sees-grids-test"

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        self.seen.append(call.spans.grid)
        return call.proceed()


@torch.no_grad()
def test_the_grid_follows_the_inputs_not_their_shapes() -> None:
    """FLUX tells the grid by position ids: 4 x 6 and 6 x 4 tokens have inputs of equal shape."""
    module, inputs = zoo.denoiser_inputs("flux")
    n, seen = inputs["img_ids"].shape[0], []
    sizes = [(n // 4, 4), (4, n // 4)]
    with attnctl.patch(module, SeesGrids(seen=seen)):
        for high, wide in sizes:
            grid = torch.stack(
                torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1
            ).reshape(n, 2)
            ids = torch.cat([torch.zeros(n, 1), grid], 1).to(inputs["img_ids"])
            module(**{**inputs, "img_ids": ids})
    assert seen == [(1, *size) for size in sizes for _ in range(len(seen) // 2)]


@torch.no_grad()
def test_bare_errors() -> None:
    module, inputs = bare()
    with (
        attnctl.patch(module, attnctl.PAG(), rows=("a", "b", "c")),
        pytest.raises(attnctl.HostError, match="cannot be divided"),
    ):
        module(**inputs)
    with attnctl.patch(sd3(), attnctl.PAG()) as handle, pytest.raises(attnctl.HostError):
        handle.rows("cond").__enter__()


@torch.no_grad()
def test_a_control_that_touches_nothing_warns_once() -> None:
    """Mochi's loop over rows breaks the graph inside its attention."""
    pipe = zoo.FAMILIES["mochi"].build()
    pipe.transformer.compile(backend="eager")
    with (
        attnctl.patch(pipe, attnctl.SoftPAG()) as handle,
        pytest.warns(attnctl.AttnctlWarning, match="touched no attention call") as warned,
    ):
        zoo.run(pipe)
    assert handle.report().calls == 0
    assert len([w for w in warned if w.category is attnctl.AttnctlWarning]) == 1


def test_lumina_with_texts_of_unequal_length_is_refused_where_spans_matter() -> None:
    pipe = zoo.FAMILIES["lumina2"].build()
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.5)):
        zoo.run(pipe, batch=2)
    with (
        attnctl.patch(pipe, attnctl.SEG(sigma=1.0)),
        pytest.raises(attnctl.HostError, match="not known"),
    ):
        zoo.run(pipe, batch=2)
