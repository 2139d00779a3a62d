"""The official scorers, unmodified, beside ours on the same answers.

Set ATTNCTL_OFFICIAL to a folder that holds, each cloned under the last part of its name,
github.com/AoiDragon/POPE, DAMO-NLP-SG/VCD, LALBJ/PAI, shikiw/OPERA, junyangwang0410/AMBER,
LisaAnne/Hallucination and Maxlinn/CHAIR-metric-standalone, and `eval_tool`, which is
tools/eval_tool.zip of the branch Evaluation of BradyFU/Awesome-Multimodal-Large-Language-Models,
unpacked. Without it nothing runs here; what else is missing is named where a test is skipped.

CHAIR and AMBER's nouns need nltk with punkt_tab, averaged_perceptron_tagger_eng and wordnet, the
older two CHAIRs also pattern. AMBER's similar words need spaCy and a model with vectors:
ATTNCTL_SPACY is its name or folder, en_core_web_lg without it (another model takes other words
for the same, but on both sides). ATTNCTL_LINES is how many lines of each answer file are
compared, 60 without it. What was compared is printed: pytest -rP.
"""

import contextlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from attnctl.apps.eval import amber_nouns, mme, pope
from attnctl.apps.eval.bad_data import Skips
from attnctl.apps.eval.benchmarks import Scoring, Sources, read_items, tally
from attnctl.apps.eval.estimate import estimate
from attnctl.apps.eval.foreign import read_answers
from attnctl.apps.eval.items import Answer
from attnctl.apps.eval.objects import Objects, read_synonyms
from attnctl.assets.world.export import export

PLACE = Path(os.environ.get("ATTNCTL_OFFICIAL", "no such folder"))
pytestmark = pytest.mark.skipif(not PLACE.is_dir(), reason="ATTNCTL_OFFICIAL is not set")

TEXTS = (
    "Yes.", "No, there is no dog.", "NO", "not sure", "", "yes and no", "There isn't a dog",
    "I know it", "Yes. It is not red.", "Yes", "No", "yes", "no", "Yes, 3.5 of them", "Yes/No",
    "It's a nose.", "eyes",
)  # fmt: skip

TRICKY = (
    "", " ", ".", "The", "A baby bird on a toilet seat.", "The seat of the toilet is up.",
    "Toilets and seats.", "Two baby elephants and an adult bear.",
    "An adult giraffe's baby giraffe.", "A baby. Bird on a wire.",
    "Passenger jets next to passenger trains; a passenger.", "A man in bow ties and a bow tie.",
    "Wine glasses, a wine glass, and a glass of wine.", "three wine-glasses",
    "Eyeglasses and glasses.", "Two buses, one bus, and a school bus.",
    "Skis, skiing skiers, a ski lift.", "He is seated; the seating is full of seats.",
    "Hot dogs vs. hot-dogs vs. hotdogs: a hot, dog.", "dogs' bowls and the dog's bowl",
    "It's a dog's life, isn't it? Can't, won't, cannot, gonna.", "MEN AND WOMEN; Children's toys.",
    "People, persons, folks and a crowd of tourists.",
    "Mice, geese, sheep, oxen, wolves and deer.", "knives, forks & spoons / a knife",
    "scissors and a pair of scissors",
    "a traffic light, traffic lights, a stop light and stop lights",
    "street lights and a street sign, stop signs", "a fire hydrant. Fire hydrants!",
    "parking meters/parking meter", "motor cycles, motorcycles, motor bikes and motorbikes",
    "an air plane, airplanes, aeroplane, planes, jets", "a teddy bear, two teddies, teddy bears",
    "cell phones, a cellphone, a mobile phone and smartphones",
    "laptop computers and a laptop; computers", "a home plate and plates at home; train tracks",
    "a potted plant, potted plants, a plant in a pot", "baseball bats, baseball gloves, baseballs",
    "tennis rackets, a tennis racquet", "hair driers and a hair drier; hair dryer",
    "stove top oven", "a couch, couches, sofas, a love seat",
    "dining tables, a coffee table, tables and a desk",
    "a TV, TVs, tv's, television sets and monitors",
    "The cat\u2019s on the chair\u2014next to a dog\u2026",
    "\u201cA dog,\u201d she said, \u2018and a cat\u2019", "a \"dog\" and a ``cat''",
    "dog/cat, dog-cat, dog_cat, dog.cat", "1. A dog\n2. A cat\n3. Birds",
    "- dogs\n- cats\n\n* a bird", "dog\tcat\rbird\u00a0horse",
    "Mr. Smith's dog sat with Dr. Jones. U.S. planes. The end...", "A dog .A cat. a horse.A cow",
    "a dog(cat)[bird]{horse}<cow>", "#dog @cat $5 horse 100% bear",
    "chiens, Hunde, \u72d7, \U0001f436 dog\U0001f436", "caf\u00e9 tables and na\u00efve cats",
    "an apple's core, apples', oranges", "doughnuts, donuts, a donut's hole",
    "toothbrushes, a tooth brush", "handbags, purses, a suit case, suitcases, luggage",
    "skateboards, skateboarders skateboarding; surfers surfing on surfboards",
    "kites flying, a kite; frisbees, Frisbee",
    "The man is riding horses, horseback riding, and zebras graze.",
    "remotes, remote controls, keyboards, mouses",
    "microwave ovens, ovens, toasters, refrigerators, fridges, sinks",
    "bookshelves, books, booking, booked", "clocks, o'clock, clocked", "vases with flowers",
    "beds, bedding, bedroom", "cups, mugs, bowls, bottles, bottled water",
    "sandwiches, a burger, cheeseburgers, pizzas, cakes, cheesecake", "broccoli, carrots, bananas",
    "boats, ships, boating, a boat house", "trucks, a fire truck, pickups, trains, training",
    "benches, bench pressing, birds, birding", "cows, cattle, calves, bulls, lambs",
    "elephants, bears, polar bears, grizzly bear cubs", "bicycles, bikes, biking, cyclists",
    "cars, a race car, vans, taxis, SUVs, minivans", "umbrellas, parasols, ties, tied, tying",
    "no chairs, not a chair, chairless, chaired, chairs",
)  # fmt: skip
"""Captions that tokenisers, taggers and singular forms may read differently."""

LINES = int(os.environ.get("ATTNCTL_LINES", "60"))

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


WORLD = "the shape world's file"


@pytest.mark.parametrize(
    "file", ["coco/coco_pope_adversarial.json", "seem/gqa/gqa_pope_seem_random.json", WORLD]
)
def test_pope(file: str, tmp_path: Path) -> None:
    questions = PLACE / "POPE" / "output" / file
    if file == WORLD:
        questions = export(tmp_path, n_images=40, seed=0) / "pope/coco_pope_adversarial.json"
    items = pope.read(questions, Skips())
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


def _needs_nltk() -> None:
    """Skip without nltk or what the scorers need of its data."""
    nltk = pytest.importorskip("nltk")
    for name in (
        "tokenizers/punkt_tab/english", "taggers/averaged_perceptron_tagger_eng",
        "corpora/wordnet",
    ):  # fmt: skip
        try:
            nltk.data.find(name)
        except LookupError:
            pytest.skip(f"nltk {nltk.__version__} has no {name}")


def _vectors() -> str:
    """The spaCy model; skips without it."""
    spacy = pytest.importorskip("spacy")
    model = os.environ.get("ATTNCTL_SPACY", "en_core_web_lg")
    if not (spacy.util.is_package(model) or Path(model).is_dir()):
        pytest.skip(f"spaCy {spacy.__version__} has no model {model}")
    return model


def _responses(items: Sequence[Any], nouns: amber_nouns.Nouns) -> list[str]:
    """For each picture real descriptions of other ones, and sentences with its own words."""
    chance, known = random.Random(0), sorted(nouns.known)
    real = [text for texts in _captions().values() for text in texts[:LINES]]
    told = []
    for number, item in enumerate(items):
        truth, invented = item.truth["truth"], item.truth["hallu"]
        one, two, three = (chance.choice(words) for words in (truth, [*truth, *invented], known))
        told.append(
            f"{chance.choice(real)} The {one} is near two {two}s, and {three.title()}es or a"
            f" {three}'s {one} are {two}ing behind it."
        )
        if number % 4 == 0:
            told[-1] = TRICKY[number // 4 % len(TRICKY)]
    return told


def test_amber_nouns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nouns by nltk's own tokens, tags and lemmas, and figures, of each response and of all."""
    _needs_nltk()
    model = _vectors()
    import spacy

    language = lru_cache(maxsize=None)(spacy.load(model))  # the official script parses anew
    monkeypatch.setattr(spacy, "load", lambda name: language)
    sources = Sources("amber", PLACE / "AMBER/data", split="g")
    items, tables = read_items(sources, Skips())[: 2 * LINES], sources.tables()
    nouns = amber_nouns.read_nouns(PLACE / "AMBER/data")
    told = _responses(items, nouns)
    official = types.ModuleType("official")
    exec(_source("AMBER/inference.py").split("if __name__ ==")[0], vars(official))

    find, named, differ = amber_nouns.finder("lemma", nouns.known), 0, []
    for text in told:
        theirs = [noun for noun in official.extract_nouns(text) if noun in nouns.known]
        named += len(theirs)
        if find(text) != theirs:
            differ.append((text, find(text), theirs))
    assert differ == []

    # the official counts begin at 0.001, which shows in a single line's figures
    start = (PLACE / "AMBER/data/metrics.txt").read_text()
    (tmp_path / "zeros.txt").write_text(start.replace("0.001", "0"))
    rows = [{"id": int(i.id), "response": text} for i, text in zip(items, told, strict=True)]
    scored = 0
    for some in (*([row] for row in rows), rows):
        (tmp_path / "r.json").write_text(json.dumps(some))
        answers = read_answers("amber", tmp_path / "r.json", items, Skips())
        ours = figures("amber", answers, Scoring(None, "lemma", f"spacy:{model}"), tables)
        found = _amber_figures(official, tmp_path, begin="zeros.txt")
        if found is None:
            assert ours["chair"] == 0
            continue
        assert {key: round(100 * ours[key], 1) for key in found} == found, some[:1]
        scored += 1
    whole = _amber_figures(official, tmp_path, begin="")
    assert whole == {key: round(100 * ours[key], 1) for key in whole}
    exact = figures("amber", answers, Scoring(None, "lemma", "exact"), tables)
    assert any(ours[key] != exact[key] for key in whole)
    print(f"AMBER: {len(rows)} responses, {named} nouns, {scored} scored, none differs; {whole}")
    assert named > 3 * len(rows) and scored > len(rows) / 2


def _amber_figures(official: Any, folder: Path, begin: str) -> dict[str, float] | None:
    """Run the official script on r.json; None if no answer has a noun of the vocabulary."""
    arguments = _amber_arguments(PLACE / "AMBER/data", folder / "r.json", "g")
    if begin:
        arguments[arguments.index("--metrics") + 1] = str(folder / begin)
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(sys, "argv", ["inference.py", *arguments])
        official.args = official.get_args()
        try:
            official.main(official.args)
        except ZeroDivisionError:
            return None
    found = numbers(told.getvalue())
    assert set(found) == {"chair", "cover", "hal", "cog"}
    return found


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


CHAIRS = {
    "Hallucination/utils/chair.py": "pattern",
    "CHAIR-metric-standalone/chair.py": "pattern",
    "OPERA/chair.py": "lemma",
    "PAI/chair.py": "lemma",
}
"""The copies of CHAIR's code, and the way to words of each."""


def _official_chair(file: str, monkeypatch: pytest.MonkeyPatch, **names: Any) -> Any:
    """Return the class of a copy, without annotations; names replace those of its module."""
    _needs_nltk()
    for package in ("tqdm", *(("pattern.en",) if CHAIRS[file] == "pattern" else ())):
        pytest.importorskip(package)
    code = _source(file).split("if __name__ ==")[0]
    if file.startswith("Hallucination"):  # Python 2
        code = re.sub(r"print ([^(\n].*)$", r"print(\1)", code, flags=re.MULTILINE)
        code = code.replace("from misc import *", "import os")
    official = types.ModuleType("official")
    exec(code, vars(official))
    vars(official).update(names)
    monkeypatch.chdir(PLACE / "Hallucination")  # reads its table from there
    return official.CHAIR


def _judge(file: str, monkeypatch: pytest.MonkeyPatch, truth: Mapping[int, set[str]]) -> Any:
    """Return an official evaluator that knows the objects of pictures."""
    chair = _official_chair(file, monkeypatch)
    monkeypatch.setattr(chair, "get_annotations", lambda self: None)
    judge = chair([], "") if file.startswith("Hallucination") else chair("")
    judge.imid_to_objects = dict(truth)
    return judge


def _known_objects() -> dict[int, set[str]]:
    """The objects of COCO's pictures, by the standalone version's own file."""

    class Known(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return type(name, (), {}) if name == "CHAIR" else super().find_class(module, name)

    with (PLACE / "CHAIR-metric-standalone/chair.pkl").open("rb") as data:
        return dict(Known(data).load().imid_to_objects)


def _captions() -> dict[str, list[str]]:
    """Answer files of other people's models, by name."""
    found = {}
    for path in sorted((PLACE / "OPERA/log/chair_eval_results").rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
        found[f"{path.parent.name}/{path.stem}"] = [row["caption"] for row in rows]
    for path in sorted((PLACE / "POPE/caption_data").glob("Instruction?_*.json")):
        texts = [row["text"] for row in _rows(path.read_text())]
        found[path.stem] = [text for text in texts if isinstance(text, str)]
    return found


def _rows(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects one after another, or an array of them."""
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        row, end = decoder.raw_decode(text)
        yield row
        text = text[end:]


@pytest.mark.parametrize("file", CHAIRS)
def test_chair_words(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objects of every line, in their order, from other models' files and ours."""
    judge, words = _judge(file, monkeypatch, {}), CHAIRS[file]
    table = read_synonyms(PLACE / "Hallucination/data/synonyms.txt")
    ours, rule = Objects(table, words), Objects(table, "rule")
    files = {"tricky": TRICKY, **_captions()}
    differ, lines_seen, mentions, by_rule = [], 0, 0, 0
    for name, texts in files.items():
        for text in texts if name == "tricky" else texts[:LINES]:
            theirs = judge.caption_to_words(text)[1]
            lines_seen, mentions = lines_seen + 1, mentions + len(theirs)
            by_rule += rule(text) != theirs
            if ours(text) != theirs:
                differ.append((name, text, ours(text), theirs))
    print(
        f"{file}: {lines_seen} lines of {len(files)} files, {mentions} mentions, "
        f"{len(differ)} lines differ; by rule {by_rule}"
    )
    assert differ == [] and mentions > 2 * lines_seen


@pytest.mark.parametrize("file", CHAIRS)
def test_chair(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures, and what is wrong in each line, of LLaVA-1.5's descriptions of COCO's photos."""
    objects = _known_objects()
    told = PLACE / "OPERA/log/chair_eval_results/llava-1.5/greedy.jsonl"
    rows = [json.loads(line) for line in told.read_text().splitlines()[:LINES]]
    rows = [{key: row[key] for key in ("image_id", "caption")} for row in rows]
    assert all(row["image_id"] in objects for row in rows)
    truth = {row["image_id"]: objects[row["image_id"]] for row in rows}
    lines(tmp_path / "captions.jsonl", rows)
    if file.startswith("Hallucination"):
        names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "CIDEr", "SPICE", "ROUGE_L")
        zeros = dict.fromkeys(names, 0)
        by_image = {str(row["image_id"]): {**row, **zeros} for row in rows}
        arguments: tuple[str, ...] = (str(tmp_path / "captions.json"),)
        Path(*arguments).write_text(json.dumps({"overall": zeros, "imgToEval": by_image}))
    else:
        arguments = (str(tmp_path / "captions.jsonl"), "image_id", "caption")
    found = _judge(file, monkeypatch, truth).compute_chair(*arguments)

    synonyms = PLACE / "Hallucination/data/synonyms.txt"
    _coco(tmp_path, truth)
    sources = Sources("chair", tmp_path, synonyms)
    _same_chair(found, tmp_path / "captions.jsonl", sources, CHAIRS[file])
    assert found["overall_metrics"]["CHAIRi"] > 0.05


def _same_chair(found: Any, answer_file: Path, sources: Sources, words: str) -> None:
    """Compare the official result with ours, line by line and as a whole."""
    answers = read_answers("chair", answer_file, read_items(sources, Skips()), Skips())
    counts = tally("chair", list(answers.values()), sources.tables(), Scoring(words=words)).counts
    for number, line in enumerate(found["sentences"]):
        theirs = (
            len(line["mscoco_hallucinated_words"]), len(line["mscoco_generated_words"]),
            len({*line["mscoco_generated_words"]} & {*line["mscoco_gt_words"]}),
            len({*line["mscoco_gt_words"]}),
        )  # fmt: skip
        ours = tuple(int(counts[key][number]) for key in ("wrong", "mentions", "found", "there"))
        assert ours == theirs, line
    whole, said = figures("chair", answers, Scoring(words=words), sources.tables()), []
    for name, key in (
        ("chair_s", "CHAIRs"), ("chair_i", "CHAIRi"), ("recall", "Recall"),
        ("precision", "Precision"), ("f1", "F1"),
    ):  # fmt: skip
        if key in found["overall_metrics"]:
            assert whole[name] == pytest.approx(found["overall_metrics"][key], abs=1e-12)
            said.append(f"{key} {100 * whole[name]:.2f}")
    print(f"{words}: {len(found['sentences'])} lines, none differs; {', '.join(said)}")


def test_chair_of_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The world's exported files, with the truth that the official code reads from them."""
    export(tmp_path, n_images=40, seed=0)
    pairs = [" ".join(line) for line in read_synonyms(tmp_path / "synonyms.txt")]
    chair = _official_chair(
        "OPERA/chair.py", monkeypatch, synonyms_txt=(tmp_path / "synonyms.txt").read_text()
    )
    read = chair.get_annotations

    def with_pairs(self: Any) -> None:  # its list of double words holds COCO's only
        self.double_word_dict.update({pair: pair for pair in pairs})
        read(self)

    monkeypatch.setattr(chair, "get_annotations", with_pairs)
    told = json.loads((tmp_path / "annotations/captions_val2014.json").read_text())
    texts = {row["image_id"]: row["caption"] for row in told["annotations"]}
    moved = [*texts.values()][3:] + [*texts.values()][:3]  # about other photos: many are wrong
    rows = [
        {"image_id": number, "caption": f"{right} {other}s" if number % 2 else other}
        for (number, right), other in zip(texts.items(), moved, strict=True)
    ]
    lines(tmp_path / "captions.jsonl", rows)
    with contextlib.redirect_stdout(io.StringIO()):
        judge = chair(str(tmp_path / "annotations"))
    found = judge.compute_chair(str(tmp_path / "captions.jsonl"), "image_id", "caption")
    sources = Sources("chair", tmp_path / "annotations", tmp_path / "synonyms.txt")
    _same_chair(found, tmp_path / "captions.jsonl", sources, "lemma")
    assert 0.1 < found["overall_metrics"]["CHAIRi"] < 0.9


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
