"""The command `attnctl`.

torch and diffusers are imported inside the commands, so that help and version come at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

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


@app.command()
def show(file: Annotated[Path, typer.Argument(metavar="FILE", help="A PNG of attnctl.")]) -> None:
    """Print how a picture was made."""
    import json

    from .pictures import read_metadata

    print(json.dumps(read_metadata(file), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
