"""Patches live with what else users do to a pipeline, before the patch or after it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnctl
from attnctl.testing import zoo

CPU = torch.device("cpu")
ORDERS = ["change first", "patch first"]
Change = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    """`set_attention_backend` changes a setting of the whole process."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    before = Registry._active_backend
    yield
    Registry._active_backend = before


def build(name: str) -> Any:
    return zoo.FAMILIES[name].build()


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, zoo.get_family(pipe).denoisers[0])


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return float((one - two).norm()) < tolerance * float(two.norm())


def changed(name: str, order: str, change: Change) -> tuple[Any, attnctl.Handle]:
    """A pipeline under SoftPAG and a change of its user's, made in this order."""
    pipe = build(name)
    if order == ORDERS[0]:
        change(pipe)
    handle = attnctl.patch(pipe, attnctl.SoftPAG())
    if order == ORDERS[1]:
        change(pipe)
    return pipe, handle


def expected(name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Latents of the family without and with SoftPAG."""
    pipe = build(name)
    stock = zoo.run(pipe, **options)
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        return stock, zoo.run(pipe, **options)


@dataclasses.dataclass(frozen=True)
class Spy(attnctl.Control):
    """Notes the spans of the keys of every attention call, by the call's number."""

    seen: list[Any] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "spy-test"
    kinds: ClassVar[tuple[str, ...]] = ("self", "cross", "joint")

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        roles = tuple(role for role, _, _ in call.spans.k)
        self.seen.append((call.site.kind, call.index, roles, len(call.rows)))
        return call.proceed()


# -- changes that leave the mathematics alone ----------------------------------------------


def sequential_offload(pipe: Any) -> None:
    """What enable_sequential_cpu_offload does, which itself wants an accelerator."""
    import accelerate

    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            accelerate.cpu_offload(part, execution_device=CPU)


def model_offload(pipe: Any) -> None:
    """What enable_model_cpu_offload does."""
    import accelerate

    accelerate.cpu_offload_with_hook(denoiser(pipe), execution_device=CPU)


def group_offload(**options: Any) -> Change:
    def change(pipe: Any) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(denoiser(pipe), onload_device=CPU, offload_device=CPU, **options)

    return change


def fuse(pipe: Any) -> None:
    denoiser(pipe).fuse_qkv_projections()


def fuse_and_unfuse(pipe: Any) -> None:
    denoiser(pipe).fuse_qkv_projections()
    denoiser(pipe).unfuse_qkv_projections()


def backend(name: str) -> Change:
    return lambda pipe: denoiser(pipe).set_attention_backend(name)


def checkpointing(pipe: Any) -> None:
    denoiser(pipe).enable_gradient_checkpointing()


SAME: dict[str, Change] = {
    "sequential offload": sequential_offload,
    "model offload": model_offload,
    "group offload by leaf": group_offload(offload_type="leaf_level"),
    "group offload by block": group_offload(offload_type="block_level", num_blocks_per_group=1),
    "fuse": fuse,
    "fuse and unfuse": fuse_and_unfuse,
    "native": backend("native"),
    "math": backend("_native_math"),
    "flex": backend("flex"),
    "checkpointing": checkpointing,
}


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", list(SAME))
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_same_result(name: str, change: str, order: str) -> None:
    stock, controlled = expected(name)
    pipe, handle = changed(name, order, SAME[change])
    assert close(zoo.run(pipe), controlled)
    line = handle.report().lines[0]
    assert line.sites_hit == line.sites > 0
    handle.undo()
    assert close(zoo.run(pipe), stock)
    with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.0)):
        assert close(zoo.run(pipe), stock)


def test_unfusing_under_the_patch() -> None:
    stock, controlled = expected("sd3")
    pipe, handle = changed("sd3", ORDERS[0], fuse)
    pipe.transformer.unfuse_qkv_projections()
    assert close(zoo.run(pipe), controlled)
    handle.undo()
    assert close(zoo.run(pipe), stock)


def test_default_backend_of_the_process() -> None:
    """DIFFUSERS_ATTN_BACKEND is read when diffusers is imported: a process of its own."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "import attnctl; from attnctl.testing import zoo\n"
        "from diffusers.models import attention_dispatch as d\n"
        "print(d._AttentionBackendRegistry._active_backend.value)\n"
        "pipe = zoo.FAMILIES['flux'].build()\n"
        "attnctl.patch(pipe, attnctl.SoftPAG())\n"
        "print(float(zoo.run(pipe).double().norm()))\n"
    )
    env = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "_native_math"}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True)
    used, norm = done.stdout.decode().split()[-2:]
    assert used == "_native_math"
    assert float(norm) == pytest.approx(float(expected("flux")[1].double().norm()), rel=1e-5)


def test_backend_for_a_while() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    pipe, controlled = build("flux"), expected("flux")[1]
    with attnctl.patch(pipe, attnctl.SoftPAG()), attention_backend("_native_math"):
        assert close(zoo.run(pipe), controlled)


# -- processors that bypass the tap --------------------------------------------------------


def test_attention_slicing_is_refused() -> None:
    pipe = build("sd1")
    stock = zoo.run(pipe)
    handle = attnctl.patch(pipe, attnctl.SoftPAG())
    other = attnctl.patch(pipe, attnctl.SEG())
    pipe.enable_attention_slicing()
    with pytest.raises(attnctl.HostError, match="disable_attention_slicing"):
        zoo.run(pipe)
    handle.undo()  # not kept from it by the other one's sites
    other.undo()
    assert close(zoo.run(pipe), stock)
    with pytest.raises(attnctl.HostError, match="disable_attention_slicing"):
        attnctl.patch(pipe, attnctl.SoftPAG())
    pipe.disable_attention_slicing()
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        assert close(zoo.run(pipe), expected("sd1")[1])


# -- LoRA ----------------------------------------------------------------------------------


def add_lora(pipe: Any, name: str = "a", seed: int = 0) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    denoiser(pipe).add_adapter(config, adapter_name=name)


@pytest.mark.filterwarnings("ignore:Already found a")
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_lora_comes_and_goes_under_a_patch(name: str) -> None:
    stock, controlled = expected(name)
    pipe, handle = changed(name, ORDERS[0], add_lora)
    first = zoo.run(pipe)
    assert not close(first, controlled, 1e-2)

    pipe, handle = changed(name, ORDERS[1], add_lora)
    assert close(zoo.run(pipe), first)
    add_lora(pipe, "b", seed=1)
    denoiser(pipe).set_adapters(["a", "b"], [0.0, 1.0])
    assert not close(zoo.run(pipe), first, 1e-2)
    denoiser(pipe).set_adapters(["a", "b"], [1.0, 0.0])
    assert close(zoo.run(pipe), first)
    denoiser(pipe).delete_adapters(["b"])
    denoiser(pipe).fuse_lora()
    assert close(zoo.run(pipe), first)
    denoiser(pipe).unfuse_lora()
    denoiser(pipe).unload_lora()
    assert close(zoo.run(pipe), controlled)
    handle.undo()
    assert close(zoo.run(pipe), stock)


def test_lora_weights_from_a_file(tmp_path: Any) -> None:
    from peft.utils import get_peft_model_state_dict

    pipe, _ = changed("sd3", ORDERS[0], add_lora)
    wanted = zoo.run(pipe)
    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="a")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    pipe, _ = changed("sd3", ORDERS[1], lambda pipe: pipe.load_lora_weights(tmp_path))
    assert close(zoo.run(pipe), wanted)
    pipe.unload_lora_weights()
    assert close(zoo.run(pipe), expected("sd3")[1])


# -- IP-Adapter ----------------------------------------------------------------------------

WIDTH = 16
"""Of the image embeddings."""


def ip_weights(pipe: Any) -> dict[str, Any]:
    """Random weights in the form of an IP-Adapter file, four tokens an image."""
    model = denoiser(pipe)
    torch.manual_seed(7)
    flux = hasattr(model, "transformer_blocks")
    text = model.config.joint_attention_dim if flux else model.config.cross_attention_dim
    proj = {
        "proj.weight": 0.3 * torch.randn(4 * text, WIDTH),
        "proj.bias": 0.1 * torch.randn(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    names = [n for n in model.attn_processors if "attn2" in n or n.startswith("transformer_bl")]
    layers = {}
    for i, name in enumerate(names):
        wide = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
        key = i if flux else 2 * i + 1
        for part in ("k", "v"):
            layers[f"{key}.to_{part}_ip.weight"] = 0.5 * torch.randn(wide, text)
            layers[f"{key}.to_{part}_ip.bias"] = torch.zeros(wide)
    if not flux:
        layers = {k: v for k, v in layers.items() if "bias" not in k}
    return {"image_proj": proj, "ip_adapter": layers}


def add_ip(pipe: Any) -> None:
    denoiser(pipe)._load_ip_adapter_weights([ip_weights(pipe)])


def remove_ip(pipe: Any) -> None:
    pipe.unload_ip_adapter()


def image_embeds(name: str) -> dict[str, Any]:
    made = zoo.core.rows("ip", 0, 2, 1, WIDTH)
    if name == "sd1":
        return {"ip_adapter_image_embeds": [made]}  # negative, positive
    return {
        "ip_adapter_image_embeds": [made[1:].expand(2, 1, WIDTH)],
        "negative_ip_adapter_image_embeds": [made[:1].expand(2, 1, WIDTH)],
    }


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_ip_adapter_comes_and_goes_under_a_patch(name: str) -> None:
    embeds, (stock, controlled) = image_embeds(name), expected(name)
    pipe = build(name)
    add_ip(pipe)
    with_image = zoo.run(pipe, **embeds)
    with attnctl.patch(pipe, attnctl.SoftPAG()) as handle:
        both = zoo.run(pipe, **embeds)
        assert handle.report().lines[0].sites_hit == handle.report().lines[0].sites
    assert torch.equal(zoo.run(pipe, **embeds), with_image)
    assert not close(with_image, stock, 1e-2) and not close(both, with_image, 1e-2)

    pipe, handle = changed(name, ORDERS[1], add_ip)
    assert close(zoo.run(pipe, **embeds), both)
    remove_ip(pipe)
    assert close(zoo.run(pipe), controlled)
    handle.undo()
    assert close(zoo.run(pipe), stock)


@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_the_extra_rows_see_the_image_too(name: str, passes: str) -> None:
    """Each sample of a batch gives what it gives alone: embeddings follow their rows."""
    pipe, embeds = build(name), image_embeds(name)
    add_ip(pipe)
    alone = {k: [v[0] if name == "sd1" else v[0][:1]] for k, v in embeds.items()}
    alone = embeds if name == "sd1" else alone
    with attnctl.patch(pipe, attnctl.SoftPAG(passes=passes)):
        together = zoo.run(pipe, **embeds)
        single = zoo.run(pipe, batch=1, **alone)
    assert close(together[:1], single, 1e-3)


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_the_image_branch_is_not_text(name: str) -> None:
    pipe, spy = build(name), Spy()
    add_ip(pipe)
    attnctl.patch(pipe, spy)
    zoo.run(pipe, **image_embeds(name))
    roles = {(kind, index): keys for kind, index, keys, _ in spy.seen}
    if name == "sd1":
        assert roles == {("self", 0): ("image",), ("cross", 0): ("text",), ("cross", 1): ("ip",)}
    else:
        assert roles == {("joint", 0): ("text", "image"), ("joint", 1): ("ip",)}


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_negative_guidance_leaves_the_image_branch_alone(name: str) -> None:
    """With the positive text as the negative one, NAG changes nothing, image or not."""
    pipe, embeds = build(name), image_embeds(name)
    add_ip(pipe)
    wanted = zoo.run(pipe, cfg=False, **one_sided(embeds))
    text = zoo.get_family(pipe).call(pipe)["prompt_embeds"]
    nag = attnctl.NAG(negative={"encoder_hidden_states": text}, tau=100.0)
    with attnctl.patch(pipe, nag) as handle:
        got = zoo.run(pipe, cfg=False, **one_sided(embeds))
        assert handle.report().calls > 0
    assert close(got, wanted, 1e-4)


def one_sided(embeds: dict[str, Any]) -> dict[str, Any]:
    """The embeddings for a call without guidance."""
    if len(embeds) == 2:
        return embeds
    return {"ip_adapter_image_embeds": [embeds["ip_adapter_image_embeds"][0][1:]]}


# -- caches --------------------------------------------------------------------------------


def first_block_cache(threshold: float) -> Change:
    def change(pipe: Any) -> None:
        from diffusers import FirstBlockCacheConfig

        denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=threshold))

    return change


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_cache_that_never_hits(name: str, order: str) -> None:
    stock, controlled = expected(name, steps=3)
    pipe, handle = changed(name, order, first_block_cache(0.0))
    assert close(zoo.run(pipe, steps=3), controlled)
    denoiser(pipe).disable_cache()
    assert close(zoo.run(pipe, steps=3), controlled)
    handle.undo()
    assert close(zoo.run(pipe, steps=3), stock)


@dataclasses.dataclass(frozen=True)
class Soften(attnctl.Control):
    """The perturbation of SoftPAG on every row of the call, without guidance."""

    u: float = 0.5
    name: ClassVar[str] = "soften-test"

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        return torch.lerp(call.proceed(), call.v, self.u)


@pytest.mark.parametrize("controls", [1, 2])
def test_every_pass_has_its_own_cache(controls: int) -> None:
    """The cached pipeline equals a loop over three denoisers with a cache each."""
    pipe, _ = changed("flux", ORDERS[0], first_block_cache(10.0))
    for _ in range(controls - 1):
        attnctl.patch(pipe, attnctl.SoftPAG())
    got = zoo.run(pipe, steps=4)

    inputs = [kw for _, kw in zoo.denoiser_calls("flux", steps=4)]
    models = [build("flux") for _ in range(3)]
    for model in models:
        first_block_cache(10.0)(model)
    attnctl.patch(models[2].transformer, Soften())
    scheduler = models[0].scheduler
    latents = inputs[0]["hidden_states"]
    with torch.no_grad():
        zoo.run(models[0], steps=4, callback_on_step_end=None)  # sets the timesteps
        models[0].transformer._reset_stateful_cache()
        scheduler._step_index = None
        for i, time in enumerate(scheduler.timesteps):
            c, u, p = (
                predict(m.transformer, {**inputs[2 * i + k], "hidden_states": latents})
                for m, k in zip(models, (0, 1, 0), strict=True)
            )
            guided = u + zoo.core.CFG_SCALE * (c - u) + controls * 3.0 * (c - p)
            latents = scheduler.step(guided, time, latents, return_dict=False)[0]
    assert close(got, latents)


@dataclasses.dataclass(frozen=True)
class WeakFirst(attnctl.Control):
    """Runs its own pass before the main one, in which the outer context must be back."""

    adds_rows: ClassVar[bool] = True
    name: ClassVar[str] = "weak-first-test"

    def denoise(self, call: attnctl.ForwardCall) -> Tensor:
        if "cond" in call.rows:
            call.only("cond", call.role).proceed()
        return call.proceed()


@pytest.mark.parametrize("hand", [False, True], ids=["pipeline", "by hand"])
def test_the_outer_cache_context_comes_back(hand: bool) -> None:
    pipe = build("flux")
    first_block_cache(0.0)(pipe)
    if not hand:
        stock = zoo.run(pipe)
        with attnctl.patch(pipe, WeakFirst()):
            assert close(zoo.run(pipe), stock)
        return
    inputs = zoo.denoiser_inputs("flux")[1]
    with torch.no_grad():
        stock = predict(pipe.transformer, inputs)
        with attnctl.patch(pipe.transformer, WeakFirst()):
            assert close(predict(pipe.transformer, inputs), stock)


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    with model.cache_context("any"):
        return model(**inputs)[0]


def pyramid() -> Any:
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


def faster() -> Any:
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        current_timestep_callback=lambda: 500, attention_weight_callback=lambda _: 0.5
    )


@pytest.mark.parametrize("config", [pyramid, faster])
def test_caches_that_would_mix_the_passes_are_refused(config: Callable[[], Any]) -> None:
    pipe = build("flux")
    pipe.transformer.enable_cache(config())
    with pytest.raises(attnctl.ControlConflict, match="disable_cache"):
        attnctl.patch(pipe, attnctl.SoftPAG())
    attnctl.patch(pipe, attnctl.SoftPAG(scale=0.0)).undo()
    pipe.transformer.disable_cache()
    with attnctl.patch(pipe, attnctl.SoftPAG()):
        pipe.transformer.enable_cache(config())
        with pytest.raises(attnctl.ControlConflict, match="disable_cache"):
            zoo.run(pipe)


# -- gradients -----------------------------------------------------------------------------


def double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("passes", ["rows", "calls"])
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_gradients_flow(name: str, passes: str, checkpoint: bool) -> None:
    module, inputs = zoo.denoiser_inputs(name)
    module, inputs = module.double(), {k: double(v) for k, v in inputs.items()}
    batched = zoo.FAMILIES[name].cfg == "batched"
    two = [attnctl.SoftPAG(heads="L0", passes=passes), attnctl.SEG(heads="L1", passes=passes)]
    rows = ("uncond", "cond") if batched else ("cond",)
    attnctl.patch(module, *two, rows=rows)
    if checkpoint:
        module.train().enable_gradient_checkpointing()
    first = next(iter(inputs))

    def loss(x: Tensor) -> Tensor:
        return module(**{**inputs, first: x})[0].square().mean()

    x = inputs[first].requires_grad_(True)
    loss(x).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    torch.manual_seed(0)
    away = 1e-3 * torch.randn_like(x)  # rotary embeddings and norms are float32
    with torch.no_grad():
        slope = (loss(x + away) - loss(x - away)) / 2
    assert float((x.grad * away).sum()) == pytest.approx(float(slope), rel=2e-3)


# -- threads -------------------------------------------------------------------------------


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Run the jobs at once; an exception is a result."""
    results: list[Any] = [None] * len(jobs)

    def work(i: int) -> None:
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stepping(barrier: threading.Barrier) -> dict[str, Any]:
    """Makes pipelines in several threads go step by step together."""

    def wait(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        barrier.wait(timeout=60)
        return values

    return {"callback_on_step_end": wait, "steps": 3}


@pytest.mark.parametrize("names", [("sd3", "flux"), ("sd3", "sd3"), ("sd1", "sd1")])
def test_two_pipelines_in_two_threads(names: tuple[str, str]) -> None:
    """One patched and one stock, or both with other controls."""
    pipes = [build(name) for name in names]
    stock = [zoo.run(p, steps=3) for p in pipes]
    controls = [attnctl.SoftPAG(), attnctl.SEG(start=0.3)]
    alone = []
    for pipe, control in zip(pipes, controls, strict=True):
        with attnctl.patch(pipe, control):
            alone.append(zoo.run(pipe, steps=3))
    together = stepping(threading.Barrier(2))
    jobs = [lambda p=p: zoo.run(p, **together) for p in pipes]
    with attnctl.patch(pipes[0], controls[0]):
        got = in_threads(*jobs)
        assert torch.equal(got[0], alone[0]) and torch.equal(got[1], stock[1])
        with attnctl.patch(pipes[1], controls[1]):
            got = in_threads(*jobs)
            assert torch.equal(got[0], alone[0]) and torch.equal(got[1], alone[1])


def twin_of(pipe: Any) -> Any:
    """Another pipeline around the same models, with a scheduler of its own."""
    cls = type(build(pipe._zoo_family))
    scheduler = type(build(pipe._zoo_family).scheduler).from_config(pipe.scheduler.config)
    return named(cls(**{**pipe.components, "scheduler": scheduler}), pipe._zoo_family)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_two_pipelines_share_a_denoiser_in_two_threads(name: str) -> None:
    one = build(name)
    two = twin_of(one)
    stock, controlled = expected(name, steps=3)
    together = stepping(threading.Barrier(2))
    with attnctl.patch(one, attnctl.SoftPAG()):
        got = in_threads(lambda: zoo.run(one, **together), lambda: zoo.run(two, **together))
        assert torch.equal(got[0], controlled) and torch.equal(got[1], stock)
        with attnctl.patch(two, attnctl.SoftPAG(stop=0.5)):
            early = zoo.run(two, steps=3)
            got = in_threads(lambda: zoo.run(one, **together), lambda: zoo.run(two, **together))
            assert torch.equal(got[0], controlled) and torch.equal(got[1], early)
        assert torch.equal(zoo.run(two, steps=3), stock)


def test_one_patched_pipeline_runs_once_at_a_time() -> None:
    pipe, inside, go_on = build("sd3"), threading.Event(), threading.Event()

    def hold(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        inside.set()
        go_on.wait(60)
        return values

    def second() -> Any:
        inside.wait(60)
        try:
            return zoo.run(pipe)
        finally:
            go_on.set()

    with attnctl.patch(pipe, attnctl.SoftPAG()):
        wanted = zoo.run(pipe)
        first, error = in_threads(lambda: zoo.run(pipe, callback_on_step_end=hold), second)
        assert torch.equal(first, wanted)
        assert isinstance(error, attnctl.HostError) and "another thread" in str(error)
        assert torch.equal(zoo.run(pipe), wanted)


# -- parts swapped, pipelines sharing a denoiser -------------------------------------------


def test_another_scheduler_after_the_patch() -> None:
    from diffusers import EulerDiscreteScheduler

    pipe, other = build("sd1"), build("sd1")
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
    stock = zoo.run(other, steps=4)
    control = attnctl.SoftPAG(start=0.25, stop=0.75)
    with attnctl.patch(other, control):
        wanted = zoo.run(other, steps=4)
    old = pipe.scheduler
    handle = attnctl.patch(pipe, control)
    zoo.run(pipe, steps=4)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(zoo.run(pipe, steps=4), wanted)
    assert handle.report().lines[0].steps == (1, 2)
    handle.undo()
    assert torch.equal(zoo.run(pipe, steps=4), stock)
    for scheduler in (old, pipe.scheduler):
        assert type(scheduler).__mro__[1].__module__.startswith("diffusers")
        assert not [k for k in vars(scheduler) if "attnctl" in k]


@pytest.mark.parametrize("new", [lambda: build("sd3").transformer, lambda: None])
def test_another_denoiser_after_the_patch_is_refused(new: Callable[[], Any]) -> None:
    pipe, stock = build("sd3"), expected("sd3")[0]
    handle, old = attnctl.patch(pipe, attnctl.SoftPAG()), pipe.transformer
    pipe.transformer = new()
    with pytest.raises(attnctl.HostError):
        zoo.run(pipe)
    pipe.transformer = old
    zoo.run(pipe)
    handle.undo()
    assert torch.equal(zoo.run(pipe), stock)


def test_a_second_denoiser_after_the_patch_is_refused() -> None:
    pipe = build("wan22")
    second, pipe.transformer_2 = pipe.transformer_2, None
    attnctl.patch(pipe, attnctl.SoftPAG())
    pipe.transformer_2 = second
    with pytest.raises(attnctl.HostError, match=r"pipe\.transformer_2 was replaced"):
        zoo.run(pipe)


def test_a_pipeline_made_from_the_patched_one_is_stock() -> None:
    """from_pipe shares every part; the patch is the first pipeline's alone."""
    from diffusers import StableDiffusion3PAGPipeline, StableDiffusion3Pipeline

    pipe = build("sd3")
    stock, controlled = expected("sd3")
    perturbed = zoo.run(named(StableDiffusion3PAGPipeline.from_pipe(build("sd3")), "sd3"))
    handle = attnctl.patch(pipe, attnctl.SoftPAG())
    for cls, wanted in (
        (StableDiffusion3Pipeline, stock),
        (StableDiffusion3PAGPipeline, perturbed),  # replaces processors while it runs
    ):
        other = named(cls.from_pipe(pipe), "sd3")
        assert other.transformer is pipe.transformer and other.scheduler is pipe.scheduler
        with warnings.catch_warnings():  # of calls that the patch leaves alone, say
            warnings.simplefilter("error", attnctl.AttnctlWarning)
            assert torch.equal(zoo.run(other), wanted)
        assert torch.equal(zoo.run(pipe), controlled)
    handle.undo()
    assert torch.equal(zoo.run(pipe), stock)


def named(pipe: Any, name: str) -> Any:
    """Make a pipeline that the zoo did not build known to it."""
    pipe._zoo_family = name
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_call_by_hand_past_the_pipeline_warns_once() -> None:
    pipe, (module, inputs) = build("sd3"), zoo.denoiser_inputs("sd3")
    with torch.no_grad():
        stock = module(**inputs)[0]
        with attnctl.patch(pipe, attnctl.SoftPAG(scale=0.0)):
            pipe.transformer(**inputs)  # nothing to act: nothing to say
        with attnctl.patch(pipe, attnctl.SoftPAG()):
            zoo.run(pipe)
            with pytest.warns(attnctl.AttnctlWarning, match="only in calls of that") as caught:
                out = pipe.transformer(**inputs)[0]
            assert caught[0].filename == __file__
            assert torch.equal(pipe.transformer(**inputs)[0], stock)
            zoo.run(pipe)
        assert torch.equal(out, stock)
        with attnctl.patch(pipe.transformer, attnctl.SoftPAG()):
            assert not torch.equal(pipe.transformer(**inputs)[0], stock)
