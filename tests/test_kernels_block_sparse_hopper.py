"""The backends for Hopper as far as a machine without a GPU can show: what is compiled, what is
handed over, what is refused. `test_gpu.py` runs them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnctl.kernels import BlockMask, block_sparse_attention
from attnctl.kernels.block_sparse import fa4, gluon
from attnctl.kernels.block_sparse.tiles import Tiles, gluon_stages, tiles_for
from attnctl.testing.blocks import random_blocks, random_map

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")


def compiled(width: int) -> SimpleNamespace:
    """Return the kernel compiled for sm90 for a head dim, without partial blocks."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from attnctl.kernels.block_sparse.gluon_kernel import block_sparse_gluon_kernel as kernel

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    rows = {"q_desc": 64, "k_desc": 128, "v_desc": 128}
    fixed = gluon.constants(width, False)
    signature = {}
    for name in kernel.arg_names:
        if name in rows:
            signature[name] = f"tensordesc<bf16[1, 1, {rows[name]}, {width}],{layout!r}>"
        elif name in fixed:
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = {"Out": "*bf16", "Lse": "*fp32"}.get(name, "*i32")
        else:
            signature[name] = "fp32" if name == "c" else "i32"
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name][0] == "*"]
    attrs = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = GluonASTSource(kernel, signature, fixed, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=gluon.OPTIONS)


def assembly(kernel: Any, tmp_path: Path) -> str:
    """Return the machine code of a compiled kernel as text."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run(
        [tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout


def compiled_plain(width: int, tiles: Tiles, parts: bool) -> Any:
    """Return the plain kernel compiled for sm90 for a head dim, with partial blocks or without."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnctl.kernels.block_sparse.triton import block_sparse_fwd_kernel as kernel

    fixed = {"BLOCK": 128, "BM": tiles.m, "BN": tiles.n, "D": width, "DP": width,
             "DESCRIPTORS": tiles.descriptors, "PARTS": parts, "STAGES": tiles.stages}  # fmt: skip
    loaded = f"tensordesc<bf16[1, 1, {tiles.n}, {width}]>" if tiles.descriptors else "*bf16"
    types = {
        "K": loaded,
        "V": loaded,
        "Q": "*bf16",
        "Out": "*bf16",
        "Lse": "*fp32",
        "scale": "fp32",
    }
    signature = {}
    for name in kernel.arg_names:
        other = "*i32" if name[0].isupper() else "i32"
        signature[name] = "constexpr" if name in fixed else types.get(name, other)
    even = [i for i, name in enumerate(kernel.arg_names)
            if signature[name][0] == "*" or name[:2] in ("sq", "sk", "sv", "so")]  # fmt: skip
    attrs = {(i,): [["tt.divisibility", 16]] for i in even}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
    source = ASTSource(kernel, signature, fixed, attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


not_compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"
)


@not_compiled
@pytest.mark.parametrize("width", [64, 128])
def test_two_programs_of_the_plain_kernel_share_a_multiprocessor(width, tmp_path):
    """One computes weights while the other's products run: there is no overlap within one."""
    tiles = tiles_for(width, 128, torch.bfloat16, "sm90")
    kernel = compiled_plain(width, tiles, False)
    for made in (kernel, compiled_plain(width, tiles, True)):
        assert 2 * (made.metadata.shared + 1024) <= 228 * 1024
    assert 2 * tiles.warps * 32 * 255 <= 2**16
    code = assembly(kernel, tmp_path).splitlines()
    copies = [i for i, line in enumerate(code) if "UTMALDG" in line]
    products = [i for i, line in enumerate(code) if "HGMMA" in line]
    main = code[products[0] : next(i for i in copies if i > products[0])]
    assert sum("MUFU.EX2" in line for line in main) >= tiles.m * tiles.n / tiles.warps / 32
    assert not any("LDL" in line or "STL" in line for line in main)  # nothing spilled


@not_compiled
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_for_hopper_with_its_overlap(width, tmp_path):
    kernel = compiled(width)
    assert kernel.metadata.shared <= 227 * 1024  # what a block may have
    text = assembly(kernel, tmp_path)
    assert "HGMMA.64x128x16" in text and "UTMALDG.4D" in text
    # the weights are made between the wait for the logits and the wait for the values
    marks = re.findall(r"DEPBAR\.LE gsb0, 0x[01]|MUFU\.EX2", text)
    between = "".join("e" if "EX2" in m else m[-1] for m in marks)
    assert len(re.findall(r"1e{64,}0", between)) == 2
    assert "LDL" not in text and "STL" not in text  # nothing spilled


def test_flash_attention_gets_padded_lists():
    mask = random_blocks(500, 700, 128, 2, 3)
    counts, indices = fa4._tables(mask.lists)
    keep = mask.blocks()
    assert counts.dtype == indices.dtype == torch.int32
    assert torch.equal(counts.long(), keep.sum(-1))
    again = torch.zeros_like(keep)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        b, h, r = at
        again[b, h, r, indices[b, h, r, : counts[b, h, r]].long()] = True
    assert torch.equal(again, keep)
    assert fa4._tables(mask.lists)[0] is counts


def on_hopper(width: int, dtype: torch.dtype) -> SimpleNamespace:
    return SimpleNamespace(
        device=SimpleNamespace(type="cuda", index=0), shape=(1, 1, 256, width), dtype=dtype
    )


def test_what_they_cannot_do_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fa4, "_installed", lambda: True)
    full, small = BlockMask.full(256, 256), BlockMask.full(256, 256, 64)
    part = BlockMask.from_dense(random_map(256, 256), 128)
    bf16 = torch.bfloat16
    cases = [
        (gluon, 128, bf16, small, "blocks of 128, got 64"),
        (gluon, 96, bf16, full, "head dim 64 or 128"),
        (gluon, 64, torch.float32, full, "got torch.float32"),
        (fa4, 128, bf16, small, "blocks of 64"),
        (fa4, 128, bf16, part, "of them partial"),
        (fa4, 64, torch.float32, full, "got torch.float32"),
        (fa4, 32, bf16, full, "head dim 64 or 128"),
        (fa4, 64, bf16, full, None),
    ]
    for backend, width, dtype, mask, message in cases:
        x = on_hopper(width, dtype)
        reason = backend.why_not(x, x, x, mask)
        assert reason is None if message is None else message in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    x = on_hopper(64, bf16)
    assert "sm80" in gluon.why_not(x, x, x, full) and "sm80" in fa4.why_not(x, x, x, full)


def test_a_probe_that_fails_is_a_reason_not_an_error():
    gluon._probe.cache_clear()
    reason = gluon._probe(0, torch.bfloat16, 64)  # there is no GPU here, or it is no cuda:0
    if not torch.cuda.is_available():
        assert reason.startswith("its kernel does not compile here (")
    gluon._probe.cache_clear()


@pytest.mark.parametrize(("width", "chosen"), [(64, "gluon"), (96, "triton")])
def test_on_hopper_the_backend_is_chosen_in_one_graph(width, chosen, monkeypatch):
    """Tensors of a GPU that is not there: what is asked while torch.compile traces is real."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(gluon, "_probe", lambda *_: None)
    mask, graphs = random_blocks(300, 517, 128), []

    def backend(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    def step(q, k, v):
        return block_sparse_attention(q * 2, k, v, mask) + 1

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 2, 300, width, device="cuda", dtype=torch.bfloat16)
        k = v = torch.empty(1, 2, 517, width, device="cuda", dtype=torch.bfloat16)
        out = torch.compile(step, fullgraph=True, backend=backend)(q, k, v)
    assert out.shape == q.shape and len(graphs) == 1
    (node,) = [n for n in graphs[0].nodes if str(n.target) == "attnctl.block_sparse_attention"]
    assert node.args[-1] == chosen
    assert set(gluon_stages()) == set(gluon.WIDTHS)


def test_unsuited_strides_are_copied_for_the_copy_engine():
    x = torch.zeros(2, 3, 40, 64, dtype=torch.bfloat16)
    assert gluon._describable(x) and gluon._describable(x.transpose(1, 2))
    assert not gluon._describable(x.transpose(2, 3))
    assert not gluon._describable(x[..., 1:])
    assert not gluon._describable(torch.zeros(1, 1, 40, 65).bfloat16()[..., :64])
    assert not gluon._describable(x[:1].expand(2, 3, 40, 64))
