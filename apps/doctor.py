"""The command `attnctl doctor`: what is installed, what can run here, and if not, why."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

from packaging.requirements import Requirement

from .tables import paragraph, terminal_width

__all__ = ["doctor", "missing"]

NOT_SHOWN = ("dev",)
"""Extras for work on attnctl itself."""


def doctor() -> str:
    """Return the findings, a section each for packages, extras, devices and backends."""
    sections = {
        f"attnctl {importlib.metadata.version('attnctl')}": _system(),
        "packages": _packages(),
        "extras": _extras(),
        "devices": _devices(),
        "block-sparse attention": _backends(),
        "shipped models": _models(),
    }
    width = terminal_width()
    return "\n\n".join(
        "\n".join([head, *(paragraph(line, width, "  ", "    ") for line in lines)])
        for head, lines in sections.items()
    )


def missing() -> list[str]:
    """Return what attnctl needs and what is not there or too old, in words."""
    return [text for need in _needs(None) if (text := _why_not(need))]


def _system() -> Iterator[str]:
    yield f"Python {platform.python_version()}, {platform.platform()}"


def _needs(extra: str | None) -> list[Requirement]:
    """Return the requirements of attnctl itself, or of one of its extras."""
    found = map(Requirement, importlib.metadata.requires("attnctl") or ())
    return [need for need in found if _holds(need, extra)]


def _holds(need: Requirement, extra: str | None) -> bool:
    """Whether a requirement is one of this extra's; without an extra, of the core's."""
    if need.marker is None:
        return extra is None
    if extra is None:
        return need.marker.evaluate({"extra": ""})
    return need.marker.evaluate({"extra": extra}) and not need.marker.evaluate({"extra": ""})


def _why_not(need: Requirement) -> str | None:
    """Return why a requirement is not met, None if it is."""
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{need.name} is not installed"
    if need.specifier.contains(version, prereleases=True):
        return None
    return f"{need.name} {version} does not fit: {need.specifier} is needed"


def _packages() -> Iterator[str]:
    for need in _needs(None):
        yield _why_not(need) or f"{need.name} {importlib.metadata.version(need.name)}"


def _extras() -> Iterator[str]:
    for extra in importlib.metadata.metadata("attnctl").get_all("Provides-Extra") or ():
        if extra not in NOT_SHOWN:
            reasons = [text for need in _needs(extra) if (text := _why_not(need))]
            names = ", ".join(need.name for need in _needs(extra))
            how = f"no: {'; '.join(reasons)} (pip install 'attnctl[{extra}]')"
            yield f"{extra}: {how if reasons else f'yes ({names})'}"


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        yield (
            f"cuda:{index} {found.name}, sm{found.major}{found.minor}, {free:.1f} of "
            f"{total:.1f} GiB free"
        )
    if not torch.cuda.device_count():
        built = torch.version.cuda
        why = f"torch, built for CUDA {built}, sees no GPU" if built else "torch is a CPU build"
        yield f"no cuda: {why}"


def _backends() -> Iterator[str]:
    """Ask each backend about a call of common shape: heads of 64, and half precision on a GPU."""
    import torch

    from attnctl.kernels import BlockMask
    from attnctl.kernels.block_sparse.api import BACKENDS

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    q = torch.zeros(1, 1, 128, 64, device=device, dtype=dtype)
    mask = BlockMask.full(128, 128)
    for name, why_not in BACKENDS.items():
        reason = why_not(q, q, q, mask)
        yield f"{name}: {'yes' if reason is None else f'no: {reason}'}"


def _models() -> Iterator[str]:
    from attnctl import assets

    yield ", ".join(assets.names()) or "none in this installation"
