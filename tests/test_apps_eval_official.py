"""The official scorers, unmodified, beside ours on the same answers.

Set ATTNCTL_OFFICIAL to a folder that holds, each cloned under the last part of its name,
github.com/AoiDragon/POPE, DAMO-NLP-SG/VCD, LALBJ/PAI, junyangwang0410/AMBER and
Maxlinn/CHAIR-metric-standalone, and `eval_tool`, which is tools/eval_tool.zip of the branch
Evaluation of BradyFU/Awesome-Multimodal-Large-Language-Models, unpacked. CHAIR needs nltk with
its data, and pattern. AMBER's descriptions are also compared with spaCy's own vectors, where it is
installed: those of the model that ATTNCTL_SPACY names, en_core_web_lg without it (a small model
takes other words for the same, but on both sides). Without ATTNCTL_OFFICIAL nothing runs here.
"""

import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnctl.apps.eval import amber_nouns, mme, pope
from attnctl.apps.eval.bad_data import Skips
from attnctl.apps.eval.benchmarks import Scoring, Sources, read_items, tally
from attnctl.apps.eval.estimate import estimate
from attnctl.apps.eval.foreign import read_answers
from attnctl.apps.eval.items import Answer

PLACE = Path(os.environ.get("ATTNCTL_OFFICIAL", "no such folder"))
pytestmark = pytest.mark.skipif(not PLACE.is_dir(), reason="ATTNCTL_OFFICIAL is not set")

TEXTS = (
    "Yes.", "No, there is no dog.", "NO", "not sure", "", "yes and no", "There isn't a dog",
    "I know it", "Yes. It is not red.", "Yes", "No", "yes", "no", "Yes, 3.5 of them", "Yes/No",
    "It's a nose.", "eyes",
)  # fmt: skip

FAKES = """
import sys, types
def fake(name, **names):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(names)
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def figures(benchmark: str, answers: Any, how: Scoring, tables: Any = None) -> dict[str, float]:
    found = estimate(tally(benchmark, list(answers.values()), tables or {}, how))
    return {key: one.value for key, one in found.items()}


def numbers(told: str) -> dict[str, float]:
    pairs = re.findall(r"^\s*([\w ]+?)\s*:\s*([\d.]+)\s*$", told, re.MULTILINE)
    return {key.lower(): float(value) for key, value in pairs}


def lines(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "file", ["coco/coco_pope_adversarial.json", "seem/gqa/gqa_pope_seem_random.json"]
)
def test_pope(file: str, tmp_path: Path) -> None:
    items = pope.read(PLACE / "POPE" / "output" / file, Skips())
    chance = random.Random(0)
    answers = {one.id: Answer(one, chance.choice(TEXTS)) for one in items}
    rows = [(one.item, one.text) for one in answers.values()]
    names = ("accuracy", "precision", "recall", "f1", "yes")

    told = lines(tmp_path / "a", [{"question": i.question, "answer": t} for i, t in rows])
    gold = lines(tmp_path / "l", [i.truth for i, _ in rows])
    code = (PLACE / "POPE/evaluate.py").read_text()
    code = code.replace("ans_file = ''", f"ans_file = {told!r}")
    found = numbers(run(code.replace("label_file = ''", f"label_file = {gold!r}")))
    wanted = ("accuracy", "precision", "recall", "f1 score", "yes ratio")
    ours = figures("pope", answers, Scoring())
    assert [ours[name] for name in names] == [found[name] for name in wanted]

    lines(tmp_path / "a", [{"ans": t, "label": int(i.truth["label"] == "yes")} for i, t in rows])
    found = numbers(run((PLACE / "PAI/pope_ans.py").read_text(), "--ans_file", told))
    ours = figures("pope", answers, Scoring("pai"))
    assert [ours[name] for name in names] == [found[name] for name in wanted]

    lines(tmp_path / "a", [{"question_id": i.id, "text": t} for i, t in rows])
    lines(tmp_path / "l", [{"question_id": i.id, **i.truth} for i, _ in rows])
    code = FAKES + "fake('tqdm', tqdm=list)\n" + _source("VCD/experiments/eval/eval_pope.py")
    found = numbers(run(code, "--gt_files", gold, "--gen_files", told))
    ours = figures("pope", answers, Scoring("vcd"))
    wanted = ("accuracy", "precision", "recall", "f1", "yes")
    assert [ours[name] for name in names] == [found[name] for name in wanted]


def _source(file: str) -> str:
    return (PLACE / file).read_text(encoding="utf-8")


def test_mme(tmp_path: Path) -> None:
    tool, chance = PLACE / "eval_tool", random.Random(0)
    items = mme.read(tool / "Your_Results", Skips())
    for task in (*mme.PERCEPTION, *mme.COGNITION):
        asked = (tool / "Your_Results" / f"{task}.txt").read_text(encoding="utf-8").splitlines()
        with_answers = "".join(f"{line.rstrip()}\t{chance.choice(TEXTS)}\n" for line in asked)
        (tmp_path / f"{task}.txt").write_text(with_answers, encoding="utf-8")
    fakes = FAKES + (
        "fake('sklearn')\n"
        "share = lambda a, b: sum(x == y for x, y in zip(a, b)) / len(a)\n"
        "fake('sklearn.metrics', accuracy_score=share, precision_score=lambda *a, **k: 0,\n"
        "     recall_score=lambda *a, **k: 0, confusion_matrix=lambda *a, **k: [[0, 0]] * 2)\n"
    )
    for folder in (tool / "LaVIN", tmp_path):
        told = run(fakes + _source("eval_tool/calculation.py"), "--results_dir", str(folder))
        ours = figures("mme", read_answers("mme", folder, items, Skips()), Scoring())
        found = {k: float(v) for k, v in re.findall(r"(\w+)\s+score: ([\d.]+)", told)}
        totals = [float(v) for v in re.findall(r"total score: ([\d.]+)", told)]
        assert len(items) == 2374 and len(found) == 15
        for task in (*mme.PERCEPTION, *mme.COGNITION):
            assert ours[task] == pytest.approx(found[task], abs=1e-9)
        assert [ours["perception"], ours["cognition"]] == pytest.approx(totals, abs=1e-9)


def _amber_arguments(data: Path, responses: Path, kind: str) -> list[str]:
    arguments = ["--inference_data", str(responses), "--evaluation_type", kind]
    for option, file in (
        ("word_association", "relation.json"), ("safe_words", "safe_words.txt"),
        ("annotation", "annotations.json"), ("metrics", "metrics.txt"),
    ):  # fmt: skip
        arguments += [f"--{option}", str(data / file)]
    return arguments


def test_amber_with_spacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptions with spaCy's own vectors on both sides; nltk's parts are replaced."""
    spacy = pytest.importorskip("spacy")
    model = os.environ.get("ATTNCTL_SPACY", "en_core_web_lg")
    if not spacy.util.is_package(model):
        pytest.skip(f"spaCy has no model {model}")
    data, chance = PLACE / "AMBER/data", random.Random(0)
    sources = Sources("amber", data, split="g")
    items, tables = read_items(sources, Skips())[:40], sources.tables()
    known = sorted(amber_nouns.read_nouns(data).known)

    def said(truth: Mapping[str, Any]) -> str:
        words = [*truth["truth"], *truth["hallu"], *chance.sample(known, 5)]
        return " a ".join(chance.sample(words, min(9, len(words))))

    rows = [{"id": int(one.id), "response": said(one.truth)} for one in items]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    fakes = FAKES + _nltk(known) + (
        f"import spacy\nload = spacy.load\nspacy.load = lambda name: load({model!r})\n"
    )  # fmt: skip
    arguments = _amber_arguments(data, tmp_path / "r.json", "g")
    found = numbers(run(fakes + _source("AMBER/inference.py"), *arguments))
    monkeypatch.setattr(amber_nouns, "tokens", str.split)
    answers = read_answers("amber", tmp_path / "r.json", items, Skips())
    ours, exact = (
        figures("amber", answers, Scoring(None, "rule", alike), tables)
        for alike in (f"spacy:{model}", "exact")
    )
    assert set(found) == {"chair", "cover", "hal", "cog"}
    assert {key: round(100 * ours[key], 1) for key in found} == found
    assert ours["chair"] != exact["chair"] or ours["cover"] != exact["cover"]


def _nltk(known: Sequence[str]) -> str:
    """Blanks part words, the vocabulary's words are nouns."""
    return (
        f"known = set({known!r})\n"
        "class Same:\n    lemmatize = lambda self, word: word\n"
        "fake('nltk', word_tokenize=str.split,\n"
        "     pos_tag=lambda words: [(w, 'NN' if w in known else 'X') for w in words])\n"
        "fake('nltk.stem', WordNetLemmatizer=Same)\nfake('tqdm', tqdm=list)\n"
    )


def test_amber(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, chance = PLACE / "AMBER/data", random.Random(0)
    sources = Sources("amber", data)
    items, tables = read_items(sources, Skips()), sources.tables()
    known = sorted(amber_nouns.read_nouns(data).known)

    def said(truth: Mapping[str, Any]) -> str:
        if "label" in truth:
            return chance.choice(["Yes", "No", "Yes.", "no", truth["label"].title()])
        words = [*truth["truth"], *truth["hallu"], *chance.sample(known, 3)]
        return " a ".join(chance.sample(words, chance.randint(0, min(9, len(words)))))

    rows = [{"id": int(one.id), "response": said(one.truth)} for one in items]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    # three equal letters make words alike
    fakes = FAKES + _nltk(known) + (
        "class Word(str):\n"
        "    similarity = lambda self, other: float(self == other or self[:3] == other[:3])\n"
        "fake('spacy', load=lambda name: Word)\n"
    )  # fmt: skip
    arguments = _amber_arguments(data, tmp_path / "r.json", "a")
    told = run(fakes + _source("AMBER/inference.py"), *arguments)
    monkeypatch.setattr(amber_nouns, "tokens", str.split)
    monkeypatch.setattr(amber_nouns, "alike", lambda name: lambda a, b: a == b or a[:3] == b[:3])
    answers = read_answers("amber", tmp_path / "r.json", items, Skips())
    ours = figures("amber", answers, Scoring(), tables)
    compared = 0
    for part in re.split(r"\n(?=\w+(?: Task)?:\s*\n)", told):
        head = part.split(":")[0].strip()
        names = {"Generative Task": "", "Descriminative Task": "all ", "Exsitence": "existence "}
        for key, value in numbers(part.split("\n", 1)[1]).items():
            name = names.get(head, f"{head.lower()} ") + key
            assert round(100 * ours[name], 1) == pytest.approx(value, abs=1e-9), name
            compared += 1
    assert compared == 4 + 4 * 7


@pytest.mark.parametrize(
    ("words", "file"),
    [("pattern", "CHAIR-metric-standalone/chair.py"), ("lemma", "PAI/chair.py")],
)
def test_chair(words: str, file: str, tmp_path: Path) -> None:
    for package in ("nltk", "pattern.en", "tqdm"):
        pytest.importorskip(package)
    official = types.ModuleType("official")
    exec(_source(file).split("if __name__ ==")[0], vars(official))

    class Known(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return official.CHAIR if name == "CHAIR" else super().find_class(module, name)

    with (PLACE / "CHAIR-metric-standalone/chair.pkl").open("rb") as data:
        judge = Known(data).load()
    told = (PLACE / "POPE/caption_data/Instruction1_mmgpt.json").read_text().splitlines()
    rows = [json.loads(line) for line in told[:300]]
    captions = [{"image_id": int(row["image_id"]), "caption": row["text"]} for row in rows]
    file_of = tmp_path / "captions.jsonl"
    lines(file_of, captions)
    found = judge.compute_chair(str(file_of), "image_id", "caption")["overall_metrics"]

    (tmp_path / "synonyms.txt").write_text(_table(PLACE / "CHAIR-metric-standalone/chair.py"))
    _coco(tmp_path, {row["image_id"]: judge.imid_to_objects[row["image_id"]] for row in captions})
    sources = Sources("chair", tmp_path)
    answers = read_answers("chair", file_of, read_items(sources, Skips()), Skips())
    ours = figures("chair", answers, Scoring(words=words), sources.tables())
    for name, key in (("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall")):
        assert ours[name] == pytest.approx(found[key], abs=1e-12)
    assert found["CHAIRi"] > 0.05


def _table(script: Path) -> str:
    """The synonyms that the standalone script holds."""
    found = re.search(r"synonyms_txt = '''\n(.*?)'''", script.read_text(), re.DOTALL)
    assert found
    return found[1]


def _coco(folder: Path, objects: Mapping[int, set[str]]) -> None:
    """Annotations that give each image the objects that the official evaluator knows."""
    names = sorted(set().union(*objects.values()))
    told = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in objects],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "category_id": names.index(name)}
            for i, found in objects.items()
            for name in found
        ],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(told))
    (folder / "captions_val2014.json").write_text(json.dumps({"annotations": []}))
