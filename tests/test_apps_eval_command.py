"""The command on the shape world with tiny-llava: result, resume after kill -9, plug-ins."""

import json
import random
import shutil
import signal
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import attnctl
from attnctl import assets
from attnctl.apps import cli
from attnctl.apps.bench.nursery import nursery
from attnctl.apps.chosen import Chosen
from attnctl.apps.eval import arms, command
from attnctl.apps.eval.answer_file import load
from attnctl.apps.eval.answering import Answerer, Reply, model_facts
from attnctl.apps.eval.second_look import SecondLook
from attnctl.assets.world.export import export

pytestmark = pytest.mark.skipif("tiny-llava" not in assets.names(), reason="no tiny-llava here")

POPE = "pope/coco_pope_adversarial.json"
PAI = "pai:alpha=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("data"), 4, seed=1)


def words(data: Path, out: Path, *more: str, benchmark: str = "pope") -> list[str]:
    files = {"pope": POPE, "chair": "annotations"}[benchmark]
    return [
        "eval", benchmark, "--model", "tiny-llava", "--images", str(data / "val2014"),
        "--annotations", str(data / files), "--out", str(out), "--batch", "6", "--device", "cpu",
        *more,
    ]  # fmt: skip


def answers(out: Path, arm: str) -> Path:
    (found,) = out.glob(f"*-{arm}-[0-9a-f]*.jsonl")
    return found


def result(out: Path) -> dict[str, Any]:
    (found,) = out.glob("*-result-*.json")
    return json.loads(found.read_text())


def test_pope_with_a_control_and_wrong_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--control", PAI, "--mismatched", "--limit", "12", "--parser", "official")
    assert cli.run(words(data, tmp_path, *more, "--parser", "lmms-eval")) == 0
    told = capsys.readouterr().out
    assert "pope, parser: official, 12 items" in told and "parser: lmms-eval" in told
    found = result(tmp_path)
    names = ["stock", "pai", "stock, wrong image", "pai, wrong image"]
    assert list(found["answers"]) == names and len(found["results"]) == 2
    stock, pai, wrong = (load(tmp_path / found["answers"][name]).answers() for name in names[:3])
    gold = [one.text == one.item.truth["label"].title() for one in stock.values()]
    figures = found["results"][0]["figures"]
    assert figures["stock"]["accuracy"][0] == sum(gold) / 12
    gain = found["results"][0]["gains"]["pai"]["accuracy"]
    assert gain[0] == pytest.approx(figures["pai"]["accuracy"][0] - sum(gold) / 12)
    assert [one.text for one in stock.values()] != [one.text for one in pai.values()]
    assert [one.text for one in stock.values()] != [one.text for one in wrong.values()]
    files = [str(tmp_path / found["answers"][name]) for name in names[:2]]
    assert cli.run(["eval", "score", *files, "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())["results"][0]
    assert list(again["figures"].values()) == [figures["stock"], figures["pai"]]
    assert cli.run(["eval", "score", files[0], "--parser", "capital"]) == 2
    assert "pope has official, pai, vcd" in capsys.readouterr().err


def test_chair_and_its_second_score(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = ("--max-new-tokens", "40", "--prompt", "{question}")
    assert cli.run(words(data, tmp_path, *length, benchmark="chair")) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("CHAIR_s", "recall", "distinct-2", "words", "F1"))
    file = answers(tmp_path, "stock")
    captions = tmp_path / "captions.jsonl"
    rows = [{"image_id": int(k), "caption": one.text} for k, one in load(file).answers().items()]
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    foreign = ("--benchmark", "chair", "--annotations", str(data / "annotations"))
    assert cli.run(["eval", "score", str(captions), *foreign, "--out", str(tmp_path / "r")]) == 0
    again = json.loads((tmp_path / "r").read_text())["results"][0]["figures"]["captions"]
    first = result(tmp_path)["results"][0]["figures"]["stock"]
    assert {k: v for k, v in again.items() if k != "ended"} == {
        k: v for k, v in first.items() if k != "ended"
    }


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--limit", "0"), "--limit 0 must be 1"),
        (("--batch", "0"), "must be 1 at least"),
        (("--prompt", "Well?"), "does not hold {question}"),
        (("--images", "nowhere"), "--images nowhere is no folder"),
        (("--ids", "x"), "--ids is an option of chair"),
        (("--parser", "loud"), "there is no parser 'loud'"),
        (("--model", "tiny-lava"), "there is no model 'tiny-lava'"),
        (("--control", "pay"), "pay"),
        (("--control", "pai:rows=none"), "rows"),
        (("--control", "carve:p=7"), "carve: p=7.0 must be above 0"),
        (("--control", "carve:regions=few"), "carve: regions=few cannot be read"),
        (("--control", "carve:size=2"), "carve has no option 'size' here; it has p, regions"),
        (("--control", "carve", "--control", "carve:p=0.2"), "carve is given 2 times"),
        (("--sample", "--control", "carve"), "carve answers greedily"),
        (("--sample", "--temperature", "0"), "--temperature 0.0 must be above 0"),
        (("--sample", "--temperature", "nan"), "--temperature nan must be above 0"),
        (("--sample", "--top-p", "2"), "--top-p 2.0 must be above 0, and 1 at most"),
        (("--top-p", "0.5"), "--temperature and --top-p go with --sample"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(
    more: tuple[str, ...], told: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    assert cli.run(words(data, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


CARVE = "carve:p=0.2,regions=1,steps=start,layers=1-2,lam=0.001,inputs=both,form=crop"


def test_a_second_look_among_the_controls(data: Path, tmp_path: Path) -> None:
    """Its answers are those of `attnctl.Carver`; a run that was cut ends with the same file."""
    chosen = ("--limit", "12", "--control", PAI, "--control", CARVE, "--max-new-tokens", "4")
    assert cli.run(words(data, tmp_path / "a", *chosen)) == 0
    assert result(tmp_path / "a")["controls"] == [PAI, CARVE]
    file = answers(tmp_path / "a", "pai--carve")
    whole, stored = file.read_bytes(), load(file)
    assert stored.head["controls"][1] == CARVE
    answerer = Answerer.load("tiny-llava", "cpu")
    carver = attnctl.Carver(
        answerer.model, answerer.processor, p=0.2, regions=1, steps="start", layers=(1, 2),
        lam=0.001, inputs="both", form="crop", max_new_tokens=4,
    )  # fmt: skip
    asked = [one.item for one in stored.answers().values()][-6:]
    with attnctl.patch(answerer.model, attnctl.PAI(alpha=2)):
        found = carver.many(
            [Image.open(data / "val2014" / one.image) for one in asked],
            [one.question for one in asked],
        )
    assert [one.answer for one in found] == [stored.answers()[one.id].text for one in asked]
    file.write_bytes(whole[: whole.rindex(b'{"run"') - 10])  # two lines less, one of them torn
    assert cli.run(words(data, tmp_path / "a", *chosen)) == 0
    assert file.read_bytes() == whole
    other = (*chosen[:-3], CARVE.replace("p=0.2", "p=0.3"), *chosen[-2:])
    assert cli.run(words(data, tmp_path / "a", *other)) == 0
    assert len(list((tmp_path / "a").glob("*-pai--carve-*.jsonl"))) == 2


# -- broken images, other runs; with a model of no weight ---------------------------------------


class Parrot:
    """Answers without a model: what it was asked, and how often it was called."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.calls, self.stop_after = 0, stop_after
        self.model = types.SimpleNamespace(device="cpu")

    def reply(self, chats: Any, images: Any, max_new_tokens: int, **options: Any) -> list[Reply]:
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        pixels = [image.getpixel((112, 112)) for (image,) in images]
        return [Reply(f"{len(chats)} {c[0]['content'][1]['text']} {p}", True)
                for c, p in zip(chats, pixels, strict=True)]  # fmt: skip


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Parrot]]:
    made: list[Parrot] = []

    def use(**options: Any) -> Parrot:
        made.append(Parrot(**options))
        return made[-1]

    monkeypatch.setattr(Answerer, "load", classmethod(lambda *_: made[-1]))
    monkeypatch.setattr(command, "model_facts", lambda one: {"model": "parrot"})
    yield use


def test_a_run_goes_on_where_it_was_stopped(data: Path, tmp_path: Path, parrot: Any) -> None:
    parrot()
    assert cli.run(words(data, tmp_path / "whole")) == 0
    whole = answers(tmp_path / "whole", "stock").read_bytes()
    parrot(stop_after=2)
    assert cli.run(words(data, tmp_path / "cut")) == 130
    half = answers(tmp_path / "cut", "stock")
    kept = half.read_bytes()
    assert whole.startswith(kept) and len(kept.splitlines()) == 13
    half.write_bytes(kept[:-100])  # one line less, and a torn one
    bird = parrot()
    assert cli.run(words(data, tmp_path / "cut")) == 0
    # the batch of which a line is missing is asked again as a whole: the answers say how large
    assert half.read_bytes() == whole and bird.calls == 4 - 1
    bird = parrot()
    assert cli.run(words(data, tmp_path / "cut")) == 0 and bird.calls == 0


@pytest.mark.parametrize(
    "more", [("--seed", "1", "--limit", "12"), ("--prompt", "{question} Now."), ("--batch", "4"),
             ("--max-new-tokens", "3"), ("--sample",), ("--sample", "--seed", "3")]
)  # fmt: skip
def test_another_run_has_another_file(more: Any, data: Path, tmp_path: Path, parrot: Any) -> None:
    for one in (more[:1] if more[0] == "--sample" and more[1:] else (), more):
        parrot()
        assert cli.run(words(data, tmp_path, *one)) == 0
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_a_changed_image_is_another_run(tmp_path: Path, parrot: Any) -> None:
    data = export(tmp_path / "data", 2, seed=1)
    for _ in range(2):
        parrot()
        assert cli.run(words(data, tmp_path / "out")) == 0
        image = next((data / "val2014").iterdir())
        Image.new("RGB", (224, 224), "red").save(image)
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 2


def test_a_changed_model_is_another_run(tmp_path: Path) -> None:
    """Answers of a model are not taken for those of another in the same folder."""
    shutil.copytree(assets.path("tiny-llava"), tmp_path / "model")
    seen = []
    for change in ("", "README.md", "generation_config.json", "chat_template.jinja", "weights"):
        if change == "weights":
            file = tmp_path / "model/model.safetensors"
            data = bytearray(file.read_bytes())
            data[-2000:] = bytes(2000)
            file.write_bytes(data)
        elif change:
            with (tmp_path / "model" / change).open("a") as text:
                text.write("\n")
        seen.append(model_facts(Answerer.load(str(tmp_path / "model"), "cpu"))["files"])
    assert seen[1] == seen[0] and len({*seen}) == 4


def test_changed_code_is_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of what a control calls too, and of a second look; stock answers do not depend on it."""
    vcd, look = Chosen(attnctl.VCD()), SecondLook({})
    made = [arms.Arm("a"), arms.Arm("b", (vcd,)), arms.Arm("c", look=look)]
    before = [arm.facts() for arm in made]
    kernel = tmp_path / "kernels/new.py"
    kernel.parent.mkdir()
    kernel.write_text("")
    monkeypatch.setattr(arms.kernels, "__path__", [str(kernel.parent)])
    wanted = [arm.facts() for arm in made]
    kernel.write_text("0")
    changed = [arm.facts() != one for arm, one in zip(made, wanted, strict=True)]
    assert changed == [False, True, True] and before[0] == wanted[0]


def test_missing_and_broken_images(tmp_path: Path, parrot: Any, capsys: Any) -> None:
    data = export(tmp_path / "data", 4, seed=1)
    first, second, third, _ = sorted((data / "val2014").iterdir())
    first.unlink()
    parrot()
    assert cli.run(words(data, tmp_path / "out")) == 2
    assert f"adversarial.json, line 1: there is no image {first}" in capsys.readouterr().err
    second.write_bytes(second.read_bytes()[:2000])
    third.write_bytes(b"no image")
    parrot()
    assert cli.run(words(data, tmp_path / "out", "--skip-bad")) == 0
    shown = capsys.readouterr()
    asked = len(load(answers(tmp_path / "out", "stock")).lines)
    good = asked - len(load(answers(tmp_path / "out", "stock")).skipped)
    assert 0 < good < asked and f"{good} items" in shown.out
    assert "18 bad lines or images left out:" in shown.err
    reasons = result(tmp_path / "out")["skipped"]
    assert len(reasons) == 24 - good and sum("cannot be read" in told for told in reasons) == 12


def test_chair_is_about_the_images_that_are_there(
    tmp_path: Path, parrot: Any, capsys: Any
) -> None:
    data = export(tmp_path / "data", 4, seed=1)
    first, *others = sorted((data / "val2014").iterdir())
    first.unlink()
    parrot()
    assert cli.run(words(data, tmp_path / "out", benchmark="chair")) == 0
    assert list(load(answers(tmp_path / "out", "stock")).answers()) == ["2", "3", "4"]
    (tmp_path / "ids").write_text("1\n2\n")
    listed = words(data, tmp_path / "out", "--ids", str(tmp_path / "ids"), benchmark="chair")
    assert cli.run(listed) == 2 and f"there is no image {first}" in capsys.readouterr().err
    for image in others:
        image.unlink()
    assert cli.run(words(data, tmp_path / "out", benchmark="chair")) == 2
    assert "holds no image that the annotations know" in capsys.readouterr().err


def test_a_control_that_is_never_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    line = types.SimpleNamespace(
        steps=(0,), calls=0, forwards=0, control=types.SimpleNamespace(neutral=False)
    )
    report = types.SimpleNamespace(lines=[line])

    class Idle:
        def __enter__(self) -> Any:
            return types.SimpleNamespace(report=lambda: report)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(arms.attnctl, "patch", lambda *_: Idle())
    chosen = [types.SimpleNamespace(control=None)]
    with pytest.raises(ValueError, match="never reached"), arms.patched(None, chosen):  # type: ignore[arg-type]
        pass


def test_kill_9_at_any_moment(data: Path, tmp_path: Path) -> None:
    """A run with tiny-llava, killed again and again, ends with the answers of a whole one."""
    assert cli.run(words(data, tmp_path / "whole")) == 0
    whole = answers(tmp_path / "whole", "stock").read_bytes()
    chance, out = random.Random(0), tmp_path / "killed"
    kills, kept = 0, b""
    for size in sorted(chance.randrange(len(whole) - 200) for _ in range(5)):
        process = nursery().Process(target=cli.run, args=(words(data, out),))
        process.start()
        begin = time.monotonic()
        while process.is_alive() and _size(out) <= size:
            assert time.monotonic() < begin + 300, f"stuck at {_size(out)} bytes"
            time.sleep(0.001)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        before, kept = kept, answers(out, "stock").read_bytes()
        assert whole.startswith(kept) and kept.startswith(before[: before.rfind(b"\n") + 1])
    assert kills >= 2 and b"answer" in kept
    assert cli.run(words(data, out)) == 0
    assert answers(out, "stock").read_bytes() == whole


def _size(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.jsonl"))
