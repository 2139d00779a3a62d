"""The commands `attnctl eval pope|chair|mme|amber` and `attnctl eval score`."""

# annotations are evaluated at once here: typer could not find the variables of `_add` in text
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["evaluation"]

evaluation = typer.Typer(
    name="eval",
    help="Evaluate a vision-language model, without and with controls.",
    rich_markup_mode=None,
)


@evaluation.callback(invoke_without_command=True)
def eval_help(context: typer.Context) -> None:
    """Evaluate a vision-language model, without and with controls."""
    if context.invoked_subcommand is None:
        print(context.get_help())


_ABOUT = {
    "pope": ("Is an object there? Yes or no (POPE).", "The question file."),
    "chair": (
        "Which named objects are not there? (CHAIR)",
        "Folder with instances_val2014.json and captions_val2014.json.",
    ),
    "mme": ("Fourteen subtasks of yes and no (MME).", "A subtask's file, or the folder of all."),
    "amber": ("Descriptions and yes or no (AMBER).", "The folder data/ of AMBER's repository."),
}
_CONTROL = "A control, such as pai:alpha=0.5, or carve; repeat for more, which act together."
_PROMPT = "The words of a question, such as '{question} Please answer yes or no.'"
_PARSER = "How yes and no are read: official, lmms-eval, vlmevalkit, pai, vcd, mme; repeatable."
_WORDS = "How words are found: rule, or (with nltk) lemma; for CHAIR also pattern."
_ALIKE = "When AMBER's words mean the same: exact, or spacy:en_core_web_lg (the official way)."

Model = Annotated[str, typer.Option(metavar="MODEL", help="A shipped model, folder or hub id.")]
Controls = Annotated[list[str] | None, typer.Option(metavar="NAME[:KEY=VALUE]", help=_CONTROL)]
Parsers = Annotated[list[str] | None, typer.Option(metavar="NAME", help=_PARSER)]
Words = Annotated[str, typer.Option(metavar="NAME", help=_WORDS)]
Alike = Annotated[str, typer.Option(metavar="NAME", help=_ALIKE)]
Synonyms = Annotated[
    Path | None, typer.Option(metavar="FILE", help="CHAIR's table; default: beside annotations.")
]
Ids = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="CHAIR's images: ids or file names, one a line."),
]
Split = Annotated[
    str | None, typer.Option(metavar="NAME", help="AMBER's part: all, g, d, de, da or dr.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad lines and images out, and count them.")
]


def _add(benchmark: str) -> None:
    about, files = _ABOUT[benchmark]

    def command(
        model: Model,
        images: Annotated[Path, typer.Option(metavar="DIR", help="The folder of images.")],
        annotations: Annotated[Path, typer.Option(metavar="FILE", help=files)],
        out: Annotated[Path, typer.Option(metavar="DIR", help="For answers and results.")],
        control: Controls = None,
        limit: Annotated[
            int | None, typer.Option(metavar="N", help="Most items; whole images are drawn.")
        ] = None,
        seed: Annotated[
            int, typer.Option(metavar="N", help="Of drawn items, wrong images and drawn answers.")
        ] = 0,
        batch: Annotated[int, typer.Option(metavar="N", help="Questions per call.")] = 8,
        max_new_tokens: Annotated[
            int | None, typer.Option(metavar="N", help="Per answer; default: 64 or 512.")
        ] = None,
        prompt: Annotated[str, typer.Option(metavar="TEXT", help=_PROMPT)] = "{question}",
        parser: Parsers = None,
        words: Words = "rule",
        alike: Alike = "exact",
        synonyms: Synonyms = None,
        ids: Ids = None,
        split: Split = None,
        mismatched: Annotated[
            bool, typer.Option("--mismatched", help="Also ask about another image than meant.")
        ] = False,
        sample: Annotated[
            bool, typer.Option("--sample", help="Draw answers, each from its own random numbers.")
        ] = False,
        temperature: Annotated[
            float | None, typer.Option(metavar="T", help="Of drawn answers; default: 1.")
        ] = None,
        top_p: Annotated[
            float | None, typer.Option(metavar="P", help="Of drawn answers; default: 1, all.")
        ] = None,
        skip_bad: SkipBad = False,
        device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")] = "auto",
        dtype: Annotated[
            str, typer.Option(metavar="TYPE", help="auto, float32, float16 or bfloat16.")
        ] = "auto",
    ) -> None:
        from attnctl.apps.cli import note
        from attnctl.apps.quiet import hush

        hush(note)
        from .arms import Asking
        from .benchmarks import LENGTHS, Sources
        from .command import Order, evaluate
        from .sampling import Sampling

        sources = Sources(benchmark, annotations, synonyms, ids, split)
        length = LENGTHS[benchmark] if max_new_tokens is None else max_new_tokens
        given = {
            k: v for k, v in (("temperature", temperature), ("top_p", top_p)) if v is not None
        }
        if given and not sample:
            raise typer.BadParameter("--temperature and --top-p go with --sample")
        drawn = Sampling(**given, seed=seed) if sample else None
        asking = Asking(images, prompt, batch, length, drawn)
        order = Order(
            sources, model, asking, out, tuple(control or ()), limit, seed, tuple(parser or ()),
            words, alike, mismatched, skip_bad, device, dtype,
        )  # fmt: skip
        evaluate(order, note)

    evaluation.command(benchmark, help=about)(command)


for _name in _ABOUT:
    _add(_name)


@evaluation.command("score")
def score(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Answers; gains are over the first.")
    ],
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="For files of other programs: pope, chair, mme, amber."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For files of other programs.")
    ] = None,
    parser: Parsers = None,
    words: Words = "rule",
    alike: Alike = "exact",
    synonyms: Synonyms = None,
    ids: Ids = None,
    split: Split = None,
    skip_bad: SkipBad = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result there, as JSON.")
    ] = None,
) -> None:
    """Score answers again, without a model; also those that another program wrote."""
    from attnctl.apps.cli import note

    from .benchmarks import Sources
    from .rescore import Rescore, rescore

    sources = None
    if (benchmark is None) != (annotations is None):
        raise typer.BadParameter("--benchmark and --annotations go together")
    if benchmark is not None and annotations is not None:
        sources = Sources(benchmark, annotations, synonyms, ids, split)
    elif (synonyms, ids, split) != (None, None, None):
        raise typer.BadParameter("--synonyms, --ids and --split need --benchmark, --annotations")
    names = tuple(parser or ())
    rescore(Rescore(tuple(files), sources, names, words, alike, skip_bad, out), note)
