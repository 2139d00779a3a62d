"""Measures contrastive decoding and PAI on tiny-llava; the tables of contrast.md.

    python -P docs/measure_contrast.py pope|captions --seed 103 --out part.json
        [--sampled] [--images 500] [--model FOLDER] [--arm ...]
    python -P docs/measure_contrast.py table part.json... [--out docs/measured/vlm/FILE.json]
    python -P docs/measure_contrast.py page docs/measured/vlm/FILE.json...
    python -P docs/measure_contrast.py models docs/measured/vlm/FILE.json...

An arm is controls in their text form, joined by "+", or "stock"; "other photo" is a placebo, VCD
whose second pass sees another photo instead of noise. `pope` asks the questions of the three
splits, `captions` describes the photos. `--sampled` draws answers at temperature 1, three times.
A run is about one set of photos (`--seed`) and one model and writes counts by photo. `table` puts
runs together: sets of photos and models are pooled, and arms of one set may come in several
files. Figures are percent; gains over stock come with 95 % bootstrap intervals, in which photos
are drawn again. `page` prints the tables of contrast.md of such files; `models` those that set
the models of files beside each other, of the arms that all of them have, and say on which of them
an arm gains on adversarial questions and invents less, beyond the interval, while neither recall
nor the number of words of its descriptions falls beyond it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import attnctl
from attnctl import assets
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.eval.estimate import Figure, Tally, difference, estimate, ratio
from attnctl.apps.eval.parsers import find_parser
from attnctl.apps.eval.pope import f1, yes_no_counts
from attnctl.assets.train.measure_llava import Teller
from attnctl.assets.world.chair import mentions
from attnctl.assets.world.evaluation import Photo, album
from attnctl.assets.world.pope import SPLITS, questions
from attnctl.assets.world.questions import BRIEF
from attnctl.processors.vlm.contrast import Contrast
from attnctl.records import LogitsCall

DRAWS = 3
LENGTH = {"pope": 1, "captions": 80}
PLACEBO = "other photo"
ARMS = (
    "stock", "vcd:alpha=0", "vcd", "vcd:noise_step=999", "vcd:alpha=3,noise_step=999", "m3id",
    "m3id:lam=0.05", "paicfg", "paicfg:gamma=1.25", "paicfg:gamma=2",
    "vcd:noise_step=999+m3id:lam=0.05", "pai:alpha=0.5", PLACEBO,
)  # fmt: skip
SAMPLED = (
    "stock", "vcd:alpha=0", "vcd", "vcd:noise_step=999", "m3id:lam=0.05", "paicfg",
    "paicfg:gamma=1.25", "vcd:alpha=0,beta=0.5", "vcd:beta=0.5,noise_step=999", "pai:alpha=0.5",
    PLACEBO,
)  # fmt: skip
CUT_OFF = {
    "vcd:beta=0.5,noise_step=999": "vcd:alpha=0,beta=0.5",
    **dict.fromkeys(
        ("vcd", "vcd:noise_step=999", "m3id:lam=0.05", "paicfg", "paicfg:gamma=1.25", PLACEBO),
        "vcd:alpha=0",
    ),
}
"""What a sampled contrast is without its second pass: its cut-off alone."""
FIGURES = {
    "pope": (
        Figure("right", "right", lambda s: ratio(s["right"], s["n"])),
        Figure("recall", "recall", lambda s: ratio(s["tp"], s["tp"] + s["fn"])),
        Figure("f1", "F1", f1),
        Figure("yes", "says yes", lambda s: ratio(s["yes"], s["n"])),
    ),
    "captions": (
        Figure("chair_s", "CHAIR_s", lambda s: ratio(s["invents"], s["n"])),
        Figure("chair_i", "CHAIR_i", lambda s: ratio(s["wrong"], s["named"])),
        Figure("recall", "recall", lambda s: ratio(s["found"], s["there"])),
        Figure("words", "words", lambda s: ratio(s["words"], s["n"]), "", 1),
    ),
}
MAIN = {"pope": ("right", "recall", "yes"), "captions": ("chair_s", "chair_i", "recall", "words")}
COLUMNS = {
    "pope": (
        ("adversarial", "adversarial", "right", True), ("popular", "popular", "right", True),
        ("random", "random", "right", True), ("recall", "random", "recall", False),
        ("says yes (adversarial)", "adversarial", "yes", False),
    ),
    "captions": (
        ("CHAIR_s", "captions", "chair_s", True), ("CHAIR_i", "captions", "chair_i", True),
        ("recall", "captions", "recall", True), ("words", "captions", "words", False),
    ),
}  # fmt: skip
"""The page's columns: head, split, figure, and whether the gain over stock stands beside it."""
MODELS = (
    ("adversarial", "adversarial", "right"), ("says yes", "adversarial", "yes"),
    ("CHAIR_s", "captions", "chair_s"), ("CHAIR_i", "captions", "chair_i"),
    ("recall", "captions", "recall"), ("words", "captions", "words"),
)  # fmt: skip
"""The columns of the tables by model: head, split, figure."""
BETTER = (
    ("adversarial", "adversarial", "right", 1), ("CHAIR_s", "captions", "chair_s", -1),
    ("CHAIR_i", "captions", "chair_i", -1),
)  # fmt: skip
"""The goal: what must gain beyond the interval; head, split, figure, and which way is better."""
KEPT = (("recall", "captions", "recall"), ("words", "captions", "words"))
"""What may not fall beyond the interval meanwhile."""


@dataclass(frozen=True)
class OtherPhoto(Contrast):
    """VCD's fusion with a pass that sees the photo of another row of the batch."""

    name: ClassVar[str] = "other-photo"

    def rewrite(self, call: LogitsCall) -> dict[str, Any]:
        """Return the inputs with the photos moved on by half a batch."""
        pixels = call.inputs.get("pixel_values")
        if pixels is None:
            return call.inputs
        return {**call.inputs, "pixel_values": pixels.roll(len(pixels) // 2, 0)}

    def fuse(self, z: torch.Tensor, weak: torch.Tensor, t: int) -> torch.Tensor:
        """Return 2 z - z-."""
        return 2 * z - weak


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pope", "captions", "table", "page", "models"))
    parser.add_argument("parts", nargs="*", type=Path)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=assets.path("tiny-llava"))
    parser.add_argument("--arm", action="append")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "table":
        pooled = table([json.loads(path.read_text()) for path in given.parts])
        if given.out:
            given.out.write_text(json.dumps(pooled, indent=1) + "\n")
    elif given.what in ("page", "models"):
        files = [json.loads(path.read_text()) for path in given.parts]
        if given.what == "models":
            rows = [row for one in files for row in one]
            print("\n\n".join([*models(rows), goal(rows)]))
            return
        tables = [*map(page, files), over_cut_off([row for one in files for row in one])]
        print("\n\n".join(one for one in tables if one))
    else:
        measure(given)


# -- asking ----------------------------------------------------------------------------------


def measure(given: argparse.Namespace) -> None:
    """Ask every arm, and write the counts by photo after each."""
    torch.set_grad_enabled(False)
    teller, photos = Teller.load(given.model, dtype=torch.float32), album(given.images, given.seed)
    facts = {"what": given.what, "sampled": given.sampled, "seed": given.seed}
    shipped = given.model == assets.path("tiny-llava")
    name = "shipped" if shipped else given.model.parent.name
    data: dict[str, Any] = {**facts, "model": name, "arms": {}}
    for arm in given.arm or (SAMPLED if given.sampled else ARMS):
        with patched(teller.model, arm):
            told = answers(teller, photos, given)
        data["arms"][arm] = counts(photos, given, told)
        if given.out:
            given.out.write_text(json.dumps(data) + "\n")
        print(arm, flush=True)


@contextlib.contextmanager
def patched(model: Any, arm: str) -> Iterator[None]:
    """Run a block with an arm's controls."""
    if arm == "stock":
        yield
        return
    parts = arm.split("+")
    controls = [OtherPhoto() if one == PLACEBO else parse_control(one) for one in parts]
    with attnctl.patch(model, *controls):
        yield


def answers(
    teller: Teller, photos: Sequence[Photo], given: argparse.Namespace
) -> list[dict[tuple[int, str], str]]:
    """Return the answers of each draw to each question about each photo, by its number."""
    asked = list(dict.fromkeys((photo, BRIEF[0]) for photo in photos))
    if given.what == "pope":
        cases = [case for name in SPLITS for case in questions(photos, name, given.seed)]
        asked = list(dict.fromkeys((case.photo, case.question) for case in cases))
    if not given.sampled:
        told = [teller.answers(asked, LENGTH[given.what])]
    elif LENGTH[given.what] == 1:
        told = drawn_tokens(teller, asked)
    else:
        told = drawn_texts(teller, asked, LENGTH[given.what])
    keys = [(photo.number, text) for photo, text in asked]
    return [dict(zip(keys, one, strict=True)) for one in told]


def drawn_texts(
    teller: Teller, asked: Sequence[tuple[Photo, str]], length: int
) -> list[list[str]]:
    """Return answers drawn at temperature 1 from all tokens, those of each draw."""
    settings = teller.model.generation_config
    settings.do_sample, settings.temperature = True, 1.0
    settings.top_k, settings.top_p = 0, 1.0
    told = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        told.append(teller.answers(asked, length))
    return told


def drawn_tokens(teller: Teller, asked: Sequence[tuple[Photo, str]]) -> list[list[str]]:
    """Return `drawn_texts` of length 1; the draws share the logits, which are the same for all."""
    pixels = teller.pixels(dict.fromkeys(photo for photo, _ in asked))
    shares = []
    for start in range(0, len(asked), teller.batch):
        part = asked[start : start + teller.batch]
        made = teller.model.generate(
            **teller.words([question for _, question in part]),
            pixel_values=torch.stack([pixels[photo] for photo, _ in part]),
            **{"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True},
        )
        shares.append(made.logits[0].float().softmax(dim=-1))
    told = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        ids = torch.cat([share.multinomial(1) for share in shares])
        texts = teller.processor.batch_decode(ids, skip_special_tokens=True)
        told.append([text.strip() for text in texts])
    return told


def counts(
    photos: Sequence[Photo],
    given: argparse.Namespace,
    told: Sequence[dict[tuple[int, str], str]],
) -> dict[str, dict[str, list[Any]]]:
    """Return counts by photo, summed over draws, of each split (or of all captions)."""
    if given.what == "captions":
        rows = [(p, caption_counts(p, one[p.number, BRIEF[0]])) for one in told for p in photos]
        return {"captions": by_photo(rows, given.seed)}
    official, found = find_parser("pope", "official"), {}
    for name in SPLITS:
        cases = questions(photos, name, given.seed)
        rows = [
            (
                case.photo,
                yes_no_counts(one[case.photo.number, case.question], case.label, official),
            )
            for one in told
            for case in cases
        ]
        found[name] = by_photo(rows, given.seed)
    return found


def by_photo(rows: Sequence[tuple[Photo, dict[str, float]]], seed: int) -> dict[str, list[Any]]:
    """Return sums of counts by photo."""
    images = [f"{seed}/{photo.number}" for photo, _ in rows]
    names, sums = Tally.of(images, [row for _, row in rows], ()).by_image()
    return {"photos": names, **{key: values.tolist() for key, values in sums.items()}}


def caption_counts(photo: Photo, text: str) -> dict[str, float]:
    """Return the counts of one description."""
    there, said = {item.name for item in photo.items}, mentions(text)
    wrong = sum(one not in there for one in said)
    return {
        "n": 1,
        "invents": wrong > 0,
        "wrong": wrong,
        "named": len(said),
        "found": len(there & {*said}),
        "there": len(there),
        "words": len(text.split()),
    }


# -- the tables ------------------------------------------------------------------------------


def table(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the tables of runs put together, and return their figures."""
    pooled = []
    for what, sampled in dict.fromkeys((one["what"], one["sampled"]) for one in parts):
        mine = [one for one in parts if (one["what"], one["sampled"]) == (what, sampled)]
        arms = dict.fromkeys(arm for one in mine for arm in one["arms"])
        for name in next(iter(mine[0]["arms"].values())):
            tallies = {arm: joined(mine, arm, name) for arm in arms}
            base = tallies["stock"]
            runs = sorted({(one["model"], one["seed"]) for one in mine})
            print(f"\n{name}{', sampled' if sampled else ''}: {runs}\n")
            heads = [f.head for f in FIGURES[what] if f.key in MAIN[what]]
            print(f"| arm | {' | '.join(heads)} |\n|{' --- |' * (1 + len(heads))}")
            for arm, tally in tallies.items():
                whole = len(tally.images) == len(base.images)
                row = figures(tally, base if whole and arm != "stock" else None)
                print(f"| `{arm}` | {' | '.join(cells(row, what))} |")
                about = {"split": name, "sampled": sampled, "arm": arm, "runs": runs}
                n = int(tally.counts["n"].sum())
                pooled.append({**about, "n": n, **row, **beside(arm, tallies, sampled)})
    return pooled


def joined(parts: Sequence[dict[str, Any]], arm: str, name: str) -> Tally:
    """Return an arm's counts of all runs; a photo that two models saw is two photos."""
    images: list[str] = []
    columns: dict[str, list[float]] = {}
    for one in parts:
        if arm not in one["arms"]:
            continue
        data = one["arms"][arm][name]
        images += [f"{one['model']}/{photo}" for photo in data["photos"]]
        for key, values in data.items():
            if key != "photos":
                columns.setdefault(key, []).extend(values)
    found = {key: np.array(values) for key, values in columns.items()}
    return Tally(images, found, FIGURES[parts[0]["what"]])


def figures(tally: Tally, base: Tally | None) -> dict[str, Any]:
    """Return an arm's figures, and what it gains over stock."""
    return {
        "figures": {key: round(one.value, 5) for key, one in estimate(tally).items()},
        "gains": {} if base is None else gains(tally, base),
    }


def gains(tally: Tally, base: Tally) -> dict[str, list[float]]:
    """Return the differences of an arm's figures from another's, with the ends of intervals."""
    found = difference(tally, base)
    return {
        key: [round(v, 5) for v in (one.value, one.low, one.high)] for key, one in found.items()
    }


def beside(arm: str, tallies: dict[str, Tally], sampled: bool) -> dict[str, Any]:
    """Return what a sampled contrast gains over its cut-off alone."""
    if not sampled or arm not in CUT_OFF:
        return {}
    return {"over_cut_off": gains(tallies[arm], tallies[CUT_OFF[arm]])}


def cells(row: dict[str, Any], what: str) -> list[str]:
    """Return the cells of a row."""
    return [cell(row, figure, True) for figure in FIGURES[what] if figure.key in MAIN[what]]


def cell(row: dict[str, Any], figure: Figure, with_gain: bool) -> str:
    """Return a figure, and if wanted and there its gain over stock with the interval."""
    text = f"{figure.factor * row['figures'][figure.key]:.1f}"
    gain = row["gains"].get(figure.key) if with_gain else None
    return f"{text} ({interval(gain, figure)})" if gain else text


def interval(gain: Sequence[float], figure: Figure) -> str:
    """Return a gain with its interval."""
    value, low, high = (signed(figure.factor * one) for one in gain)
    return f"{value} [{low}, {high}]"


def signed(value: float) -> str:
    """Return a number with its sign; what is no gain is a zero without one."""
    text = f"{value:+.1f}"
    return "0.0" if value == 0 or text == "-0.0" else text


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page's table of the rows of `table`."""
    what = "captions" if rows[0]["split"] == "captions" else "pope"
    figure_of = {one.key: one for one in FIGURES[what]}
    found = {(row["arm"], row["split"]): row for row in rows}
    columns = COLUMNS[what]
    lines = [
        f"| arm | {' | '.join(head for head, *_ in columns)} |",
        f"|{' --- |' * (1 + len(columns))}",
    ]
    for arm in SAMPLED if rows[0]["sampled"] else ARMS:
        told = [cell(found[arm, split], figure_of[key], gain) for _, split, key, gain in columns]
        lines.append(f"| `{arm}` | {' | '.join(told)} |")
    return "\n".join(lines)


def over_cut_off(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page's table of what sampled contrasts gain over their cut-offs alone."""
    figure_of = {one.key: one for some in FIGURES.values() for one in some}
    found = {
        (row["arm"], row["split"]): row["over_cut_off"] for row in rows if "over_cut_off" in row
    }
    columns = [
        (head, split, key)
        for what in ("pope", "captions")
        for head, split, key, gain in COLUMNS[what]
        if gain and any(one == split for _, one in found)
    ]
    lines = [
        f"| arm | {' | '.join(head for head, *_ in columns)} |",
        f"|{' --- |' * (1 + len(columns))}",
    ]
    for arm in SAMPLED:
        if arm in CUT_OFF and found:
            told = [interval(found[arm, split][key], figure_of[key]) for _, split, key in columns]
            lines.append(f"| `{arm}` | {' | '.join(told)} |")
    return "\n".join(lines) if found else ""


def models(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return tables, greedy and sampled, of each arm on each model: stock's figures, gains."""
    tables = []
    for sampled in sorted({row["sampled"] for row in rows}):
        found, arms, names = by_model(rows, sampled)
        shared = [
            column for column in MODELS if all(column[1] in splits for splits in found.values())
        ]
        lines = [
            f"| arm | model | {' | '.join(head for head, *_ in shared)} |",
            f"|{' --- |' * (2 + len(shared))}",
        ]
        for arm in arms:
            for model in names:
                told = [one_cell(found[arm, model][split], key) for _, split, key in shared]
                lines.append(f"| `{arm}` | {model} | {' | '.join(told)} |")
        tables.append("\n".join(lines))
    return tables


def by_model(
    rows: Sequence[dict[str, Any]], sampled: bool
) -> tuple[dict[tuple[str, str], dict[str, dict[str, Any]]], list[str], list[str]]:
    """Return rows by arm and model, then split; the arms that all models have; the models."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["sampled"] == sampled:
            found.setdefault((row["arm"], model_of(row)), {})[row["split"]] = row
    names = list(dict.fromkeys(model for _, model in found))
    arms = [*dict.fromkeys(arm for arm, _ in found if all((arm, name) in found for name in names))]
    order = (*(SAMPLED if sampled else ARMS), *arms)
    return found, sorted(arms, key=order.index), names


def goal(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of what each arm lacks of the goal on each model."""
    lines = []
    for sampled, base, key in (
        (False, "stock", "gains"),
        (True, "stock", "gains"),
        (True, "its cut-off alone", "over_cut_off"),
    ):
        found, arms, names = by_model(rows, sampled)
        for arm in arms:
            splits = [found[arm, name] for name in names]
            if any(not one[split].get(key) for one in splits for split in one):
                continue
            told = [lacks({split: one[split][key] for split in one}) for one in splits]
            how = "sampled" if sampled else "greedy"
            lines.append(f"| `{arm}` | {how} | {base} | {' | '.join(told)} |")
    head = f"| arm | answers | against | {' | '.join(names)} |\n|{' --- |' * (3 + len(names))}"
    return "\n".join([head, *lines])


def lacks(gains: dict[str, dict[str, list[float]]]) -> str:
    """Return "met", or what is missing of the goal: figures by split, (gain, low, high)."""
    missing = [
        head
        for head, split, key, way in BETTER
        if min(way * end for end in gains[split][key][1:]) <= 0
    ]
    missing += [head for head, split, key in KEPT if gains[split][key][2] < 0]
    return ", ".join(missing) or "met"


def model_of(row: dict[str, Any]) -> str:
    """Return the name of the only model of a row."""
    (name,) = {model for model, _ in row["runs"]}
    return str(name)


def one_cell(row: dict[str, Any], key: str) -> str:
    """Return stock's figure, or what another arm gains."""
    figures = FIGURES["captions" if row["split"] == "captions" else "pope"]
    figure = next(one for one in figures if one.key == key)
    gain = row["gains"].get(key)
    return interval(gain, figure) if gain else f"{figure.factor * row['figures'][key]:.1f}"


if __name__ == "__main__":
    main()
