"""The package: every folder is listed, files travel, and nothing heavy is imported early."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "attnctl": "attnctl",
    "processors": "attnctl.processors",
    "kernels": "attnctl.kernels",
    "apps": "attnctl.apps",
    "assets": "attnctl.assets",
}


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=300,
    )


def test_every_package_folder_is_listed() -> None:
    """A package missing from the list is left out of the wheel without an error."""
    found = set()
    for top, name in FOLDERS.items():
        for init in (ROOT / top).rglob("__init__.py"):
            if any(p.is_symlink() for p in init.parents if ROOT in p.parents):
                continue
            parts = init.parent.relative_to(ROOT / top).parts
            found.add(".".join([name, *parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_data_files_travel_with_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "-q",
         "egg_info", "--egg-base", str(tmp_path),
         "build_py", "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    built = tmp_path / "lib" / "attnctl"
    assert (built / "py.typed").is_file()
    for preset in (ROOT / "attnctl/presets").glob("*.toml"):
        assert (built / "presets" / preset.name).is_file()
    for weights in (ROOT / "assets").rglob("*.safetensors"):
        assert (built / "assets" / weights.relative_to(ROOT / "assets")).is_file()


BLOCK = """
import sys
class Hide:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","): return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""
HEAVY = "diffusers,transformers,accelerate,triton,torchvision,gradio,PIL,typer,tqdm,peft,av"


def test_the_core_needs_torch_alone() -> None:
    code = BLOCK + (
        "import attnctl, attnctl.kernels\n"
        "assert len(attnctl.controls()) >= 9\n"
        "print(attnctl.SoftPAG(u=0.25))\n"
    )
    done = run(code, HEAVY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "softpag(u=0.25)"


def test_generation_works_without_optional_packages() -> None:
    code = BLOCK + (
        "import attnctl\n"
        "from attnctl.testing import zoo\n"
        "pipe = zoo.FAMILIES['sd3'].build()\n"
        "with attnctl.patch(pipe, attnctl.SoftPAG()) as handle: zoo.run(pipe)\n"
        "print(handle.report().calls)\n"
    )
    done = run(code, "accelerate,triton,torchvision,gradio,peft,av")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "6"


def test_importing_the_core_is_light() -> None:
    code = (
        "import sys, attnctl\n"
        "print([m for m in ('diffusers', 'transformers', 'triton', 'PIL') if m in sys.modules])\n"
    )
    done = run(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_version_is_the_project_version() -> None:
    import attnctl

    assert attnctl.__version__ == PROJECT["project"]["version"]


def test_an_extra_brings_what_it_is_named_for() -> None:
    """Who is told to install an extra must get the missing package by it."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = set()
    for top in FOLDERS:
        for path in (ROOT / top).rglob("*.py"):
            named |= set(re.findall(r'MissingExtra\("(\w+)", "(\w+)"', path.read_text()))
    assert {extra for _, extra in named} == {"demo", "eval", "video"}
    for package, extra in named:
        brought = {re.split(r"[<>=;!]", one)[0].strip() for one in extras[extra]}
        assert package.replace("_", "-") in brought, (package, extra)
    assert len({package for package, extra in named if extra == "eval"}) == len(extras["eval"])
