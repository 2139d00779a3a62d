"""The plug-ins inside the programs themselves, where these are installed.

lmms-eval: `pip install lmms-eval datasets` (0.7.3 was run). VLMEvalKit: set ATTNCTL_OFFICIAL to a
folder that holds a clone of github.com/open-compass/VLMEvalKit (commit e8e78f0 was run); its
package of data sets, which needs some forty more packages, is left out. What is missing is named
where a test is skipped: pytest -rs.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from attnctl import assets
from attnctl.apps.chosen import Chosen
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.eval.answering import Answerer, chat
from attnctl.apps.eval.arms import patched
from attnctl.assets.world.pope import Case, pope

pytestmark = pytest.mark.skipif("tiny-llava" not in assets.names(), reason="no tiny-llava here")

STRONG = "pai:alpha=6,rows=answer"
SUFFIX = "\nAnswer the question using a single word or phrase."
VLMEVALKIT = Path(os.environ.get("ATTNCTL_OFFICIAL", "no such folder")) / "VLMEvalKit"


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return pope("adversarial", 4, 0)


def told(cases: list[Case], suffix: str, batch: int) -> list[str]:
    """Return the answers of tiny-llava with the control, and see that they aren't stock's."""
    answerer, found = Answerer.load("tiny-llava", "cpu"), []
    for chosen in ((Chosen(parse_control(STRONG)),), ()):
        with patched(answerer.model, chosen):
            parts = [cases[i : i + batch] for i in range(0, len(cases), batch)]
            replies = [
                answerer.reply(
                    [chat(c.question + suffix) for c in part], [[c.image] for c in part], 128
                )
                for part in parts
            ]
        found.append([reply.text for part in replies for reply in part])
    assert found[0] != found[1]
    return found[0]


def test_lmms_eval_runs_its_own_pope_with_a_control(cases: list[Case], tmp_path: Path) -> None:
    """Its command, its task and its scorer; only the data set's place is another."""
    lmms = pytest.importorskip("lmms_eval")
    datasets = pytest.importorskip("datasets")
    if "attnctl" not in {one.name for one in entry_points(group="lmms_eval.models")}:
        pytest.skip("attnctl was installed before it had this entry point; install it again")
    rows = []
    for i, case in enumerate(cases):
        case.image.save(tmp_path / f"{i}.png")
        about = {"question_id": str(i), "question": case.question, "answer": case.label}
        rows.append({**about, "image": str(tmp_path / f"{i}.png")})
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "test.parquet")
    task = tmp_path / "task"
    task.mkdir()
    official = Path(lmms.__file__).parent / "tasks/pope"
    (task / "utils.py").write_bytes((official / "utils.py").read_bytes())
    text = (official / "pope.yaml").read_text()
    for old, new in (
        (r"dataset_path: .*", "dataset_path: parquet"),
        (r"token: True", f"data_files:\n    test: {tmp_path / 'test.parquet'}"),
        (r'task: "pope"', "task: ours"),
    ):
        text, n = re.subn(old, new, text)
        assert n == 1
    (task / "ours.yaml").write_text(text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf")}
    subprocess.run(
        [sys.executable, "-P", "-m", "lmms_eval", "--model", "attnctl", "--tasks", "ours",
         "--include_path", str(task), "--batch_size", "8", "--device", "cpu", "--log_samples",
         "--output_path", str(tmp_path / "out"),
         "--model_args", f'pretrained=tiny-llava,control="{STRONG}"'],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("*_samples_ours.jsonl")
    found = {row["doc_id"]: row for row in map(json.loads, samples.read_text().splitlines())}
    answers = told(cases, SUFFIX, 8)
    assert [found[i]["pope_accuracy"]["prediction"] for i in range(len(cases))] == [
        one.lower() for one in answers
    ]
    (result,) = (tmp_path / "out").rglob("*_results.json")
    figures = json.loads(result.read_text())["results"]["ours"]
    right = sum(a.lower() == c.label for a, c in zip(answers, cases, strict=True))
    assert figures["pope_accuracy,none"] == pytest.approx(right / len(cases))


@pytest.fixture
def vlmevalkit(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.ModuleType]]:
    """VLMEvalKit's modules: its own base class and what that imports, no data sets, no models."""
    if not VLMEVALKIT.is_dir():
        pytest.skip("ATTNCTL_OFFICIAL is not set, or holds no VLMEvalKit")
    made = {}
    for name, place in (
        ("vlmeval", "vlmeval"),
        ("vlmeval.vlm", "vlmeval/vlm"),
        ("vlmeval.dataset", "none"),
        ("vlmeval.config", "none"),
    ):
        made[name] = types.ModuleType(name)
        made[name].__path__ = [str(VLMEVALKIT / place)]
        monkeypatch.setitem(sys.modules, name, made[name])
    vars(made["vlmeval.dataset"])["DATASET_TYPE"] = lambda name, default=None: "Y/N"
    vars(made["vlmeval.config"])["supported_VLM"] = {}
    try:
        importlib.import_module("vlmeval.vlm.base")
    except ModuleNotFoundError as error:
        pytest.skip(f"VLMEvalKit needs {error.name}")
    yield made
    for name in [one for one in sys.modules if one.split(".")[0] == "vlmeval"]:
        monkeypatch.delitem(sys.modules, name)
    sys.modules.pop("attnctl.apps.plugins.vlmevalkit_model", None)


def test_vlmevalkits_own_base_class(
    cases: list[Case], vlmevalkit: dict[str, types.ModuleType], tmp_path: Path
) -> None:
    """Messages in the two forms that its `generate` takes."""
    module = importlib.import_module("attnctl.apps.plugins.vlmevalkit_model")
    assert Path(sys.modules["vlmeval.vlm.base"].__file__ or "").is_relative_to(VLMEVALKIT)
    module.register("pai", "tiny-llava", STRONG, max_new_tokens=128, device="cpu")
    model = vlmevalkit["vlmeval.config"].supported_VLM["pai"]()
    found: list[list[str]] = [[], []]
    for case in cases:
        place = str(tmp_path / "a.png")
        case.image.save(place)
        parts = [("image", place), ("text", case.question)]
        found[0].append(model.generate([{"type": t, "value": v} for t, v in parts], "POPE"))
        found[1].append(model.generate([value for _, value in parts], "POPE"))
    assert found[0] == found[1] == told(cases, "", 1)
