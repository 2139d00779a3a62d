"""`attnctl eval`: answer a benchmark's questions without and with controls, and score both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL

from attnctl.apps.chosen import choose
from attnctl.apps.control_syntax import split_control
from attnctl.apps.files import write_whole
from attnctl.apps.record import versions
from attnctl.apps.tables import terminal_width

from .answer_file import AnswerFile, Stored, run_key
from .answering import Answerer, model_facts
from .arms import Arm, Asking, run_arm
from .bad_data import BadData, EvalError, Skips
from .benchmarks import Scoring, Sources, read_items
from .items import Item, find_image, sample, swap_images
from .parsers import find_parser
from .result import Scored, score_arms
from .second_look import take_look

__all__ = ["Order", "evaluate", "told"]

_TOLD = 5
"""Bad lines that are told one by one."""


@dataclass(frozen=True)
class Order:
    """What was asked for.

    Attributes:
        sources: the benchmark's files.
        model: what the user calls the model.
        asking: how questions are put.
        out: folder for answers and results.
        controls: texts of the controls that make up the method, "carve:..." among them for a
            second look; none for the model alone.
        limit: most items; None for all.
        seed: of the choice of items and of the wrong images; draws have one in `asking`.
        parsers: names; none for the benchmark's own.
        words, alike: see `Scoring`.
        mismatched: also show every question with another image.
        skip_bad: leave bad lines and images out, and count them.
        device, dtype: where and in what type the model runs.
    """

    sources: Sources
    model: str
    asking: Asking
    out: Path
    controls: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    parsers: tuple[str, ...] = ()
    words: str = "rule"
    alike: str = "exact"
    mismatched: bool = False
    skip_bad: bool = False
    device: str = "auto"
    dtype: str = "auto"

    def scorings(self) -> list[Scoring]:
        """Return the ways of scoring.

        Raises:
            EvalError: if the benchmark has no such parser.
        """
        for name in self.parsers:
            find_parser(self.sources.benchmark, name)
        return [Scoring(name, self.words, self.alike) for name in self.parsers or (None,)]


@dataclass
class Plan:
    """Items that will be asked, after all files were looked at and before a model is loaded."""

    items: list[Item]
    tables: dict[str, Any]
    skips: Skips
    files: dict[str, str] = field(default_factory=dict)


def evaluate(order: Order, note: Callable[[str], None]) -> list[Scored]:
    """Run an evaluation, or go on with one, and print and write its result.

    Args:
        order: what was asked for.
        note: is given lines of advice.

    Raises:
        EvalError: if it cannot be run; the message says why.
        BadData: if a file, a line or an image cannot be used and may not be left out.
    """
    scorings, plan = order.scorings(), make_plan(order)
    answerer = Answerer.load(order.model, order.device, order.dtype)
    facts = {**_facts(order, plan), **model_facts(answerer)}
    found = {}
    for arm in _arms(order, plan, answerer):
        found[arm.name] = _run(order, plan, arm, {**facts, **arm.facts()}, answerer)
    results = [
        score_arms(
            order.sources.benchmark,
            {name: stored.answers() for name, (_, stored) in found.items()},
            plan.tables,
            how,
            _decoding(order),
        )
        for how in scorings
    ]
    _tell(order, plan, found, results, facts, note)
    return results


def make_plan(order: Order) -> Plan:
    """Read the files and find every image.

    Raises:
        EvalError: if an option is out of range, or there is nothing to ask.
        BadData: if a file, a line or an image cannot be used and may not be left out.
    """
    order.asking.check()
    if order.limit is not None and order.limit < 1:
        raise EvalError(f"--limit {order.limit} must be 1 at least")
    if order.asking.sampling and take_look(order.controls)[1]:
        raise EvalError("carve answers greedily; leave it or --sample out")
    skips = Skips(order.skip_bad)
    items = sample(_there(order, read_items(order.sources, skips)), order.limit, order.seed)
    plan = Plan([], order.sources.tables(), skips)
    for item in items:
        try:
            path = find_image(item, order.asking.images)
        except BadData as error:
            skips.bad(error)
            continue
        if item.image not in plan.files:
            plan.files[item.image] = hashlib.sha256(path.read_bytes()).hexdigest()
        plan.items.append(item)
    if not plan.items:
        raise EvalError(f"none of {len(items)} items has its image in {order.asking.images}")
    return plan


def _there(order: Order, items: list[Item]) -> list[Item]:
    """Return the items to choose from: of CHAIR without a list those that have an image here.

    COCO's annotations are of 40,504 images; a folder with some of them is a choice, no damage.
    """
    if order.sources.benchmark != "chair" or order.sources.ids is not None:
        return items
    here = {path.name for path in order.asking.images.iterdir()}
    found = [item for item in items if item.image in here]
    if not found:
        raise EvalError(f"{order.asking.images} holds no image that the annotations know")
    return found


def _facts(order: Order, plan: Plan) -> dict[str, Any]:
    """Return what the answers of every arm depend on, the arm and the model left out."""
    asked = [(i.id, i.question, i.image, i.truth) for i in plan.items]
    return {
        "benchmark": order.sources.benchmark,
        "items": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "images": hashlib.sha256(json.dumps(plan.files, sort_keys=True).encode()).hexdigest(),
        "prompt": order.asking.prompt,
        "max_new_tokens": order.asking.max_new_tokens,
        "batch": order.asking.batch,
        "decoding": _decoding(order),
        "versions": {**versions(), "pillow": PIL.__version__},
    }


def _decoding(order: Order) -> str:
    return str(order.asking.sampling or "greedy")


def _arms(order: Order, plan: Plan, answerer: Answerer) -> list[Arm]:
    texts, look = take_look(order.controls)
    chosen = tuple(choose(answerer.model, text) for text in texts)
    arms = [Arm("stock")]
    if order.controls:
        name = " + ".join(split_control(text)[0] for text in order.controls)
        arms.append(Arm(name, chosen, look=look))
    if order.mismatched:
        shown = swap_images(plan.items, order.seed)
        arms += [replace(arm, name=f"{arm.name}, wrong image", shown=shown) for arm in arms]
    return arms


def _run(
    order: Order, plan: Plan, arm: Arm, facts: dict[str, Any], answerer: Answerer
) -> tuple[Path, Stored]:
    run = run_key(facts)
    name = "".join(c if c.isalnum() else "-" for c in arm.name).replace("--", "-")
    path = order.out / f"{order.sources.benchmark}-{name}-{run}.jsonl"
    head = {
        "run": run,
        "benchmark": order.sources.benchmark,
        "arm": arm.name,
        "controls": [*map(str, arm.chosen), *([str(arm.look)] if arm.look else [])],
        "facts": facts,
        "tables": plan.tables,
    }
    with AnswerFile(path, head) as file:
        run_arm(arm, plan.items, order.asking, answerer, file, plan.skips)
        return path, file.stored


def _tell(
    order: Order,
    plan: Plan,
    found: dict[str, tuple[Path, Stored]],
    results: Sequence[Scored],
    facts: dict[str, Any],
    note: Callable[[str], None],
) -> None:
    width = terminal_width()
    print("\n\n\n".join(one.text(width) for one in results))
    reasons = list(dict.fromkeys([*plan.skips.reasons, *_skipped(found)]))
    told(reasons, note)
    files = {name: path.name for name, (path, _) in found.items()}
    record = {
        "attnctl_eval_result": 1,
        "model": order.model,
        "controls": list(order.controls),
        "seed": order.seed,
        "limit": order.limit,
        "answers": files,
        "skipped": reasons,
        "facts": facts,
        "results": [one.data() for one in results],
    }
    key = run_key({"files": files, "scorings": [one.data()["scoring"] for one in results]})
    path = order.out / f"{order.sources.benchmark}-result-{key}.json"
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())
    print(f"\n{path}")


def _skipped(found: dict[str, tuple[Path, Stored]]) -> list[str]:
    return [reason for _, stored in found.values() for reason in stored.skipped]


def told(reasons: Sequence[str], note: Callable[[str], None]) -> None:
    """Say how many items were left out, and why the first ones were."""
    if not reasons:
        return
    note(f"{len(reasons)} bad line{'' if len(reasons) == 1 else 's'} or images left out:")
    for reason in reasons[:_TOLD]:
        note(reason)
    if len(reasons) > _TOLD:
        note(f"and {len(reasons) - _TOLD} more; the result file lists them")
