"""Several GPUs: diffusers' context parallelism, where each process holds a part of the tokens.

With Ulysses the processes exchange tokens for heads around each self-attention, so that each has
all tokens of some of the heads. Controls that are right for a part of the heads say so
(`Control.context_parallel`), and their stack runs inside that exchange; all others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import HostError

if TYPE_CHECKING:
    from ..stack import Entry

__all__ = ["attend_whole", "check_parallel", "parallelism"]

Whole = Callable[..., Tensor]
"""(q, k, v, mask, scale, is_causal, gqa, part) -> out on all tokens, in layout [B, N, h, D]."""


def parallelism(module: nn.Module) -> str:
    """Return how a denoiser is spread over processes: "" if it is not.

    One of "ulysses", "ring", "ulysses and ring" (context parallelism) and "tensor".
    """
    config = getattr(module, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is not None:
        degrees = {"ulysses": context.ulysses_degree, "ring": context.ring_degree}
        return " and ".join(name for name, degree in degrees.items() if degree > 1)
    return "tensor" if getattr(config, "tensor_parallel_config", None) is not None else ""


def check_parallel(module: nn.Module, entries: Iterable[Entry], compiled: bool) -> None:
    """Refuse controls that would see a part of the tokens or heads without knowing it.

    Args:
        module: the denoiser.
        entries: controls on it.
        compiled: whether it is called through `torch.compile(denoiser)`.

    Raises:
        HostError: naming the control, and what to do.
    """
    kind = parallelism(module)
    if not kind:
        return
    compiled = compiled or any(m._compiled_call_impl is not None for m in module.modules())
    for entry in entries:
        if entry.control.neutral:
            continue
        if compiled:
            raise HostError(
                f"{entry.control} cannot act on a {type(module).__name__} that is compiled and "
                f"under {kind} parallelism: leave torch.compile or the parallelism out"
            )
        if kind != "ulysses":
            raise HostError(
                f"{entry.control} cannot act on a model under {kind} parallelism, where no "
                "process has all tokens of a head: use ContextParallelConfig(ulysses_degree=...) "
                "alone, or leave the control out"
            )
        if not entry.control.context_parallel:
            raise HostError(
                f"{entry.control} cannot act on a model under context parallelism, where a "
                "process sees a part of the tokens or heads only: leave the control or the "
                "parallelism out. Controls that are made for it have context_parallel = True "
                "(radial)"
            )
        for index in entry.selection:
            if entry.sites[index].kind != "self":
                raise HostError(
                    f"{entry.control} cannot act on the {entry.sites[index].kind} attention "
                    f"{entry.sites[index]} under context parallelism, which changes the order of "
                    "image and text tokens: choose self-attention, or leave the parallelism out"
                )


def attend_whole(
    stack: Whole,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool,
    gqa: bool,
    config: Any,
) -> Tensor:
    """Run a stack on all tokens of this process's heads; diffusers does the exchange around it.

    Args:
        stack: what to run; it is told which heads of the site it has.
        q: this process's tokens, [B, n, H, D].
        k: the same of the keys.
        v: the same of the values.
        mask: as the processor gave it.
        scale: factor on the logits.
        is_causal: as in scaled_dot_product_attention.
        gqa: whether keys may have fewer heads.
        config: diffusers' ParallelConfig.

    Returns:
        The output for this process's tokens, all heads.
    """
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    context = config.context_parallel_config
    # the last process has fewer heads where they cannot be shared out evenly
    each = -(-q.shape[2] // context.ulysses_degree)
    first = context._ulysses_local_rank * each

    def inside(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float,
        causal: bool, scale: float | None, gqa: bool, lse: bool = False, **more: Any,
    ) -> Tensor:  # fmt: skip
        return stack(q, k, v, mask, scale, causal, gqa, slice(first, first + q.shape[2]))

    out: Tensor = _templated_context_parallel_attention(
        q, k, v, mask, 0.0, is_causal, scale, gqa, False,
        forward_op=inside, backward_op=_no_gradient, _parallel_config=config,
    )  # fmt: skip
    return out


def _no_gradient(ctx: Any, grad: Tensor) -> Any:
    raise HostError(
        "a patched denoiser has no gradient under context parallelism: call it under "
        "torch.no_grad(), or leave the parallelism out"
    )
