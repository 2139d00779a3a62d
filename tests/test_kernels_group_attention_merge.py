"""Split keys are merged in the same launch: what the machine code does, compiled without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled"
)


def compiled(move: bool) -> Any:
    """Return the kernel of a written token, its keys split, compiled for sm90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnctl.kernels.group_attention import triton as ours

    kernel = ours.edited_rows_kernel
    fixed = {"MOVE": move, "ALONE": True, "CAUSAL": False, "MASK": 0, "SPLIT": True, "GROUP": 7,
             "SOME": False, "D": 128, "DP": 128, "BM": ours.MOST_ROWS, "BN": ours.KEYS,
             "UNROLL": ours.UNROLL}  # fmt: skip
    types = dict.fromkeys(("strength", "rho", "least", "scale"), "fp32")
    types |= dict.fromkeys(("Q", "K", "V", "Out"), "*bf16") | {"Parts": "*fp32"}
    types |= dict.fromkeys(("Codes", "Heads", "Mask"), "*u8")
    signature = {}
    for name in kernel.arg_names:
        other = "*i32" if name[0].isupper() else "i32"
        signature[name] = "constexpr" if name in fixed else types.get(name, other)
    even = [i for i, name in enumerate(kernel.arg_names)
            if name in ("Q", "K", "V", "Out", "Parts", "Counts")
            or name[:2] in ("sq", "sk", "sv", "so")]  # fmt: skip
    attrs = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature, fixed, attrs)
    options = {"num_warps": ours.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def assembly(kernel: Any, folder: Path) -> list[str]:
    """Return the instructions of a compiled kernel."""
    import triton.backends.nvidia as nvidia

    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    command = [str(tool), "-sass", str(folder / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("move", [False, True], ids=["raise", "move"])
def test_a_program_says_it_is_done_after_its_part_is_written(move: bool, tmp_path: Path) -> None:
    """Write; barrier; fence and count by one thread; forget L1; barrier; read past L1."""
    code = assembly(compiled(move), tmp_path)
    marks = {"STG": "w", "BAR.SYNC": "b", "MEMBAR.ALL.GPU": "f", "ATOMG": "c", "CCTL.IVALL": "i",
             "LDG.E.STRONG.GPU": "r", "LDG.E.128.STRONG.GPU": "r"}  # fmt: skip
    order = "".join(mark for line in code for word, mark in marks.items() if f" {word}" in line)
    assert re.search(r"w+b+fcib+w*r+", order) and order.count("c") == 1
    counts = [line for line in code if "ATOMG" in line]
    assert "ADD.STRONG.GPU" in counts[0]
    before, after = order.split("c")
    assert "r" not in before and "w" in after  # nothing is read early, and the row is written
    inside, spilled = spills(code)
    # some registers wait in memory while the loop over keys runs; none goes there within
    assert not inside and spilled <= 16


def spills(code: list[str]) -> tuple[list[str], int]:
    """Return what the loop over keys reads and writes of spilled registers, and how many waits.

    The loop is what a jump back goes over that has tensor core instructions.
    """
    lines = [re.search(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", line) for line in code]
    steps = [(int(line[1], 16), line[2]) for line in lines if line]
    loops = []
    for at, step in steps:
        jump = re.search(r"\bBRA (?:.*, )?(0x[0-9a-f]+)", step)
        if jump and int(jump[1], 16) < at:
            body = [one for place, one in steps if int(jump[1], 16) <= place <= at]
            loops += [body] if any("HMMA" in one for one in body) else []
    (loop,) = loops
    waits = [one for _, one in steps if re.search(r"\b(LDL|STL)\b", one)]
    return [one for one in loop if one in waits], len(waits)
