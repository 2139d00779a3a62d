"""Heat maps: equal to columns of the explicit float64 map, read without touching the output."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl
from attnctl import assets
from attnctl.assets import world
from attnctl.hosts import tap, targets
from attnctl.hosts.denoiser import Forward
from attnctl.hosts.run import LOCAL
from attnctl.kernels.lse import Columns
from attnctl.processors.analysis import HeatMap, TokenMaps, reading, token_mass
from attnctl.processors.analysis.overlay import overlay
from attnctl.processors.analysis.placing import text_keys
from attnctl.processors.analysis.reading import Reader
from attnctl.processors.analysis.token_maps import Key, common
from attnctl.testing import oracles, zoo
from attnctl.testing.calls import attention_call, joint_spans, tensors

module = importlib.import_module("attnctl.processors.analysis.token_mass")
WORDS = {"one": [1], "two": [0, 3]}
UNKNOWN = ("latte",)  # which folds frames into the batch; its grid is not known
FAMILIES = [name for name in zoo.FAMILIES if name != "zimage"]


@functools.cache
def built(name: str) -> Any:
    try:
        return zoo.FAMILIES[name].build()
    except zoo.FamilyUnavailable as error:
        pytest.skip(str(error))


# -- the columns --------------------------------------------------------------------------------


def explicit(q: Tensor, k: Tensor, groups: list[list[int]], **options: Any) -> Tensor:
    """Return the summed columns of the whole map, [B, H, W, Nq]."""
    whole = oracles.softmax_map(q, k, **options)
    return torch.stack([whole[..., list(group)].sum(-1) for group in groups], dim=2)


@pytest.mark.parametrize("most", [1, 50, 1 << 22])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (7, 5), (35, 13), (63, 111)])
def test_columns_equal_the_explicit_map(
    tokens: int, keys: int, masked: str | None, most: int
) -> None:
    q, k, _ = tensors(batch=2, heads=3, tokens=tokens, keys=keys, dim=7)
    mask = None
    if masked:
        mask = torch.rand(2, 1, tokens, keys, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[:, :, 0] = False  # a query without any key
        if masked == "float":
            mask = torch.where(mask, 0.3, -torch.inf).double()
    groups = [[0], [], [keys // 2, keys - 1] if keys > 2 else [0]]
    want = explicit(q, k, groups, mask=mask, scale=0.4)
    got = token_mass(q, k, groups, mask, 0.4, most=most)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    summed = token_mass(q, k, groups, mask, 0.4, each_head=False, most=most)
    torch.testing.assert_close(summed, want.sum(1, keepdim=True), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns_in_low_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, _ = tensors(heads=2, tokens=33, keys=9, dtype=dtype)
    want = explicit(q, k, [[0, 4], [8]])
    got = token_mass(q, k, [[0, 4], [8]])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_columns_as_attention_to_the_chosen_keys(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of GPUs, whose kernel torch's other one stands for on a CPU."""
    q, k, _ = tensors(batch=2, heads=3, tokens=133, keys=77, dim=40, dtype=dtype)
    groups = [[3], [0, 7, 76], []]
    want = explicit(q, k, groups, scale=0.4)
    if device == "cpu":
        monkeypatch.setattr(module, "_has_kernel", lambda q, k: True)
        monkeypatch.setattr(
            module, "_attention",
            lambda q, k, v, scale: torch.nn.functional.scaled_dot_product_attention(
                q, k, v.expand(*k.shape[:2], -1, -1), scale=scale
            ),
        )  # fmt: skip
    got = token_mass(q.to(device), k.to(device), groups, None, 0.4)
    assert got.dtype == torch.float32 and (got[:, :, 2] == 0).all()
    error = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double().cpu(), want, rtol=4 * error, atol=error**2)
    summed = token_mass(q.to(device), k.to(device), groups, None, 0.4, each_head=False)
    torch.testing.assert_close(
        summed.double().cpu(), want.sum(1, keepdim=True), rtol=4 * error, atol=error**2
    )
    if device == "cuda":
        assert module._has_kernel(q.cuda(), k.cuda())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            # views hold no memory of their own
            if isinstance(tensor, Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return out


def test_memory_is_that_of_a_chunk_whatever_the_number_of_tokens() -> None:
    peaks = []
    for tokens in (250, 1000, 2000):
        q, k, _ = tensors(heads=2, tokens=tokens, keys=tokens + 11, dim=4, dtype=torch.float32)
        with Largest() as largest:
            token_mass(q, k, [[0, 1], [5]], most=60_000)
        peaks.append(largest.elements)
        assert largest.elements < 2 * tokens * tokens / 2
    assert max(peaks) <= 60_000


# -- one call -------------------------------------------------------------------------------


def reader_of(control: HeatMap, words: dict[str, list[int]], prompts: int = 1) -> Reader:
    positions = tuple(tuple(p) for p in words.values())
    return Reader(TokenMaps(tuple(words), (positions,) * prompts, control.each_head))


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("refs", [0, 4])
def test_the_image_to_text_block_of_a_joint_map(text_first: bool, refs: int) -> None:
    grid, text = (1, 3, 5), 6
    spans = joint_spans(15, text, text_first=text_first, grid=grid, refs=refs)
    total = 15 + text + refs
    q, k, v = tensors(batch=4, heads=3, kv_heads=1, tokens=total)
    control = HeatMap(sink=lambda _: None)
    state = reader_of(control, WORDS)
    call = attention_call(
        q, k, v, kind="joint", groups=("uncond", "cond"), spans=spans, heads=[0, 2], state=state
    )
    assert torch.equal(control.attend(call), call.proceed())
    first = spans.keys("text").start
    image = spans.queries("image")
    columns = [[first + p for p in word] for word in WORDS.values()]
    want = explicit(q, k, columns)[2:, [0, 2]][..., image].mean(1)
    got = common([state.maps])
    assert got.shape == (2, 2, 1, 3, 5) and got.dtype == torch.float32
    torch.testing.assert_close(got.flatten(2).double(), want, rtol=1e-5, atol=1e-7)


def test_every_head_by_itself() -> None:
    spans = attnctl.Spans((("image", 0, 6),), (("text", 0, 4),), (1, 2, 3))
    q, k, v = tensors(heads=3, tokens=6, keys=4)
    control = HeatMap(sink=lambda _: None, each_head=True)
    state = reader_of(control, WORDS)
    call = attention_call(
        q, k, v, kind="cross", groups=("cond",), spans=spans, heads=[0, 2], state=state
    )
    for _ in range(2):  # the mean of two equal calls is one of them
        control.attend(call)
    ((key, mean),) = state.maps.means().items()
    assert key == Key((1, 2, 3), "blocks.0.attn", (0, 2))
    want = explicit(q, k, list(WORDS.values()))[:, [0, 2]].unflatten(-1, (1, 2, 3))
    torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(common([state.maps]).double(), want.mean(1), rtol=1e-5, atol=1e-7)


def test_other_rows_and_other_keys_are_left_out() -> None:
    q, k, v = tensors(batch=2, tokens=6, keys=4)
    control = HeatMap(sink=lambda _: None)
    state = reader_of(control, WORDS)
    text = attnctl.Spans((("image", 0, 6),), (("text", 0, 4),), (1, 2, 3))
    added = attnctl.Spans((("image", 0, 6),), (("ip", 0, 4),), (1, 2, 3))
    for spans, groups in ((text, ("uncond",)), (text, ("perturbed/1",)), (added, ("cond",))):
        control.attend(
            attention_call(q, k, v, kind="cross", groups=groups, spans=spans, state=state)
        )
    with pytest.raises(attnctl.HostError, match="no attention map was seen"):
        common([state.maps])
    late = reader_of(control, {"late": [4]})
    with pytest.raises(attnctl.HostError, match="position 4, but there are 4 text"):
        control.attend(
            attention_call(q, k, v, kind="cross", groups=("cond",), spans=text, state=late)
        )


class Operations(TorchDispatchMode):
    """Counts the operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_positions_are_counted_from_the_first_text_token() -> None:
    assert text_keys(((0, 3), ()), slice(10, 14), "here") == ((10, 13), ())
    with pytest.raises(attnctl.HostError, match=r"here: .* position 4, but there are 4 text"):
        text_keys(((0,), (4,)), slice(10, 14), "here")


def test_with_a_kernel_a_known_call_costs_one_start_and_no_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[Tensor, Tensor]] = []
    made: list[Columns] = []

    def column_sums(q: Tensor, k: Tensor, columns: Columns, mask: Any, scale: Any) -> Any:
        made.append(columns)
        return lambda q, k, mask: started.append((q, k))

    monkeypatch.setattr(reading, "column_sums", column_sums)
    q, k, v = tensors(batch=2, tokens=6, keys=4)
    reader = reader_of(HeatMap(), WORDS)
    wide = attnctl.Spans((("image", 0, 6),), (("text", 0, 4),), (1, 2, 3))
    high = attnctl.Spans((("image", 0, 6),), (("text", 0, 4),), (1, 3, 2))
    options: dict[str, Any] = {"kind": "cross", "groups": ("uncond", "cond")}
    first = attention_call(q, k, v, spans=wide, **options)
    reader.read(first)
    with Operations() as operations:
        for _ in range(3):
            reader.read(first)
    assert (operations.count, len(made), len(started)) == (0, 1, 4)
    assert made[0].rows == slice(1, 2) and made[0].sums is reader.maps.sums[Key((1, 2, 3))]
    assert reader.maps.counts[Key((1, 2, 3))].tolist() == [4 * 2]  # calls of two heads
    # whatever changes is looked at anew: the grid, the layout, the heads
    reader.read(replace(attention_call(q, k, v, spans=high, **options), heads=first.heads))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    other = attention_call(turned, k, v, spans=high, **options)
    reader.read(replace(other, heads=first.heads))
    reader.read(attention_call(turned, k, v, spans=high, heads=[1], **options))
    assert len(made) == 4 and made[3].heads.tolist() == [1]
    assert reader.maps.counts[Key((1, 3, 2))].tolist() == [2 + 2 + 1]


def by_map(q: Tensor, k: Tensor, to: Columns, mask: Any, scale: Any) -> Any:
    """Stand in for the kernel on a CPU."""

    def add(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        whole = oracles.softmax_map(q, k, mask, scale)[to.rows][:, :, to.queries]
        found = (whole[..., to.keys] @ to.members.double()).sum(1).transpose(-1, -2)
        to.sums[to.first : to.first + len(found), 0] += found.float()

    return add


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give HeatMap a kernel, and return where it is asked call by call."""
    sites, stock = list[str](), HeatMap.attend

    def attend(self: HeatMap, call: attnctl.AttentionCall) -> Tensor:
        sites.append(call.site.name)
        return stock(self, call)

    monkeypatch.setattr(reading, "column_sums", by_map)
    monkeypatch.setattr(HeatMap, "attend", attend)
    return sites


@pytest.mark.parametrize("name", ["sd1", "sd3", "wan"])
def test_a_kernel_reads_a_run_and_the_control_is_asked_once(
    name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, steps = built(name), 3
    stock = zoo.run(pipe, steps=steps)
    runs: list[TokenMaps] = []
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append)) as handle:
        for _ in range(2):  # each run has sums of its own
            assert torch.equal(zoo.run(pipe, steps=steps), stock)
        lines = handle.report().lines
    sites = sum(line.sites for line in lines)
    each = 2 if name == "wan" else 1  # conditional rows by themselves, and the others
    assert len(asked) == 2 * each * sites
    assert sum(line.calls for line in lines) == 2 * each * sites * steps
    monkeypatch.setattr(reading, "column_sums", lambda *given: None)
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
        zoo.run(pipe, steps=steps)
    first, second, want = (
        runs[i : i + len(runs) // 3] for i in range(0, len(runs), len(runs) // 3)
    )
    assert torch.equal(common(first), common(second))
    torch.testing.assert_close(common(first), common(want), rtol=1e-4, atol=1e-6)
    for mine, other in zip(first, want, strict=True):
        assert mine.tallies == other.tallies


def test_a_watched_site_is_asked_again_when_others_act_there(asked: list[str]) -> None:
    pipe, runs = built("sd1"), list[TokenMaps]()
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
        zoo.run(pipe, steps=4)
    alone, sites = runs.pop(), len(asked)
    first = HeatMap(WORDS, runs.append)
    late = HeatMap(WORDS, lambda maps: None, start=0.5)
    with attnctl.patch(pipe, first, late):
        zoo.run(pipe, steps=4)
    # once by itself, then both of them at two steps
    assert len(asked) == sites + sites + 2 * 2 * sites
    torch.testing.assert_close(common(runs), common([alone]), rtol=1e-6, atol=1e-7)


def offered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return where calls of a site go the whole way, call by call."""
    sites, stock = list[int](), Forward.attend

    def attend(self: Forward, ref: tap.SiteRef, *call: Any, **more: Any) -> Tensor:
        sites.append(ref.index)
        return stock(self, ref, *call, **more)

    monkeypatch.setattr(Forward, "attend", attend)
    return sites


@pytest.mark.parametrize("name", ["sd1", "sd3", "wan"])
def test_the_straight_line_is_the_whole_way_bit_for_bit(
    name: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, steps = built(name), 3
    stock, sites = zoo.run(pipe, steps=steps), offered(monkeypatch)
    found, calls, ways = list[list[TokenMaps]](), list[Any](), list[int]()
    for straight in (True, False):
        if not straight:
            monkeypatch.setattr(tap, "_watched", lambda *given: False)
        sites.clear()
        found.append([])
        with attnctl.patch(pipe, HeatMap(WORDS, found[-1].append)) as handle:
            assert torch.equal(zoo.run(pipe, steps=steps), stock)
            calls.append([(line.sites, line.calls) for line in handle.report().lines])
        ways.append(len(sites))
    assert calls[0] == calls[1] and ways[1] == steps * ways[0] > 0
    for mine, other in zip(*found, strict=True):
        assert mine.tallies == other.tallies and mine.sums.keys() == other.sums.keys()
        assert all(torch.equal(sums, other.sums[key]) for key, sums in mine.sums.items())


def test_the_straight_line_is_for_sites_that_are_only_read(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, sites, each = built("sd1"), offered(monkeypatch), 4
    cross = len(attnctl.sites(pipe).select(kinds=("cross",)))
    halves = {"up": len(attnctl.sites(pipe).select("up", kinds=("cross",)))}

    def way(*controls: attnctl.Control) -> int:
        sites.clear()
        with attnctl.patch(pipe, *controls):
            zoo.run(pipe, steps=each)
        return len(sites)

    def maps(**options: Any) -> HeatMap:
        return HeatMap(WORDS, lambda maps: None, **options)

    assert way(maps()) == cross
    assert way(attnctl.PLADIS(lam=1.5)) == each * cross
    assert way(maps(), attnctl.PLADIS(lam=1.5)) == each * cross
    # where the other one does not act, it is read all the same
    both = way(maps(), attnctl.PLADIS(lam=1.5, heads="up"))
    assert both == each * halves["up"] + (cross - halves["up"])
    assert way(maps(), attnctl.PLADIS(lam=1.5, start=0.5)) == cross + each // 2 * cross


def test_a_processor_put_in_after_the_patch_is_read_too(asked: list[str]) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    class Own(AttnProcessor2_0):
        """In a module of its own, whose names are not patched yet."""

        def __call__(self, attn: Any, hidden_states: Tensor, **given: Any) -> Any:
            query = attn.to_q(hidden_states)
            key, value = (to(given["encoder_hidden_states"]) for to in (attn.to_k, attn.to_v))
            q, k, v = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
            )
            out = F.scaled_dot_product_attention(q, k, v)
            return attn.to_out[0](out.transpose(1, 2).flatten(2))

    unet, runs = built("sd1").unet, list[TokenMaps]()
    at = attnctl.sites(unet).select(kinds=("cross",))
    modules = [unet.get_submodule(attnctl.sites(unet)[i].name) for i in at]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 12, generator=draw)
    text = torch.randn(1, 10, unet.config.cross_attention_dim, generator=draw)
    before = [module.processor for module in modules]
    try:
        with attnctl.patch(unet, HeatMap(WORDS, runs.append), steps=3), torch.no_grad():
            unet(x, 900, encoder_hidden_states=text)
            one = {key: list(tally) for key, tally in runs[0].tallies.items()}
            for module in modules:
                module.set_processor(Own())
            unet(x, 500, encoder_hidden_states=text)
            assert runs[0].tallies == {key: [2 * n for n in tally] for key, tally in one.items()}
            modules[0].set_processor(AttnProcessor())
            for _ in range(2):  # and goes on being refused
                with pytest.raises(attnctl.HostError, match="AttnProcessor, which computes"):
                    unet(x, 400, encoder_hidden_states=text)
    finally:
        for module, processor in zip(modules, before, strict=True):
            module.set_processor(processor)


def test_a_bare_denoiser_reads_each_run_by_itself(asked: list[str]) -> None:
    unet = built("sd1").unet
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 12, generator=draw)
    text = torch.randn(1, 10, unet.config.cross_attention_dim, generator=draw)
    runs: list[TokenMaps] = []
    with attnctl.patch(unet, HeatMap(WORDS, runs.append), steps=2) as handle, torch.no_grad():
        for time in (900, 500, 900, 500):
            unet(x, time, encoder_hidden_states=text)
        handle.reset()
        unet(x, 900, encoder_hidden_states=text)
    assert len(runs) == 3 and runs[0].tallies == runs[1].tallies
    assert torch.equal(common(runs[:1]), common(runs[1:2]))
    halves = [[2 * count for count in tally] for tally in runs[2].tallies.values()]
    assert halves == list(runs[0].tallies.values())


def test_a_site_is_asked_again_where_a_text_has_another_length(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = built("sd1").unet
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 12, generator=draw)
    text = torch.randn(1, 12, unet.config.cross_attention_dim, generator=draw)
    runs: list[TokenMaps] = []
    for _ in range(2):
        with attnctl.patch(unet, HeatMap(WORDS, runs.append), steps=4), torch.no_grad():
            for time, length in ((900, 10), (700, 12), (500, 12), (300, 12)):
                unet(x, time, encoder_hidden_states=text[:, :length])
        if len(runs) == 1:
            assert len(asked) == 2 * len(set(asked)) > 0
        monkeypatch.setattr(reading, "column_sums", lambda *given: None)
    assert runs[0].tallies == runs[1].tallies
    torch.testing.assert_close(common(runs[:1]), common(runs[1:]), rtol=1e-4, atol=1e-6)


def test_a_run_that_fails_in_a_watch_leaves_nothing_behind(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, runs, starts = built("sd1"), list[TokenMaps](), list[str]()

    def failing(q: Tensor, k: Tensor, to: Columns, mask: Any, scale: Any) -> Any:
        def add(*call: Any) -> None:
            starts.append("")
            if len(starts) > len(asked):  # not by way of the control
                raise ZeroDivisionError

        return add

    stock = zoo.run(pipe, steps=3)
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
        monkeypatch.setattr(reading, "column_sums", failing)
        with pytest.raises(ZeroDivisionError):
            zoo.run(pipe, steps=3)
        assert LOCAL.run is LOCAL.forward is LOCAL.inside is LOCAL.ref is None
        monkeypatch.setattr(reading, "column_sums", by_map)
        assert torch.equal(zoo.run(pipe, steps=3), stock)
    assert torch.equal(zoo.run(pipe, steps=3), stock)
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
        zoo.run(pipe, steps=3)
    assert torch.equal(common(runs[1:2]), common(runs[2:]))


def test_a_watch_leaves_calls_of_another_kind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "column_sums", by_map)
    q, k, v = tensors(batch=1, tokens=6, keys=4)
    reader = reader_of(HeatMap(), WORDS)
    spans = attnctl.Spans((("image", 0, 6),), (("text", 0, 4),), (1, 2, 3))
    watch = reader.watch(
        attention_call(q, k, v, kind="cross", groups=("cond",), spans=spans, scale=0.5)
    )
    assert watch is not None and watch(q, k, None, 0.5)
    before = reader.maps.sums[Key((1, 2, 3))].clone()
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    for other in (
        (turned, k, None, 0.5), (q.float(), k, None, 0.5), (q, k[:, :, :3], None, 0.5),
        (q, k, mask, 0.5), (q, k, None, None),
    ):  # fmt: skip
        assert not watch(*other)
    assert torch.equal(reader.maps.sums[Key((1, 2, 3))], before) and before.any()


def test_resolutions_are_weighted_by_their_maps_and_stay_in_range() -> None:
    maps = TokenMaps(("a",), (((0,),),))
    maps.add(Key((1, 2, 2)), 1, 0, torch.full((1, 1, 1, 4), 3 * 0.2), 3)
    maps.add(Key((1, 4, 6)), 1, 0, torch.full((1, 1, 1, 24), 0.6), 1)
    got = common([maps])
    assert got.shape == (1, 1, 1, 4, 6)
    torch.testing.assert_close(got, torch.full_like(got, (3 * 0.2 + 0.6) / 4))
    assert common([maps], (5, 7)).shape[-2:] == (5, 7)


# -- pipelines --------------------------------------------------------------------------------


class Whole(attnctl.Control):
    """The oracle: forms every map in full and keeps its columns, by grid."""

    name = "whole"
    kinds = ("cross", "joint")

    def __init__(self) -> None:
        object.__setattr__(self, "found", dict[tuple[int, int, int], list[Tensor]]())

    def attend(self, call: attnctl.AttentionCall) -> Tensor:
        spans, rows = call.spans, call.slice("cond")
        text = spans.keys("text")
        if rows is not None and text is not None:
            whole = oracles.softmax_map(call.q, call.k, call.mask, call.scale)
            mine = whole[rows][:, :, spans.queries("image")]
            words = [mine[..., [text.start + p for p in w]].sum(-1) for w in WORDS.values()]
            by_word = torch.stack(words, dim=2).unflatten(-1, spans.grid)
            self.found.setdefault(spans.grid, []).append(by_word)
        return call.proceed()


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_bit_exact_output_on_every_family(name: str) -> None:
    options = {"batch": 1} if name == "lumina2" else {}
    pipe = built(name)
    stock = zoo.run(pipe, **options)
    runs: list[TokenMaps] = []
    oracle = Whole()
    control = HeatMap(WORDS, runs.append)
    if name in UNKNOWN:
        with pytest.raises(attnctl.HostError, match="select other"), attnctl.patch(pipe, control):
            zoo.run(pipe)
        return
    with attnctl.patch(pipe, control, oracle) as handle:
        assert torch.equal(zoo.run(pipe, **options), stock)
        hit = [line for line in handle.report().lines if line.control is control]
    assert all(line.calls and line.sites_hit == line.sites for line in hit)
    assert len(runs) == len(targets(pipe))
    assert torch.equal(zoo.run(pipe, **options), stock)
    mochi = name == "mochi"  # one row at a time: the calls alternate between the samples
    for grid, parts in oracle.found.items():
        parts = [torch.cat(parts[i::2]).mean(0)[None] for i in (0, 1)] if mochi else parts
        want = torch.cat(parts).mean(1) if mochi else torch.cat(parts, 1).mean(1)
        total = sum(r.sums[Key(grid)] for r in runs)[:, 0]
        counts = sum(r.counts[Key(grid)] for r in runs)[:, None, None]
        got = (total / counts).unflatten(-1, grid)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


ELSEWHERE = [
    pytest.param(name, "cuda", dtype, marks=pytest.mark.gpu)
    for name in ("sd1", "sdxl", "pixart", "sd3", "wan")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "place", "low"), [("sd1", "cpu", torch.bfloat16), *ELSEWHERE])
def test_on_a_gpu_the_output_is_bit_equal_and_the_maps_are_those_of_a_cpu(
    name: str, place: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, randn = zoo.FAMILIES[name].build(), torch.randn

    def drawn(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        """Draw in float32: other types get other numbers, how many depends on the torch."""
        return randn(*size, dtype=torch.float32, **options).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", drawn)

    def run(device: str, dtype: torch.dtype) -> Tensor:
        pipe.to(device, dtype)
        call = zoo.get_family(pipe).call(pipe)  # with a generator of its own
        return pipe(**zoo.placed(call, device, dtype))[0]

    def maps(device: str, dtype: torch.dtype) -> Tensor:
        stock, runs = run(device, dtype), list[TokenMaps]()
        with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
            assert torch.equal(run(device, dtype), stock)
        return common(runs)

    want, got = maps("cpu", torch.float32), maps(place, low)
    close = 2e-2 if low == torch.float32 else 0.1  # convolutions round to TF32
    torch.testing.assert_close(got, want, rtol=close, atol=close * float(want.mean()))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "wan"])
@pytest.mark.parametrize("guided", [True, False])
def test_a_batch_gives_what_each_sample_gives_alone(name: str, guided: bool) -> None:
    pipe = built(name)

    def maps(**options: Any) -> Tensor:
        runs: list[TokenMaps] = []
        with attnctl.patch(pipe, HeatMap(WORDS, runs.append)):
            zoo.run(pipe, cfg=guided, **options)
        return common(runs)

    both, alone = maps(batch=2, num_images=2), maps(batch=1, num_images=1)
    assert both.shape[0] == 4
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-5)


def test_layers_heads_and_steps_are_selected() -> None:
    pipe = built("sd3")
    counts = []
    for options in (
        {},
        {"heads": "L1H0"},
        {"stop": 0.5},
        {"heads": "L0-1", "start": 0.5},
    ):
        runs: list[TokenMaps] = []
        with attnctl.patch(pipe, HeatMap(WORDS, runs.append, **options)):
            zoo.run(pipe)
        counts.append([int(c[0]) for c in runs[0].counts.values()])
    assert counts == [[18], [2], [9], [6]]  # 3 layers of 3 heads, 2 steps


def test_without_a_taker_nothing_is_read() -> None:
    pipe = built("sd1")
    with attnctl.patch(pipe, HeatMap(WORDS)) as handle:
        zoo.run(pipe)
    assert handle.report().calls == 0
    assert str(HeatMap(WORDS, print, stop=0.5)) == f"heatmap(words={WORDS}, stop=0.5)"


def test_the_perturbed_rows_of_other_controls_are_not_read() -> None:
    pipe = built("sd3")
    runs: list[TokenMaps] = []
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append, stop=0.5)):
        zoo.run(pipe)
    with attnctl.patch(pipe, HeatMap(WORDS, runs.append, stop=0.5), attnctl.PAG(scale=1.0)):
        zoo.run(pipe)
    torch.testing.assert_close(common(runs[:1]), common(runs[1:]), rtol=1e-4, atol=1e-6)


def test_all_controls_at_once_with_it() -> None:
    pipe = built("sd1")
    runs: list[TokenMaps] = []
    stack = [HeatMap(WORDS, runs.append), attnctl.PLADIS(lam=1.5), attnctl.SoftPAG(scale=0.3)]
    with attnctl.patch(pipe, *stack) as handle:
        out = zoo.run(pipe)
        assert {x.control.name for x in handle.report().lines if x.calls} == {
            "heatmap", "pladis", "softpag",
        }  # fmt: skip
    with attnctl.patch(pipe, *stack[1:]):
        assert torch.equal(zoo.run(pipe), out)


def test_words_need_a_prompt_and_a_tokenizer() -> None:
    control = HeatMap(["ring"], print)
    pipe = built("sd1")
    with pytest.raises(attnctl.HostError, match="not with emb"), attnctl.patch(pipe, control):
        zoo.run(pipe)
    with pytest.raises(attnctl.HostError, match="no tokenizer"), attnctl.patch(pipe, control):
        pipe("a ring", num_inference_steps=1)


# -- the function ------------------------------------------------------------------------------


@functools.cache
def shipped(name: str) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(assets.path(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPT = "a red circle and a blue square"
CALLS: dict[str, dict[str, Any]] = {
    "tiny-sd": {"num_inference_steps": 8, "guidance_scale": 5},
    "tiny-sd3": {"num_inference_steps": 8, "guidance_scale": 3, "max_sequence_length": 32},
}


@functools.cache
def drawing(name: str) -> attnctl.Heatmaps:
    noise = torch.Generator().manual_seed(3)
    return attnctl.heatmaps(shipped(name), PROMPT, generator=noise, **CALLS[name])


@pytest.fixture(params=list(CALLS))
def drawn(request: pytest.FixtureRequest) -> attnctl.Heatmaps:
    return drawing(request.param)


@pytest.mark.parametrize("name", CALLS)
def test_it_draws_the_same_picture_and_maps_the_concepts(name: str) -> None:
    drawn, noise = drawing(name), torch.Generator().manual_seed(3)
    stock = shipped(name)(PROMPT, generator=noise, **CALLS[name]).images[0]
    assert drawn.images[0][0].tobytes() == stock.tobytes()
    assert list(drawn) == ["red circle", "blue square"]
    assert all(m.shape == (1, 16, 16) and 0 <= m.min() < m.max() <= 1 for m in drawn.values())
    assert drawn.report.calls == 8 * len(
        attnctl.sites(shipped(name)).select(kinds=("cross", "joint"))
    )
    with pytest.raises(attnctl.OptionError, match="Did you mean 'red circle'"):
        drawn["red circl"]


def test_the_maps_sit_on_the_objects(drawn: attnctl.Heatmaps) -> None:
    image = drawn.images[0][0]
    if not world.exact([image], [PROMPT])[0]:
        pytest.skip("this version of the libraries draws another picture")
    pixels = torch.from_numpy(np.array(image)).float()
    for word, channel in (("red circle", 0), ("blue square", 2)):
        others = [c for c in (0, 1, 2) if c != channel]
        inside = pixels[..., channel] > 60 + pixels[..., others].amax(-1)
        heat = torch.nn.functional.interpolate(drawn[word][None], (64, 64), mode="bilinear")[0, 0]
        assert inside.any() and heat[inside].mean() > 1.7 * heat[~inside].mean()


def test_overlays_and_files(drawn: attnctl.Heatmaps, tmp_path: Path) -> None:
    picture = drawn.overlay("red circle")
    assert picture.size == (64, 64) and picture.mode == "RGB"
    grey = drawn.overlay("red circle", strength=0.0)
    assert np.ptp(np.array(grey), axis=-1).max() == 0
    big = drawn.overlay("red circle", image=Image.new("RGB", (96, 48)))
    assert big.size == (96, 48)
    flat = overlay(Image.new("RGB", (8, 8), (9, 9, 9)), torch.full((3, 5), 0.5))
    assert np.ptp(np.array(flat), axis=(0, 1)).max() == 0
    names = [f.name for f in drawn.save(tmp_path / "maps")]
    assert names == ["maps.npz", "000-0-red-circle.png", "000-1-blue-square.png"]
    assert all((tmp_path / "maps" / name).stat().st_size for name in names)


def test_several_prompts_and_images() -> None:
    pipe = shipped("tiny-sd3")
    call = {
        "num_inference_steps": 2, "max_sequence_length": 32, "num_images_per_prompt": 2,
        "output_type": "latent",
    }  # fmt: skip
    prompts = ["a red circle", "a blue square and a small red ring"]
    noise = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = noise[:, : pipe.transformer.config.in_channels]
    both = attnctl.heatmaps(pipe, prompts, ["red"], latents=noise, **call)
    assert both["red"].shape[0] == 4 and not both.images
    for i, prompt in enumerate(prompts):
        at = slice(2 * i, 2 * i + 2)
        one = attnctl.heatmaps(pipe, prompt, ["red"], latents=noise[at], **call)
        torch.testing.assert_close(both["red"][at], one["red"], rtol=1e-3, atol=1e-5)
    with pytest.raises(attnctl.OptionError, match="made no pictures"):
        both.overlay("red")
    with pytest.raises(attnctl.HostError, match="different concepts"):
        attnctl.heatmaps(pipe, prompts, latents=noise, **call)
    with pytest.raises(attnctl.OptionError, match="no step lies between"):
        attnctl.heatmaps(pipe, prompts, ["red"], start=0.5, stop=0.5)


def test_a_video_has_maps_by_frame(tmp_path: Path) -> None:
    pipe = built("wan")
    call = zoo.FAMILIES["wan"].call(pipe) | {"output_type": "np"}
    with torch.no_grad():
        found = attnctl.heatmaps(pipe, None, WORDS, **call)
    assert found["one"].shape == (2, 3, 4, 6)
    assert len(found.images) == 2 and len(found.images[0]) == 9
    assert found.overlay("two", sample=1, frame=2).size == (96, 64)
    assert found.grid_frames == 3
    # a frame of the video gets the nearest map, on the scale of the whole clip
    for number, frame in ((0, 0), (1, 0), (4, 1), (8, 2)):
        picture = found.images[1][number]
        want = overlay(picture, found["two"][1][frame], bounds=limits(found["two"][1]))
        assert found.over_frame("two", number, sample=1).tobytes() == want.tobytes()
    alone = overlay(found.images[1][8], found["two"][1][2])
    assert found.over_frame("two", 8, sample=1).tobytes() != alone.tobytes()
    small = found.images[1][4].resize((24, 16))
    assert found.over_frame("two", 4, 1, small).size == (24, 16)
    names = {file.name for file in found.save(tmp_path)}
    assert {"000-0-one-000.png", "001-1-two-002.png"} < names and len(names) == 1 + 2 * 2 * 3


def limits(heat: Tensor) -> tuple[float, float]:
    return float(heat.min()), float(heat.max())
