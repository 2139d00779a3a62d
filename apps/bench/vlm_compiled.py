"""What controls cost a decoder that `generate` compiles, side by side in one run.

    python -m attnctl.apps.bench.vlm_compiled --model llava-1.5-7b --out compiled.json

The models, prompts and controls of `vlm_cost`, with a static cache: `generate` compiles the call
for a written token and replays it as a CUDA graph. Every arm has a model of its own around the
same weights, so that none compiles again; every round runs all arms in an order of its own. A
token's time is the median of a round's; ratios are medians of the rounds, each to stock in the
same round, with the 95 % bootstrap interval. The arms:

- stock: compiled;
- pai, var: patched and compiled;
- eager: stock with a growing cache, which is never compiled;
- pai_eager, var_eager: patched, with a growing cache.

Compiled and eager logits of the same arm are compared, over the tokens up to the first on which
they differ; beside that, how far the control moves the logits.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

import attnctl

from . import vlm_cost
from .statistics import median_interval

__all__ = ["measure"]

ARMS = ("stock", "pai", "var", "eager", "pai_eager", "var_eager")


class _Stamps(LogitsProcessor):
    """Notes when each token's logits are there, on the device's own clock; changes nothing."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.at = cuda, []  # type: tuple[bool, list[Any]]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores."""
        if self.cuda:
            self.at.append(torch.cuda.Event(enable_timing=True))
            self.at[-1].record()
        else:
            self.at.append(time.perf_counter())
        return scores

    def milliseconds(self) -> list[float]:
        """Return the time of each token after the first."""
        if not self.cuda:
            return [1e3 * (b - a) for a, b in zip(self.at, self.at[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.at, self.at[1:], strict=False)]


def twin(model: Any) -> Any:
    """Return a second model around the same weights."""
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in kept})


def settings(compiled: bool, backend: str) -> dict[str, Any]:
    """Return the arguments of `generate` that decide whether it compiles.

    Args:
        compiled: whether to.
        backend: of torch.compile; the CPU has no CUDA graphs, and compiles only when told to.
    """
    if not compiled:
        return {}
    how: dict[str, Any] = {"cache_implementation": "static"}
    if backend != "default":
        how["compile_config"] = CompileConfig(backend=backend, mode=None)
        how["compile_config"]._compile_all_devices = True
    return how


@torch.inference_mode()
def written(
    model: Any, inputs: dict[str, Tensor], tokens: int, how: dict[str, Any], *, logits: bool
) -> tuple[list[float], Tensor, Tensor | None]:
    """Return the milliseconds of each token, the tokens and, if wanted, their logits."""
    stamps, length = _Stamps(model.device.type == "cuda"), tokens + 1
    out = model.generate(
        **inputs, min_new_tokens=length, max_new_tokens=length, do_sample=False,
        output_logits=logits, return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([stamps]), **how,
    )  # fmt: skip
    ids = out.sequences[:, -length:]
    return stamps.milliseconds(), ids, torch.stack(out.logits, 1) if logits else None


def measure(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    tokens: int,
    rounds: int,
    only: Sequence[str] = ARMS,
    seconds: float = float("inf"),
    backend: str = "default",
) -> dict[str, Any]:
    """Return times of every arm, their ratios to stock, and how far logits differ.

    Args:
        model: the model.
        inputs: the prompt.
        tokens: to write.
        rounds: timed rounds, after those that compile.
        only: names of the arms; stock is always one.
        seconds: no round begins after so many, but for the first three; after half of them no
            arm is compiled any more, but for stock and one other, and is left out.
        backend: of torch.compile, "default" for what `generate` takes by itself.
    """
    start = time.perf_counter()
    names = [name for name in ARMS if name == "stock" or name in only]
    stacks = vlm_cost.arms()
    models: dict[str, Any] = {}
    for name in names:
        models[name] = twin(model) if name != "stock" else model
        stack = stacks[name.split("_")[0]]
        if stack:
            attnctl.patch(models[name], *stack)
    how = {name: settings("eager" not in name, backend) for name in names}
    first: dict[str, float] = {}
    logits: dict[str, tuple[Tensor, Any]] = {}
    for name in [*names]:
        if len(first) > 1 and how[name] and time.perf_counter() - start > seconds / 2:
            names.remove(name)  # it would still compile when all time is spent
            continue
        begun = time.perf_counter()
        _, ids, z = written(models[name], inputs, tokens, how[name], logits=True)
        first[name], logits[name] = time.perf_counter() - begun, (ids, z)
        written(models[name], inputs, tokens, how[name], logits=False)
        print(f"{name}: first {first[name]:.1f} s", flush=True)
    spent: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn > 2 and time.perf_counter() - start > seconds:
            break
        random.Random(turn).shuffle(names)
        for name in names:
            times, _, _ = written(models[name], inputs, tokens, how[name], logits=False)
            spent[name].append(times)
    found = _figures({name: spent[name] for name in ARMS if name in spent}, first)
    for name, figures in found.items():
        eager = "eager" if name == "stock" else f"{name}_eager"
        if eager in logits:
            figures["logits, largest difference to eager"] = _apart(logits[name], logits[eager])
        if eager in logits and "eager" in logits and name != "stock":
            figures["logits, largest effect"] = _apart(logits[eager], logits["eager"])
    return found


def _apart(a: tuple[Tensor, Any], b: tuple[Tensor, Any]) -> float:
    """Return the largest difference of logits, up to the first token that differs."""
    same = (a[0] == b[0]).all(dim=0).int().cumprod(0).sum()
    upto = min(int(same) + 1, a[0].shape[1])
    return float((a[1][:, :upto].float() - b[1][:, :upto].float()).abs().max())


def _figures(spent: dict[str, list[list[float]]], first: dict[str, float]) -> dict[str, Any]:
    tokens = {name: [statistics.median(t) for t in rounds] for name, rounds in spent.items()}
    totals = {name: [sum(t) for t in rounds] for name, rounds in spent.items()}
    found: dict[str, Any] = {}
    for name in spent:
        ratio = median_interval(np.array(tokens["stock"]) / np.array(tokens[name]))
        whole = median_interval(np.array(totals["stock"]) / np.array(totals[name]))
        found[name] = {
            "token_ms": round(statistics.median(tokens[name]), 4),
            "token_ms, least": round(min(tokens[name]), 4),
            "tokens_per_second / stock": round(ratio.value, 4),
            "tokens_per_second / stock, interval": [round(ratio.low, 4), round(ratio.high, 4)],
            "all tokens / stock": round(whole.value, 4),
            "all tokens / stock, interval": [round(whole.low, 4), round(whole.high, 4)],
            "first_generate_s": round(first[name], 2),
            "rounds_token_ms": [round(one, 4) for one in tokens[name]],
            "rounds_total_ms": [round(one, 3) for one in totals[name]],
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=vlm_cost.MODELS, default="small")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--tokens", type=int, default=32, help="to write")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to spend on rounds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--backend", default="default", help="of torch.compile")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    dtype = getattr(torch, given.dtype or ("bfloat16" if cuda else "float32"))
    shape = vlm_cost.MODELS[given.model]
    if given.layers:
        shape = dataclasses.replace(shape, text={**shape.text, "num_hidden_layers": given.layers})
    model = vlm_cost.build(shape, device, dtype)
    measured = measure(
        model, vlm_cost.prompt(shape, given.batch, device), tokens=given.tokens,
        rounds=given.rounds, only=given.arms.split(","), seconds=given.seconds,
        backend=given.backend,
    )  # fmt: skip
    facts = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "backend": given.backend,
        "layers": model.config.text_config.num_hidden_layers,
        "image_tokens": shape.tokens,
        "batch": given.batch,
        "written_tokens": given.tokens,
    }
    versions = {"torch": torch.__version__, "transformers": version("transformers")}
    named = {"bench": "vlm_compiled", "model": given.model}
    text = json.dumps(named | versions | facts | {"arms": measured}, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
