"""Writes `docs/performance.md` from the files in `docs/measured/` that benches wrote.

Run `python docs/make_performance.py` after putting a file there; a test compares the page with
`page()`. To add figures of another machine, run one of the commands the page names and put its
JSON file into the folder: nothing is typed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "performance.md"
MEASURED = Path(__file__).parent / "measured"
INTRO = """\
# Performance

Written by `docs/make_performance.py` from the JSON files in `docs/measured/`, each as the bench
wrote it; do not edit by hand. Times are medians of runs in turn on one machine. What a control
does to pictures stands under [measured effects](effects.md), what it costs in rows and passes on
its own page.
"""

PAIRS = (("gluon", "flex"), ("triton", "flex"), ("gluon", "fa4"), ("gluon", "triton"))
"""Backends of block-sparse attention that are compared in a sentence."""

VLM_ARMS = ("pai", "var")
VLM_GOALS = {
    "prefill_ms": ("prompt", 1.05, -1),
    "tokens_per_second": ("written tokens", 0.97, 1),
    "peak_gib": ("peak memory", 1.02, -1),
}
"""What controls of a decoder may cost, over stock: at most (-1) or at least (1) so much."""

Data = dict[str, Any]


def page() -> str:
    """Return the page.

    Raises:
        ValueError: if a file is of no known bench.
    """
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(_files())}
    parts = [INTRO]
    for bench, (title, text, table) in BENCHES.items():
        mine = {path: data for path, data in files.items() if kind(path, data) == bench}
        if mine:
            parts += [f"## {title}\n", text]
            parts += [f"{table(d)}\n{_sources(p)}\n" for p, d in mine.items()]
    return "\n".join(parts)


def _sources(path: Path) -> str:
    """Return the name of the file, and the picture of the same name where the bench drew one."""
    picture = path.with_suffix(".png")
    shown = f"![Time by the cases above](measured/{picture.name})\n\n" if picture.exists() else ""
    return f"{shown}File: `docs/measured/{path.name}`."


def _files() -> list[Path]:
    return list(MEASURED.glob("*.json"))


def kind(path: Path, data: Data) -> str:
    """Return which bench wrote a file."""
    found = data.get("bench", "cost" if "with CFG" in data else None)
    if found not in BENCHES:
        known = ", ".join(BENCHES)
        raise ValueError(f"{path}: bench is {found!r}, expected one of {known}")
    return str(found)


def cost(data: Data) -> str:
    """Return the table of `attnctl.apps.bench.cost`."""
    head = ("", "stock, ms", "neutral", "waiting", "SoftPAG, all heads", "one head a layer")
    rows = []
    for how in ("with CFG", "without CFG"):
        ratios = list(data[how]["ratios"].values())
        low, high = data[how]["quartiles"]["stock"]
        stock = f"{data[how]['milliseconds']['stock']:.1f} ({low:.1f} to {high:.1f})"
        rows.append([how, stock, *(f"{ratio:.3f}" for ratio in ratios[:4])])
    compiled = ", compiled" if data["compiled"] else ""
    where = f"**{data['model']}** on {data['device']}, torch {data['torch']}{compiled}"
    return f"{where}\n\n{_table(head, rows)}"


def attention(data: Data) -> str:
    """Return the table of `attnctl bench attention`."""
    head = (
        "case", "tokens", "kept", "backend", "ms", "TFLOP/s", "times dense", "error", "1st s",
        "extra MiB",
    )  # fmt: skip
    rows = [
        [
            row["case"], str(row["tokens"]), f"{row['density']:.3f}", row["backend"],
            f"{row['ms']:.2f}", f"{row['tflops']:.3g}", f"{row['speedup']:.2f}",
            "" if row["error"] is None else f"{row['error']:.2f}", f"{row['first_s']:.1f}",
            "" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
        ]
        for row in data["rows"]
        if row["ms"] is not None
    ]  # fmt: skip
    left = [f"{r['case']}, {r['backend']}: {r['why_not']}" for r in data["rows"] if r["why_not"]]
    slopes = ", ".join(f"{name} {slope:.2f}" for name, slope in data["slopes"].items())
    notes = [f"Time grows with the number of frames to the power: {slopes}.\n"] if slopes else []
    pairs = [p for p in (_pair(data["rows"], *names) for names in PAIRS) if p]
    notes += (
        [f"Times faster, least to most over the cases: {'; '.join(pairs)}.\n"] if pairs else []
    )
    notes += [f"Not timed: {'; '.join(left)}.\n"] if left else []
    costs = [
        [
            m["case"], str(m["blocks"]), f"{m['cold_ms']:.1f}", f"{m['warm_ms']:.3f}",
            f"{m['kib']:.0f}",
        ]
        for m in data["masks"]
    ]  # fmt: skip
    masks = _table(("mask", "blocks a side", "built, ms", "again, ms", "KiB"), costs)
    return "\n".join([f"**{data['machine']}**\n\n{_table(head, rows)}", *notes, masks])


def _pair(rows: list[Data], one: str, other: str) -> str:
    """Return how many times faster one backend is than another, "" if they have no case."""
    ms = {(row["case"], row["backend"]): row["ms"] for row in rows if row["ms"] is not None}
    cases = [case for case, backend in ms if backend == one and (case, other) in ms]
    ratios = [ms[case, other] / ms[case, one] for case in cases]
    ends = dict.fromkeys(f"{end(ratios):.2f}" for end in (min, max)) if ratios else {}
    return f"{one} than {other} {' to '.join(ends)}" if ends else ""


def tiles(data: Data) -> str:
    """Return the tables of `attnctl.apps.bench.attention_tiles`."""
    parts = []
    for width, found in data["widths"].items():
        cases = list(dict.fromkeys(case for times in found["ms"].values() for case in times))
        times = {**found["ms"], **found["others"]}
        order = sorted(times, key=lambda key: (-len(times[key]), sum(times[key].values())))
        rows = [
            [
                f"**{key}**" if key == found["best"] else key,
                *(f"{times[key][case]:.2f}" if case in times[key] else "" for case in cases),
            ]
            for key in order
        ]
        head = (f"head dim {width}, ms", *cases)
        parts.append(f"**{data['machine']}**\n\n{_table(head, rows)}")
    return "\n".join(parts)


def model(data: Data) -> str:
    """Return the table of `attnctl bench model`."""
    head = ("arm", "step, ms", "a block, ms", "times stock", "peak GiB")
    rows = [
        [
            f"`{row['arm']}`", f"{row['ms']:.0f}", f"{row['ms_layer']:.1f}",
            f"{row['speedup']:.2f}", f"{row['peak_gib']:.1f}" if row["peak_gib"] else "",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    size = data["size"]
    video = f"{size['frames']} frames of {size['height']} x {size['width']}"
    where = f"**{data['model']}** on {data['machine']}, {video}, {size['layers']} blocks"
    return f"{where}\n\n{_table(head, rows)}"


def latent_cost(data: Data) -> str:
    """Return the tables of `attnctl.apps.bench.latent_cost`."""
    dtype = data["dtype"].removeprefix("torch.")
    parts = [f"**{data['device']}**, torch {data['torch']}, {dtype}\n"]
    models = {name: found for name, found in data.items() if isinstance(found, dict)}
    for name, found in models.items():
        arms, stock = found["arms"], found["arms"]["stock"]
        head = (
            name, "step, ms", "times stock", "times diffusers'", "peak, GiB", "more than stock",
            "of what diffusers' adds",
        )  # fmt: skip
        taken = ("taken, GiB", "of what diffusers' takes more")
        head += taken if "reserved_gib" in stock else ()
        rows = [
            [
                f"`{arm}`" if arm != "stock" else arm,
                "{:.1f} ({:.1f} to {:.1f})".format(row["step_ms"], *row["range_ms"]),
                f"{row['step / stock']:.2f}", _ratio(row, "step / diffusers"),
                f"{row['peak_gib']:.2f}", f"{row['peak_gib'] - stock['peak_gib']:.2f}",
                _ratio(row, "extra / diffusers"), *_taken(row),
            ]
            for arm, row in arms.items()
        ]  # fmt: skip
        parts.append(_table(head, rows))
    for name, found in models.items():
        by_side = found.get("heat maps by side of the latents")
        if by_side is None:
            continue
        rows = [
            [side, f"{row['stock']:.3f}", f"{row['heatmap']:.3f}", f"{row['more']:.4f}"]
            for side, row in by_side.items()
        ]
        head = (f"{name}, side of the latents", "stock, GiB", "with heat maps", "more")
        parts.append(_table(head, rows))
    return "\n".join(parts)


def heatmap_cost(data: Data) -> str:
    """Return the tables of `attnctl.apps.bench.heatmap_cost`."""
    dtype = data["dtype"].removeprefix("torch.")
    parts = [f"**{data['device']}**, torch {data['torch']}, {dtype}\n"]
    models = {name: found for name, found in data.items() if isinstance(found, dict)}
    for name, found in models.items():
        head = (f"{name}, {found['rounds']} rounds", "step, ms", "times stock", "by least times")
        rows = [
            [arm, f"{row['step_ms']:.1f}", _paired(row, "paired"), _paired(row, "least paired")]
            for arm, row in found["arms"].items()
        ]
        parts.append(_table(head, rows))
        sides = found.get("memory by side of the latents", {})
        if sides:
            rows = [[side, *(f"{x:.4f}" for x in row.values())] for side, row in sides.items()]
            head = (f"{name}, side of the latents", "stock, GiB", "every site", "more")
            parts.append(_table(head, rows))
    return "\n".join(parts)


def _paired(row: Data, key: str) -> str:
    low, high = row[f"{key} range"]
    return f"{row[f'{key} / stock']:.3f} ({low:.3f} to {high:.3f})"


def _taken(row: Data) -> list[str]:
    """Return the memory that a run took from the GPU, where it was noted."""
    if "reserved_gib" not in row:
        return []
    return [f"{row['reserved_gib']:.2f}", _ratio(row, "extra reserved / diffusers")]


def _ratio(row: Data, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


def parallel(data: Data) -> str:
    """Return the table of `attnctl.apps.bench.parallel`."""
    head = ("arm", "alone, ms", f"{data['processes']} together, ms", "apart", "moved")
    rows = [
        [
            f"`{row['arm']}`", f"{row['alone_ms']:.1f}", f"{row['shared_ms']:.1f}",
            f"{row['apart']:.1e}", f"{row['moved']:.1e}",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    size = data["size"]
    video = f"{size['frames']} frames of {size['height']} x {size['width']}"
    where = f"**{data['model']}** on {data['machine']}, {video}, {size['layers']} blocks"
    return f"{where}\n\n{_table(head, rows)}"


def vlm(data: Data) -> str:
    """Return the table of `attnctl.apps.bench.vlm_cost`."""
    head = ("", "prompt, ms", "times stock", "written tokens / s", "times stock", "peak memory")
    rows = []
    for arm, found in data["arms"].items():
        low, high = (f(found["rounds_prefill_ms"]) for f in (min, max))
        peak = found.get("peak_gib / stock")
        rows.append(
            [
                arm, f"{found['prefill_ms']:.1f} ({low:.1f} to {high:.1f})",
                _over_stock(arm, found, "prefill_ms"), f"{found['tokens_per_second']:.1f}",
                _over_stock(arm, found, "tokens_per_second"),
                "" if peak is None else f"{peak:.3f}",
            ]
        )  # fmt: skip
    tower = " from its vision tower" if data.get("tower") else ""
    where = f"**{data['model']}** on {data['device']}, {data['image_tokens']} image tokens{tower}"
    versions = f"torch {data['torch']}, transformers {data['transformers']}"
    return f"{where}, batch {data['batch']}, {versions}\n\n{_table(head, rows)}{_missed(data)}"


def vlm_compiled(data: Data) -> str:
    """Return the table of `attnctl.apps.bench.vlm_compiled`."""
    head = (
        "",
        "a written token, ms",
        "tokens / s, times stock",
        "all tokens, times stock",
        "first, s",
    )
    rows = [
        [
            arm, f"{found['token_ms']:.2f}",
            _with_interval(found, "tokens_per_second / stock"),
            _with_interval(found, "all tokens / stock"), f"{found['first_generate_s']:.1f}",
        ]
        for arm, found in data["arms"].items()
    ]  # fmt: skip
    where = f"**{data['model']}**, {data['layers']} layers, {data['dtype']}, on {data['device']}"
    apart = [
        f"{arm} {found['logits, largest difference to eager']:.0e}"
        + (f" (what it does: {found[effect]:.0e})" if effect in found else "")
        for arm, found in data["arms"].items()
        for effect in ("logits, largest effect",)
        if "logits, largest difference to eager" in found and data["dtype"] == "float32"
    ]
    told = (
        f"\nLargest difference of logits, compiled to eager: {', '.join(apart)}.\n"
        if apart
        else ""
    )
    versions = f"torch {data['torch']}, transformers {data['transformers']}"
    return f"{where}, {versions}\n\n{_table(head, rows)}{told}"


def _with_interval(found: Data, key: str) -> str:
    """Return a ratio with its interval."""
    low, high = found[f"{key}, interval"]
    return f"{found[key]:.3f} [{low:.3f}, {high:.3f}]"


def _missed(data: Data) -> str:
    """Return which goals were missed, where a run has intervals and the arms that have goals."""
    missed = []
    for arm in VLM_ARMS:
        found = data["arms"].get(arm, {})
        for key, (what, goal, sign) in VLM_GOALS.items():
            ratio = found.get(f"{key} / stock")
            if ratio is None or (ratio - goal) * sign >= 0:
                continue
            low, high = found.get(f"{key} / stock, interval", (ratio, ratio))
            inside = ", which the interval includes" if low <= goal <= high else ""
            missed.append(f"{arm}'s {what} ({ratio:.3f}, goal {goal}{inside})")
    return f"\nMissed: {'; '.join(missed)}.\n" if missed else ""


def _over_stock(arm: str, found: Data, key: str) -> str:
    """Return a ratio to stock, its interval, and that of the least times, where there are any."""
    text, interval = f"{found[f'{key} / stock']:.3f}", found.get(f"{key} / stock, interval")
    if interval is None or arm == "stock":
        return text
    low, high = interval
    least = found[f"{key} / stock, least times"]
    return f"{text} [{low:.3f}, {high:.3f}]; {least:.3f}"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


COST = """\
A denoiser with random weights, one forward. *Neutral* is a patch with scale 0, *waiting* one whose
window has not come, both over the stock forward (in brackets its quartiles). SoftPAG's time is
over that of the stock forward and one of the conditional rows alone: the work that it adds. Where
the quartiles are wide, a few percent say nothing ([more on these figures](effects.md#cost)).

```bash
python -m attnctl.apps.bench.cost --model sd3-small --out cost.json
```
"""
ATTENTION = """\
[Block-sparse attention](kernels.md#block-sparse-attention) beside torch's dense attention (cuDNN's
on a GPU) on the same tensors. *TFLOP/s* are over the kept blocks. *Error* is over that of stock
attention on the same rows, both against float64; a backend is timed if it is at most 2 and three
runs are equal bit for bit. Each call is timed among others of the same backend, since a GPU sets
its clock by what ran last. *1st s* is the first call, compilation included; *extra MiB* the memory
of a call beyond its inputs, output included. Masks are built on one CPU core, with nothing
remembered, and had again. The reference is plain torch, for checking; it skips blocks but saves no
time.

```bash
attnctl bench attention --out attention
attnctl bench attention --case models --backends gluon,triton,flex,fa4 --out attention
attnctl bench attention --case frames --case densities --out attention
attnctl bench attention --case wan-720p --zeros --out zeros
```
"""
TILES = """\
How the plain Triton kernel cuts its work: queries x keys of a tile, w warps, s stages, by tensor
descriptors (tma), at most r registers a thread. All candidates on the first case, the best of them
on the others, as far as the time went. The fastest (bold) is in `kernels/block_sparse/tiles.json`.

```bash
python -m attnctl.apps.bench.attention_tiles --workers 8 --beside gluon,flex --out tiles
```
"""
LATENT = """\
[Controls that move the latents](latent.md#cost) and heat maps of two words, at every step,
beside diffusers' own Attend-and-Excite pipeline, which makes one update a step here as our arms
do. UNets of real shape with random weights, classifier-free guidance, one picture unless it says
more. That pipeline knows no SDXL; with a UNet that adds the pooled embeddings itself, its code
runs SDXL's. *Taken* is the most memory that a run took from the GPU, *peak* what was in use of it.
Ranges are wide, as steps wait for a processor with other work: of the times, only the ratios
within the run say something, and those roughly; memory is not affected. The tables by side of the
latents are from a run before; stock's memory there has what diffusers' pipeline still kept of its
last run.

```bash
python -m attnctl.apps.bench.latent_cost --model sd1-5 --model sdxl --pictures 1 --pictures 4 \\
  --out cost.json
```
"""
HEATMAP = """\
[Heat maps](heatmaps.md#cost) of two words, at every step. *Tap* is a control that is asked at
every cross-attention site and does nothing, *up* reads the second half's sites, *torch* every site
without the kernel. Ratios are medians over the rounds, each of which compares an arm with stock by
the median of its steps and by the least; in brackets the middle half of the rounds. SDXL with four
pictures was timed before sites that are only read took the straight line.

```bash
python -m attnctl.apps.bench.heatmap_cost --model sd1-5 --model sdxl --pictures 1 --pictures 4 \\
  --out cost.json
```
"""
MODEL = """\
Real widths, random weights, a few blocks; a step of the stock model, on cuDNN's dense attention
where that takes the call, and one with the control in all its layers.

```bash
attnctl bench model --control radial:start=0,dense_layers=0 --layers 3 --rounds 3 --out model
attnctl bench model --control radial:start=0,dense_layers=0 --frames 321 --layers 2 --rounds 3
attnctl bench model --model hunyuanvideo --frames 117 --layers 3 --rounds 3 \\
    --control radial:start=0,dense_layers=0,family=hunyuan,decay=0.95
```
"""
PARALLEL = """\
diffusers' context parallelism (Ulysses). *Apart* is the mean difference between the outputs of one
process and of all together, *moved* that between the control and stock, both over the mean size of
the stock output.

```bash
torchrun --nproc_per_node 2 -m attnctl.apps.bench.parallel --out parallel.json
```
"""
VLM = """\
Decoders of real shape with random weights; `generate` reads a prompt and writes. *Neutral* is a
patch with options off, *eager* the stock model with attention that returns its maps, which is how
methods that edit maps are usually run. Arms run in turn: times are medians of the rounds, in
brackets the range, and ratios medians of those within a round. Where there are three more figures,
each round had an order of its own: the 95 % bootstrap interval of that median, and the ratio of
the least times of all rounds, which other work on the processor cannot lengthen. Goals for *pai*
and *var*: at most 1.05 times stock's time for the prompt, at least .97 of its written tokens a
second, at most 1.02 of its peak memory. Those that a run misses are named under its table. The
vision tower is left out, but for the table that names it (`--tower`). The processor of the machine
is shared with others, which short prompts feel most; `vlm_where` says what they wait for: the
host before the decoder, in its layers, or the GPU.

```bash
python -m attnctl.apps.bench.vlm_cost --model llava-1.5-7b --out vlm.json
python -m attnctl.apps.bench.vlm_where --model llava-1.5-7b
```
"""
VLM_COMPILED = """\
The same controls in [compiled decode](query_path.md#written-tokens-of-a-language-model):
`generate` with a static cache, whose written tokens torch.compile makes into CUDA graphs. *Eager*
is the stock model with a growing cache. A token's time is the median of a round's; ratios are
medians of the rounds, each to stock in the same round, with the 95 % bootstrap interval; *all
tokens* has the work between tokens too. *First* is the first call, which compiles. The goal of .97
of stock's tokens a second is met by *pai* with all layers, and missed by *var*.

```bash
python -m attnctl.apps.bench.vlm_compiled --model llava-1.5-7b --out compiled.json
```
"""
BENCHES: dict[str, tuple[str, str, Callable[[Data], str]]] = {
    "cost": ("What a patch costs", COST, cost),
    "attention": ("Block-sparse attention", ATTENTION, attention),
    "tiles": ("Tiles of the Triton kernel", TILES, tiles),
    "vlm": ("Vision-language models", VLM, vlm),
    "vlm_compiled": ("Vision-language models, compiled", VLM_COMPILED, vlm_compiled),
    "model": ("A denoising step of a video model", MODEL, model),
    "parallel": ("A step on several GPUs", PARALLEL, parallel),
    "latent cost": ("Moving latents, and heat maps", LATENT, latent_cost),
    "heat map cost": ("Heat maps", HEATMAP, heatmap_cost),
}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
