"""`attnctl doctor` tells what is there and why the rest is not."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
import torch

from attnctl.apps import cli, doctor
from attnctl.kernels.block_sparse.api import BACKENDS

REQUIRES = ["torch>=2.6", "absent-package", "av>=99 ; extra == 'video'", "mypy; extra == 'dev'",
            "tomli; python_version < '3'", "numpy; extra == 'viz'"]  # fmt: skip


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_everything_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 80
    assert f"  torch {torch.__version__}\n" in out
    for name, why_not in BACKENDS.items():
        assert re.search(rf"^  {name}: (yes|no: .+)$", out, re.MULTILINE), why_not
    assert "tiny-sd3" in out
    if not torch.cuda.is_available():
        assert "no cuda: torch" in out


def test_what_is_missing_or_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"av": "18.1", "torch": "2.5", "attnctl": "0.1.0", "numpy": "2.0"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.missing() == [
        "torch 2.5 does not fit: >=2.6 is needed",
        "absent-package is not installed",
    ]
    assert cli.run(["doctor"]) == 1
    out = capsys.readouterr().out
    video = "  video: no: av 18.1 does not fit: >=99 is needed (pip install 'attnctl[video]')"
    assert video in out.replace("\n    ", " ")
    assert "  viz: yes (numpy)" in out
    assert "mypy" not in out and "tomli" not in out
