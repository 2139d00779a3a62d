"""The command `attnctl`.

torch and diffusers are imported inside the commands, so that help and version come at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main", "run"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="attnctl",
    help="Control attention in pretrained models without training.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
bench = typer.Typer(name="bench", help="Measure what a control does.", rich_markup_mode=None)
app.add_typer(bench)


@bench.callback(invoke_without_command=True)
def bench_help(context: typer.Context) -> None:
    """Measure what a control does."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the console script."""
    # threads that wait by spinning make drawing 20 times slower where cores are shared; OpenMP
    # reads this when torch is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; bad input is told in one line.

    Args:
        arguments: the words after `attnctl`; None for those of this process.
    """
    try:
        words = sys.argv[1:] if arguments is None else arguments
        code = app(args=list(words) or ["--help"], prog_name="attnctl", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        code = _failed(error)
    if code == INTERRUPTED:
        print("\nattnctl: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Tell an error in one line; the traceback only if the user asked for it."""
    from attnctl.errors import AttnctlError

    if os.environ.get("ATTNCTL_TRACEBACK"):
        traceback.print_exception(error)
    if hasattr(error, "format_message"):  # typer's own: wrong options and the like
        complain(f"{error.format_message().rstrip('.')} (see attnctl --help)")
        return BAD_INPUT
    if isinstance(error, (AttnctlError, OSError, ImportError)):
        complain(str(error))
        return BAD_INPUT
    complain(f"{type(error).__name__}: {error} (ATTNCTL_TRACEBACK=1 shows where)")
    return FAILED


def complain(text: str) -> None:
    """Write one line of error."""
    print(f"attnctl: error: {' '.join(text.split())}", file=sys.stderr)


def note(text: str) -> None:
    """Write one line of advice."""
    print(f"attnctl: note: {' '.join(text.split())}", file=sys.stderr)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version, or nothing."""
    if version:
        from attnctl import __version__

        print(f"attnctl {__version__}")
        raise typer.Exit


_MODEL = "A shipped model (tiny-sd3), a folder, or a hub id (org/name)."
_CONTROL = (
    "A control, such as softpag:u=0.5,heads=L1H2; repeat for more. Without options: the preset "
    "for the model. `attnctl controls` lists them."
)
_OUT = "The PNG to write; default: attnctl-001.png or the next free name."


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help=_MODEL)] = "tiny-sd3",
    control: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:KEY=VALUE,...]", help=_CONTROL)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps; default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="G", help="Classifier-free guidance; default: the model's."),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to keep out.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Default: the model's.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Default: the model's.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Draw without the controls too, side by side.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=_OUT)] = None,
) -> None:
    """Draw a picture from a prompt, with controls or without."""
    from .draw import Order, draw

    options = {
        "negative_prompt": negative_prompt,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    draw(Order(prompt, model, tuple(control or ()), options, device, dtype, compare, out), note)


_WORDS = (
    "What to map, separated by commas, such as 'red circle, square#2'; default: each concept of "
    "the prompt (adjectives and noun)."
)


@app.command()
def heatmap(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    words: Annotated[list[str] | None, typer.Option(metavar="WORDS", help=_WORDS)] = None,
    model: Annotated[str, typer.Option(metavar="MODEL", help=_MODEL)] = "tiny-sd",
    heads: Annotated[
        str, typer.Option(metavar="SELECTOR", help="Heads that are read, such as L2-3.")
    ] = "all",
    control: Annotated[
        list[str] | None, typer.Option(metavar="NAME[:KEY=VALUE,...]", help=_CONTROL)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps; default: the model's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="G", help="Classifier-free guidance; default: the model's."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The PNG; default: heatmap-001.png...")
    ] = None,
) -> None:
    """Draw a picture and show where each word of the prompt was attended to."""
    from .generate import Settings
    from .heatmap import Wanted
    from .heatmap import heatmap as run_heatmap

    settings = Settings(seed=seed, steps=steps, guidance_scale=guidance_scale)
    wanted = Wanted(
        prompt,
        tuple(words or ()),
        model,
        heads,
        tuple(control or ()),
        settings,
        device,
        dtype,
        out,
    )
    run_heatmap(wanted, note)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="self, cross, joint, text, linear or other.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(metavar="SELECTOR", help="Only what this names, such as L0-3H2."),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Do not shorten names.")] = False,
) -> None:
    """List the attention sites of a model (loads no weights)."""
    from .quiet import hush
    from .sites_table import KINDS, sites_text
    from .tables import terminal_width

    if kind is not None and kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is not one of {', '.join(KINDS)}", param_hint="--kind")
    from .models import local_folder, skeleton

    local_folder(model)
    hush(note)
    print(sites_text(skeleton(model), kind, select, None if wide else terminal_width()))


@app.command()
def controls(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one in detail.")
    ] = None,
) -> None:
    """List the controls and their options."""
    import attnctl

    from .controls_table import control_text, controls_text
    from .tables import terminal_width

    known, width = attnctl.controls(), terminal_width()
    print(control_text(name, known, width) if name else controls_text(known, width))


_BENCH_CONTROL = (
    "The control that is judged, such as softpag:scale=1,u=0.25. Without options: the preset "
    "for the model. Without --control: stock alone."
)
_BENCH_OUT = (
    "A folder, or the files' base name: BASE.json and BASE.png. Default: the next free "
    "effect-CONTROL-MODEL-001."
)


@bench.command("effect")
def bench_effect(
    control: Annotated[
        str | None, typer.Option(metavar="NAME[:KEY=VALUE,...]", help=_BENCH_CONTROL)
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:...]", help="Another control to compare with; repeatable."),
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A shipped model, or a folder with one.")
    ] = "tiny-sd3",
    n: Annotated[int, typer.Option(metavar="N", help="Pairs: cases per arm.")] = 200,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the prompts; case i has noise seed N + i.")
    ] = 0,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="heldout or trained; of questions: adversarial, popular or random.",
        ),
    ] = None,
    objects: Annotated[
        int | None, typer.Option(metavar="N", help="Objects per prompt; default: 2.")
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(metavar="N", help="Cases per prompt; from 2 on, diversity is measured."),
    ] = 1,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps; default: the task's.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="G", help="Classifier-free guidance; default: the task's."),
    ] = None,
    placebo: Annotated[
        bool, typer.Option("--placebo/--no-placebo", help="Run the control's placebos.")
    ] = True,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Cases per call; default: by device.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep stock outputs for later runs.")
    ] = True,
    out: Annotated[Path | None, typer.Option(metavar="BASE", help=_BENCH_OUT)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of that name.")
    ] = False,
) -> None:
    """Does a control do what it claims? Paired runs on a shape-world model.

    Same prompts and same noise for stock, the control, those of --against, and placebos: the
    control as strong as it is, but pointing elsewhere. The model's task is judged by the shape
    world's detector. Gains come with 95 % bootstrap intervals. 200 pairs of a control on all
    heads of tiny-sd3 (12 steps, guidance 1) take 216 s on two CPU cores; the stock arm is
    kept for the next bench.
    """
    from .bench.command import Order, bench_effect

    settings = {
        "n": n,
        "seed": seed,
        "prompts": prompts,
        "objects": objects,
        "repeats": repeats,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "batch": batch,
        "dtype": dtype,
        "device": device,
    }
    order = Order(control, tuple(against or ()), model, settings, placebo, cache, out, overwrite)
    bench_effect(order, note)


_SEARCH_MODEL = "A shipped model, a folder, or a hub id."
_OBJECTIVE = (
    "What to maximise: world, redness, brightness, edges, clip:FOLDER, pickscore:FOLDER, "
    "hpsv2:FILE, aesthetic:FOLDER+FILE, or your package.module:function."
)
_PERTURBATION = "A perturbation guidance, such as softpag or seg:sigma=2."
_STRATEGY = "greedy (the paper's), gradient or halving (a fraction of its cost)."


@app.command("search-heads")
def search_heads(
    objective: Annotated[str, typer.Option(metavar="NAME", help=_OBJECTIVE)],
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="One prompt per line.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help=_SEARCH_MODEL)] = "tiny-sd3",
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The head set: .json, or .txt for layer,head.")
    ] = Path("heads.json"),
    style: Annotated[
        str, typer.Option(metavar="TEXT", help='Put in front of each prompt: "TEXT, prompt".')
    ] = "",
    rounds: Annotated[int, typer.Option(metavar="R", help="Rounds.")] = 5,
    top_k: Annotated[int, typer.Option(metavar="K", help="Heads added per round.")] = 3,
    images: Annotated[
        int | None, typer.Option(metavar="M", help="Pictures per head; default: one per prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the first picture.")] = 0,
    perturbation: Annotated[
        str, typer.Option(metavar="NAME[:KEY=VALUE]", help=_PERTURBATION)
    ] = "softpag",
    u: Annotated[float, typer.Option(metavar="U", help="Strength, 0 to 1.")] = 1.0,
    scale: Annotated[float, typer.Option(metavar="W", help="Guidance scale.")] = 3.0,
    strategy: Annotated[str, typer.Option(metavar="NAME", help=_STRATEGY)] = "greedy",
    budget: Annotated[
        float, typer.Option(metavar="PART", help="Of greedy's forwards, for the other two.")
    ] = 0.05,
    pool: Annotated[str, typer.Option(metavar="SELECTOR", help="Heads to choose from.")] = "all",
    steps: Annotated[int, typer.Option(metavar="N", help="Steps per picture.")] = 20,
    guidance_scale: Annotated[
        float, typer.Option(metavar="G", help="Classifier-free guidance; 1 is none.")
    ] = 1.0,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="Of the pictures.")] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="Of the pictures.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows per denoiser call.")] = 8,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scores so far; default: beside the output."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the number of forwards and the time.")
    ] = False,
) -> None:
    """Search the heads whose perturbation serves an objective (HeadHunter).

    A search that was stopped goes on where it was. Several processes share the work when
    started by `accelerate launch`.
    """
    from .quiet import hush
    from .search_heads import Order
    from .search_heads import search_heads as search

    hush(note)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    call.update({k: v for k, v in (("height", height), ("width", width)) if v is not None})
    order = Order(
        model, objective, prompts, out, style, rounds, top_k, images, seed, perturbation, u,
        scale, strategy, budget, pool, batch, call, device, dtype, journal, dry_run,  # type: ignore[arg-type]
    )  # fmt: skip
    search(order, print)


@app.command("show-heads")
def show_heads(
    heads: Annotated[Path, typer.Argument(metavar="FILE", help="A head set of search-heads.")],
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to draw; default: the search's first.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Default: the search's.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to.")] = Path("heads"),
    grid: Annotated[
        bool, typer.Option("--grid/--no-grid", help="One picture per head (takes longest).")
    ] = True,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows per denoiser call.")] = 8,
) -> None:
    """Draw what a head set and each single head do, and how the search went."""
    from .head_pictures import Order, draw_heads
    from .quiet import hush

    hush(note)
    draw_heads(Order(heads, prompt, model, seed, out, grid, batch), print)


@app.command()
def show(file: Annotated[Path, typer.Argument(metavar="FILE", help="A PNG of attnctl.")]) -> None:
    """Print how a picture was made."""
    import json

    from .pictures import read_metadata

    print(json.dumps(read_metadata(file), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
