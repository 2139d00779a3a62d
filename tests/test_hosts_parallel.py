"""Context parallelism (Ulysses): two processes over gloo on the CPU against one.

The two are forked, which is safe only where no other thread runs: one that holds a lock at that
moment leaves it locked in the child for ever. So these tests run in a process of their own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl
from attnctl.apps.bench import model, parallel
from attnctl.control import Control
from attnctl.kernels import BlockMask
from attnctl.processors.sparse.shapes import VideoTokens
from attnctl.testing import zoo
from attnctl.testing.alone import run_alone
from attnctl.testing.zoo.core import make

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]

SPARSE = attnctl.Radial(decay=0.3, block=32, dense_layers=0, start=0.0)
WAIT = 120
ALONE = "ATTNCTL_TESTS_FORK"
alone = pytest.mark.skipif(ALONE not in os.environ, reason="run by test_in_a_clean_process")


@pytest.mark.skipif(ALONE in os.environ, reason="this is the clean process")
def test_in_a_clean_process() -> None:
    run_alone(__file__, "-p", "no:xdist", "-k", "not refused", **{ALONE: "1"})


def per_head(tokens: VideoTokens) -> BlockMask:
    """A mask of its own for each of the four heads, with partial blocks."""
    place = torch.arange(tokens.n)
    reach = torch.tensor([20, 60, 110, 190])[:, None, None]
    return BlockMask.from_dense((place[:, None] - place).abs() < reach, 32)


ACTING: dict[str, Control] = {
    "radial": SPARSE,
    "radial-on-a-head-of-each": attnctl.Radial(
        decay=0.3, block=32, dense_layers=0, start=0.0, heads="L0H1 L1H0 L1H2"
    ),
    "a-mask-for-each-head": attnctl.BlockSparse(rule=per_head, dense_layers=1, start=0.5),
}


def build(heads: int = 4) -> Any:
    pipe = zoo.FAMILIES["wan"].build()
    pipe.transformer = make(
        "WanTransformer3DModel", **{**pipe.transformer.config, "num_attention_heads": heads}
    )
    return pipe


def run(pipe: Any) -> Tensor:
    """Return nine latent frames of 4 x 6 tokens; older diffusers want an even number of words."""
    texts = torch.randn(2, 2, 12, 20, generator=torch.Generator().manual_seed(5))
    return zoo.run(
        pipe, num_frames=33, prompt_embeds=texts[0], negative_prompt_embeds=texts[1]
    )  # fmt: skip


def in_two(work: Callable[[], Any], tmp_path: Path) -> list[Any]:
    """Return what `work` returns in each of two processes, joined in a gloo group."""
    children = [_fork(work, tmp_path, rank) for rank in range(2)]
    codes = [os.waitpid(child, 0)[1] for child in children]
    said = [(tmp_path / f"{rank}.txt") for rank in range(2)]
    assert codes == [0, 0], "\n".join(p.read_text() for p in said if p.exists())
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _fork(work: Callable[[], Any], tmp_path: Path, rank: int) -> int:
    said = (tmp_path / f"{rank}.txt").open("w")
    child = os.fork()
    if child:
        said.close()
        return child
    code = 1
    faulthandler.dump_traceback_later(2 * WAIT, exit=True, file=said)  # a fork may be stuck
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2
        )
        torch.save(work(), tmp_path / f"{rank}.pt")
        torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc(file=said)
    finally:
        said.close()
        os._exit(code)


def spread(pipe: Any, **config: Any) -> None:
    """Turn context parallelism on; diffusers divides by the number of accelerators it finds."""
    if hasattr(torch, "accelerator"):
        torch.accelerator.device_count = lambda: 2
    pipe.transformer.enable_parallelism(
        config=diffusers.ContextParallelConfig(**{"ulysses_degree": 2, **config})
    )


def sample(pipe: Any, control: Control) -> tuple[Tensor, Any]:
    with attnctl.patch(pipe, control) as handle:
        return run(pipe), handle.report()


@alone
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    pipe = build()
    stock = run(pipe)
    alone = {name: sample(pipe, control) for name, control in ACTING.items()}

    def work() -> Any:
        spread(pipe)
        dense = run(pipe)
        idle, _ = sample(pipe, attnctl.Radial(start=0.0, dense_steps="0-1"))
        found = {name: sample(pipe, control) for name, control in ACTING.items()}
        return dense, idle, found, run(pipe)

    for dense, idle, found, after in in_two(work, tmp_path):
        torch.testing.assert_close(dense, stock, atol=1e-5, rtol=0)
        assert torch.equal(idle, dense) and torch.equal(after, dense)
        for name, (video, report) in found.items():
            want, told = alone[name]
            assert (want - stock).abs().max() > 0.01
            torch.testing.assert_close(video, want, atol=1e-5, rtol=0)
            assert report.lines[0].calls == told.lines[0].calls


newer = pytest.mark.skipif(
    not hasattr(diffusers.ContextParallelConfig, "ulysses_anything"),
    reason="this diffusers shares heads out evenly only, and its own gradient fails",
)


@newer
@alone
def test_heads_that_cannot_be_shared_out_evenly(tmp_path: Path) -> None:
    pipe = build(heads=3)
    control = attnctl.Radial(
        decay=0.3, block=32, dense_layers=0, start=0.0, heads="L0H2 L1H0"
    )  # the second process has head 2 alone
    want, _ = sample(pipe, control)

    def work() -> Any:
        spread(pipe, ulysses_anything=True)
        return sample(pipe, control)[0]

    for video in in_two(work, tmp_path):
        torch.testing.assert_close(video, want, atol=1e-5, rtol=0)


@alone
def test_the_bench_finds_both_alike_and_tells_what_the_control_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(size: model.Size) -> tuple[Any, dict[str, Any]]:
        inputs = {
            "hidden_states": torch.randn(1, 4, 9, 8, 12),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 12, 20),
        }
        return build().transformer, inputs

    monkeypatch.setitem(model.MODELS, "wan-1.3b", tiny)
    words = ["--device", "cpu", "--rounds", "1", "--out", str(tmp_path / "parallel.json")]
    words += ["--control", "radial:decay=0.3,block=32,dense_layers=0,start=0"]
    in_two(lambda: parallel.main(words), tmp_path)
    data = json.loads((tmp_path / "parallel.json").read_text())
    stock, radial = data["rows"]
    assert data["processes"] == 2 and stock["arm"] == "stock" and stock["moved"] == 0
    assert stock["apart"] < 1e-6 and radial["apart"] < 1e-6 and radial["moved"] > 1e-3
    assert min(stock["alone_ms"], radial["shared_ms"]) > 0


# -- what is refused -------------------------------------------------------------------------


def declared(pipe: Any, **config: Any) -> Any:
    """Let a model say that it is spread over processes; nothing is exchanged."""
    from diffusers.models._modeling_parallel import ParallelConfig

    spread = diffusers.ContextParallelConfig(**(config or {"ulysses_degree": 2}))
    pipe.transformer._parallel_config = ParallelConfig(context_parallel_config=spread)
    return pipe


class Doubled(Control):
    """Does not say that it is safe."""

    name = "doubled"

    def attend(self, call: Any) -> Tensor:
        return 2 * call.proceed()


def test_controls_that_do_not_declare_themselves_safe_are_refused() -> None:
    pipe = declared(build())
    for control in (Doubled(), attnctl.SoftPAG()):
        with pytest.raises(attnctl.HostError, match=r"sees a part of the tokens or heads"):
            attnctl.patch(pipe, control, SPARSE)
    assert "_attnctl" not in pipe.transformer.__dict__
    with attnctl.patch(pipe, attnctl.SoftPAG(u=0.0)):  # does nothing
        pass
    pipe.transformer._parallel_config = None
    with attnctl.patch(pipe, Doubled()):
        declared(pipe)
        with pytest.raises(attnctl.HostError, match=r"doubled.* sees a part of the tokens"):
            zoo.run(pipe)


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"ring_degree": 2}, "ring"), ({"ring_degree": 2, "ulysses_degree": 2}, "ulysses and ring")],
)
def test_ring_attention_is_refused(config: dict[str, int], kind: str) -> None:
    try:
        pipe = declared(build(), **config)
    except ValueError:
        pytest.skip("this diffusers does not mix the two")
    with pytest.raises(attnctl.HostError, match=f"under {kind} parallelism"):
        attnctl.patch(pipe, SPARSE)


def test_tensor_parallelism_is_refused() -> None:
    parallel = pytest.importorskip("diffusers.models._modeling_parallel")
    if not hasattr(parallel, "TensorParallelConfig"):
        pytest.skip("this diffusers has no tensor parallelism")
    pipe = build()
    config = parallel.ParallelConfig(tensor_parallel_config=parallel.TensorParallelConfig(2))
    pipe.transformer._parallel_config = config
    with pytest.raises(attnctl.HostError, match="under tensor parallelism"):
        attnctl.patch(pipe, SPARSE)


def test_joint_attention_is_refused() -> None:
    pipe = declared(zoo.FAMILIES["hunyuanvideo"].build())
    with pytest.raises(attnctl.HostError, match=r"joint attention .* changes the order"):
        attnctl.patch(pipe, SPARSE)


def test_compiled_models_are_refused() -> None:
    pipe = declared(build())
    pipe.transformer.compile_repeated_blocks(backend="eager")
    with pytest.raises(attnctl.HostError, match=r"leave torch\.compile"):
        attnctl.patch(pipe, SPARSE)
    whole = build()
    whole.transformer = torch.compile(whole.transformer, backend="eager")
    with attnctl.patch(whole, SPARSE):
        whole.transformer._orig_mod._parallel_config = pipe.transformer._parallel_config
        with pytest.raises(attnctl.HostError, match=r"leave torch\.compile"):
            zoo.run(whole)


def test_calls_that_exchange_nothing_are_refused() -> None:
    """The config says parallel, the processors were not told: as on sites that bypass it."""
    pipe = declared(build())
    with (
        attnctl.patch(pipe, SPARSE),
        pytest.raises(attnctl.HostError, match="does not exchange its tokens"),
    ):
        run(pipe)


@newer
@alone
def test_there_is_no_gradient(tmp_path: Path) -> None:
    pipe = build()

    def work() -> str:
        spread(pipe)
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(1, 4, 9, 8, 12, requires_grad=True),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 12, 20),
        }
        with attnctl.patch(pipe.transformer, SPARSE):
            out = pipe.transformer(**inputs, return_dict=False)[0]
            with pytest.raises(attnctl.HostError, match="no gradient under context") as told:
                out.sum().backward()
        return str(told.value)

    assert all(in_two(work, tmp_path))
