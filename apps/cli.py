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

from .eval.cli import evaluation

__all__ = ["app", "main", "run"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="attnctl",
    help="Control attention in pretrained models without training.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
bench = typer.Typer(name="bench", help="Measure what a control does.", rich_markup_mode=None)
app.add_typer(bench)
app.add_typer(evaluation)


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


def _known_models() -> list[str]:
    """Return what completion offers; without torch, so that it comes at once."""
    from attnctl import assets

    return assets.names()


def _known_controls() -> list[str]:
    """Return the controls that have presets: their names are those of files."""
    from importlib import resources

    files = resources.files("attnctl").joinpath("presets").iterdir()
    names = {Path(f.name).stem for f in files if f.name.endswith(".toml")}
    return sorted(names - {"masks"})  # which are of the function `attnctl.masks`


Model = Annotated[str, typer.Option(metavar="MODEL", help=_MODEL, autocompletion=_known_models)]
Controls = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[:KEY=VALUE,...]", help=_CONTROL, autocompletion=_known_controls),
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Steps; default: the model's.")]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="G", help="Classifier-free guidance; default: the model's."),
]
Negative = Annotated[str | None, typer.Option(metavar="TEXT", help="What to keep out.")]
Pixels = Annotated[int | None, typer.Option(metavar="PIXELS", help="Default: the model's.")]
Dtype = Annotated[str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]

_OUT = "The PNG to write; default: attnctl-001.png or the next free name."


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")],
    model: Model = "tiny-sd3",
    control: Controls = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    negative_prompt: Negative = None,
    height: Pixels = None,
    width: Pixels = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
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
    "the prompt (adjectives and noun), each telling word of an answer."
)
_HEATMAP_MODEL = "Shipped, a folder, or a hub id; default: tiny-sd, with --image tiny-llava."
_HEATMAP_OUT = "A PNG, or of a video an .mp4; default: heatmap-001.png..."


@app.command()
def heatmap(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to draw or to film.")
    ] = None,
    words: Annotated[list[str] | None, typer.Option(metavar="WORDS", help=_WORDS)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help=_HEATMAP_MODEL, autocompletion=_known_models, show_default=False
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture to ask about instead.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Default: Describe the image.")
    ] = None,
    heads: Annotated[
        str, typer.Option(metavar="SELECTOR", help="Heads that are read, such as L2-3.")
    ] = "all",
    control: Controls = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the noise.")] = 0,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Of a video; default: the model's.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help=_HEATMAP_OUT)] = None,
) -> None:
    """Show where each word of a prompt, or of an answer, looked."""
    from attnctl.errors import OptionError

    from .generate import Settings
    from .heatmap import Wanted, split_words
    from .heatmap import heatmap as run_heatmap

    if image is not None:
        from .answer_heatmap import Asked, answer_heatmap

        given = {"PROMPT": prompt, "--steps": steps, "--frames": frames}
        wrong = [name for name, value in (*given.items(), ("--seed", seed or None)) if value]
        if wrong or guidance_scale is not None:
            raise OptionError(
                f"{(wrong or ['--guidance-scale'])[0]} has no meaning with --image; ask with "
                "--question"
            )
        order = Asked(
            model or "tiny-llava", image, question or "Describe the image.",
            tuple(split_words(words or ())), heads, tuple(control or ()), 32, device, dtype, out,
        )  # fmt: skip
        answer_heatmap(order, note)
        return
    if prompt is None or question is not None:
        raise OptionError("give a PROMPT to draw, or a picture with --image to ask about")
    settings = Settings(seed=seed, steps=steps, guidance_scale=guidance_scale, frames=frames)
    wanted = Wanted(
        prompt,
        tuple(words or ()),
        model or "tiny-sd",
        heads,
        tuple(control or ()),
        settings,
        device,
        dtype,
        out,
    )
    run_heatmap(wanted, note)


_JOBS = (
    "What to draw: .txt (a prompt per line), .csv (a column per option), .jsonl (an object per "
    "line) or .toml."
)
_GRID = "Draw every combination: steps=10,20 or softpag.u=0.25,0.5; values with commas: a|b."


@app.command()
def batch(
    jobs: Annotated[Path, typer.Argument(metavar="JOBS", help=_JOBS)],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Output folder; a batch that is there goes on.")
    ],
    model: Model = "tiny-sd3",
    control: Controls = None,
    seed: Annotated[
        str | None, typer.Option(metavar="SEEDS", help="Such as 3, 0-9 or '0-3, 8'; default: 0.")
    ] = None,
    steps: Steps = None,
    guidance_scale: Guidance = None,
    negative_prompt: Negative = None,
    height: Pixels = None,
    width: Pixels = None,
    frames: Annotated[
        int | None, typer.Option(metavar="N", help="Of videos; default: the model's.")
    ] = None,
    fps: Annotated[
        int | None, typer.Option(metavar="N", help="Of videos, frames per second; default: 16.")
    ] = None,
    grid: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUES", help=_GRID)] = None,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Items of equal shape drawn at once, at most.")
    ] = 1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Draw again what failed before.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Draw many pictures or videos from a file of jobs.

    The options are for jobs that do not give them. A batch that was stopped, killed too, goes on
    where it was when the same command is given again. Several processes share the work when
    started by `accelerate launch`. Exit code 1 if an item failed.
    """
    from .batch.command import Order
    from .batch.command import batch as run_batch

    given = {
        "control": control or None,
        "seed": seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "frames": frames,
        "fps": fps,
    }
    order = Order(jobs, out, model, given, grid or (), batch, retry_failed, device, dtype)
    if not run_batch(order, note):
        raise typer.Exit(FAILED)


@app.command()
def sites(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="self, cross, joint, text, causal, linear or other."),
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
    from .models import local_folder, skeleton, speaker_folder

    if speaker_folder(model) is None:
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


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Repeat for more; default: the shipped models.",
            autocompletion=_known_models,
        ),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Default: the first free one from 7860 on.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Have gradio make a public address.")
    ] = False,
    root_path: Annotated[
        str | None, typer.Option(metavar="/PATH", help="Where a proxy shows the page.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps the results; default: none are kept."),
    ] = None,
    per_minute: Annotated[
        int, typer.Option(metavar="N", help="Runs and uploads of one visitor, at most.")
    ] = 30,
    seconds: Annotated[float, typer.Option(metavar="S", help="One run may take.")] = 180.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve a page to try controls in a browser (extra: demo)."""
    from .demo.command import Order
    from .demo.command import demo as serve
    from .demo.limits import Limits

    limits = Limits(seconds=seconds, per_minute=per_minute, at_once=max(6, per_minute // 5))
    names = tuple(model or ())
    serve(Order(names, host, port, share, root_path, out, device, dtype, limits), note)


@app.command()
def doctor() -> None:
    """Say what is installed, what can run here, and if not, why.

    Exit code 1 if a package that attnctl needs is missing or too old.
    """
    from .doctor import doctor as findings
    from .doctor import missing

    print(findings())
    if missing():
        raise typer.Exit(FAILED)


_TAU = "Least phi of a sink; default: 20, less for narrow models."
_DIMS = "Sink dimensions, such as 2533-1415; default: found on this prompt."


@app.command()
def sinks(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="tiny-llava, a folder, or a hub id (org/name).")
    ],
    image: Annotated[Path, typer.Option(metavar="FILE", help="The picture.")],
    question: Annotated[
        str, typer.Option(metavar="TEXT", help="What is asked about it.")
    ] = "Describe the image.",
    dims: Annotated[str | None, typer.Option(metavar="D-D", help=_DIMS)] = None,
    tau: Annotated[float | None, typer.Option(metavar="T", help=_TAU)] = None,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The PNG; default: sinks-001.png...")
    ] = None,
) -> None:
    """Show the sinks of a vision-language model on a picture."""
    from .sinks import Wanted
    from .sinks import sinks as show_sinks

    if dims is not None and not all(part.isdecimal() for part in dims.split("-")):
        raise typer.BadParameter(f"{dims!r} is no list such as 2533-1415", param_hint="--dims")
    given = None if dims is None else tuple(map(int, dims.split("-")))
    show_sinks(Wanted(model, image, question, given, tau, device, dtype, out), note)


_BENCH_CONTROL = (
    "The control that is judged, such as softpag:scale=1,u=0.25. Without options: the preset "
    "for the model. Without --control: stock alone."
)
_BENCH_OUT = (
    "A folder, or the files' base name: BASE.json and BASE.png. Default: the next free name, "
    "such as effect-CONTROL-MODEL-001."
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
    dtype: Dtype = "auto",
    device: Device = "auto",
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


@bench.command("attention")
def bench_attention(
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="models, bands, windows, frames, densities, toys, or one of theirs such as "
            "wan-720p; repeatable.",
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME...]", help="Default: all that can run here."),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Timings of each.")] = 5,
    dtype: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    zeros: Annotated[
        bool, typer.Option("--zeros", help="Inputs of zeros: speed where power is no bound.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="BASE", help=_BENCH_OUT)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of that name.")
    ] = False,
) -> None:
    """How fast are the backends of block-sparse attention? One run, side by side.

    Radial masks of video models, of growing length, and random blocks of growing density. A
    backend is timed if its error is at most twice that of stock attention and three runs are
    equal bit for bit. The default case is models on a GPU and toys on a CPU.
    """
    from .bench.attention import bench_attention

    bench_attention(
        case or (),
        backends.split(",") if backends else (),
        rounds=rounds,
        dtype=dtype,
        device=device,
        out=out,
        overwrite=overwrite,
        say=note,
        zeros=zeros,
    )


@bench.command("model")
def bench_model(
    control: Annotated[
        list[str],
        typer.Option(metavar="NAME[:...]", help="An arm, such as radial:start=0; repeatable."),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="wan-14b, wan-1.3b or hunyuanvideo.")
    ] = "wan-14b",
    frames: Annotated[int, typer.Option(metavar="N", help="Of the video.")] = 81,
    height: Annotated[int, typer.Option(metavar="PX", help="Of the video.")] = 720,
    width: Annotated[int, typer.Option(metavar="PX", help="Of the video.")] = 1280,
    layers: Annotated[int, typer.Option(metavar="N", help="Transformer blocks.")] = 4,
    rounds: Annotated[int, typer.Option(metavar="N", help="Timed steps of each arm.")] = 5,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="BASE", help=_BENCH_OUT)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files of that name.")
    ] = False,
) -> None:
    """How fast is a denoising step with a control? Real widths, random weights.

    A step of the stock model, on cuDNN's dense attention where that runs, beside one with each
    control; a few blocks are enough, since all are alike. Controls that wait for a part of the
    run must be told to start at once (start=0), those with dense layers to have none.
    """
    from .bench.model import Size, bench_model

    size = Size(frames, height, width, layers)
    bench_model(
        model, size, control, rounds=rounds, device=device, out=out, overwrite=overwrite,
        say=note,
    )  # fmt: skip


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
    slopes: Annotated[
        float,
        typer.Option(metavar="PART", help="Of halving's forwards, to screen; 0: scores alone."),
    ] = 0.75,
    device: Device = "auto",
    dtype: Dtype = "auto",
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Scores so far; default: beside the output."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the number of forwards and the time.")
    ] = False,
) -> None:
    """Search the heads that serve an objective (HeadHunter).

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
        scale, strategy, budget, pool, batch, slopes, call, device, dtype, journal,  # type: ignore[arg-type]
        dry_run,
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
    """Draw what a head set and each of its heads do."""
    from .head_pictures import Order, draw_heads
    from .quiet import hush

    hush(note)
    draw_heads(Order(heads, prompt, model, seed, out, grid, batch), print)


_AGAIN = "Draw it again from its record and compare, bit for bit; exit code 1 if it differs."


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A PNG or MP4 of attnctl.")],
    replay: Annotated[bool, typer.Option("--replay", help=_AGAIN)] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --replay: keep the new one here.")
    ] = None,
) -> None:
    """Print how a picture or a video was made, or make it again."""
    import json

    from .replay import read_record, replay_file

    if out is not None and not replay:
        raise typer.BadParameter("is for --replay", param_hint="--out")
    if not replay:
        print(json.dumps(read_record(file), indent=2, ensure_ascii=False))
        return
    again = replay_file(file, out, note)
    print(again)
    if not again.equal:
        raise typer.Exit(FAILED)


if __name__ == "__main__":
    main()
