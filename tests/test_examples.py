"""The examples run as they are, in fresh processes; the real one differs in the model alone."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNNABLE = sorted(p.name for p in EXAMPLES.glob("*.py") if not p.stem.endswith("_real"))


@pytest.mark.parametrize("name", RUNNABLE)
def test_examples_run_and_write_a_picture(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, "picture.png"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "attention calls at" in " ".join(done.stdout.split())
    with Image.open(tmp_path / "picture.png") as picture:
        wide, high = picture.size
        assert wide >= 128 and high >= 64
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_the_two_line_patch_is_short() -> None:
    assert len((EXAMPLES / "two_line_patch.py").read_text().splitlines()) <= 40


def test_the_real_example_differs_in_the_model_alone() -> None:
    tiny, real = ((EXAMPLES / f"two_line_patch{end}.py").read_text() for end in ("", "_real"))
    compile(real, "two_line_patch_real.py", "exec")
    diff = [d for d in difflib.ndiff(tiny.splitlines(), real.splitlines()) if d[0] in "+-"]
    assert [d[2:].split(" = ")[0] for d in diff] == ["MODEL", "MODEL"]
    assert diff[1][2:] == 'MODEL = "stabilityai/stable-diffusion-3.5-medium"'
