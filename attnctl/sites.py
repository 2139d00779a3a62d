"""The attention sites of a model, as a list that selects and prints itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .records import Site
from .selectors import Selection, select

__all__ = ["Sites", "sites"]


class Sites(list[Site]):
    """The sites of one target, in execution order."""

    def select(
        self,
        spec: str | Iterable[str | tuple[int, int]] = "all",
        kinds: Iterable[str] = ("self", "cross", "joint", "text", "causal", "other"),
    ) -> Selection:
        """Return the heads that a selector names (grammar: `attnctl.selectors`)."""
        return select(spec, self, tuple(kinds))

    def heads(self, kinds: Iterable[str] = ("self", "joint")) -> list[tuple[int, int]]:
        """Return all (layer, head) pairs of the numbered sites of these kinds."""
        wanted = tuple(kinds)
        return [
            (s.layer, h)
            for s in self
            if s.layer is not None and s.kind in wanted
            for h in range(s.heads)
        ]

    def __str__(self) -> str:
        lines = [f"{'layer':>5}  {'kind':<6}  {'heads':>5}  {'dim':>4}  name"]
        for s in self:
            layer = "-" if s.layer is None else f"L{s.layer}"
            lines.append(f"{layer:>5}  {s.kind:<6}  {s.heads:>5}  {s.head_dim:>4}  {s.name}")
        return "\n".join(lines)


def sites(target: Any) -> Sites:
    """List the attention sites of a pipeline, denoiser or vision-language model.

    Args:
        target: a diffusers pipeline or denoiser module, or a model of transformers.

    Raises:
        HostError: if it has none, or is of a type that cannot be patched.
    """
    from .hosts import find_sites

    return find_sites(target)
