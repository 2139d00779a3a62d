"""Files that people and crashes make: every kind of damage is told with file and line."""

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnctl.apps.eval import amber, chair, mme, pope
from attnctl.apps.eval.answer_file import AnswerFile, load
from attnctl.apps.eval.bad_data import BadData, EvalError, Skips
from attnctl.apps.eval.benchmarks import Sources, read_items
from attnctl.apps.eval.items import Item, find_image, safe_name, sample, swap_images
from attnctl.apps.eval.rows import read_rows
from attnctl.errors import AttnctlError

ROW = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}


def lines(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def other(number: int, **fields: Any) -> dict[str, Any]:
    return {**ROW, "question_id": number, **fields}


GOOD = {
    "plain": lines(ROW, other(2)),
    "mark at the start": b"\xef\xbb\xbf" + lines(ROW, other(2)),
    "windows": lines(ROW, other(2)).replace(b"\n", b"\r\n"),
    "blank lines, no end": b"\n" + lines(ROW, b"", other(2)).rstrip(),
    "array": json.dumps([ROW, other(2)], indent=4).encode(),
    "array, windows": json.dumps([ROW, other(2)], indent=4).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("kind", GOOD)
def test_forms_of_the_same_rows(kind: str, tmp_path: Path):
    (tmp_path / "q.json").write_bytes(GOOD[kind])
    items = pope.read(tmp_path / "q.json", Skips())
    assert [(one.id, one.question, one.truth) for one in items] == [
        ("1", "Is it?", {"label": "yes"}),
        ("2", "Is it?", {"label": "yes"}),
    ]


BAD_LINES = {
    "no json": (b'{"question_id": 2,', "no valid JSON"),
    "latin-1": b'{"question_id": 2, "image": "caf\xe9.jpg"}',
    "no object": (b"[1]", "JSON object"),
    "no label": ({"question_id": 2, "image": "a", "text": "b"}, "no field 'label'"),
    "wrong label": (other(2, label="maybe"), "expected 'yes' or 'no'"),
    "number for text": (other(2, text=5), "'text' is 5"),
    "list for an id": (other(2) | {"question_id": [2]}, "expected a number"),
    "the same id": (other(1, text="again"), "was there before, in line 1"),
    "too deep": (b'{"a":' + b"[" * 100_000, "valid JSON"),
    "zeros": (b"\0\0\0", "no valid JSON"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines_are_told_or_counted(kind: str, tmp_path: Path):
    found = BAD_LINES[kind]
    row, told = found if isinstance(found, tuple) else (found, "0xe9 is not UTF-8")
    path = tmp_path / "q.json"
    path.write_bytes(lines(ROW, row, other(3)))
    sources = Sources("pope", path)
    with pytest.raises(BadData, match=rf"q\.json, line 2: .*{told}"):
        read_items(sources, Skips())
    skips = Skips(True)
    assert [one.id for one in read_items(sources, skips)] == ["1", "3"]
    assert len(skips.reasons) == 1 and "line 2" in skips.reasons[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no row"),
        (b"\n \n", "no row"),
        (b"[]", "no row"),
        ("[]".encode("utf-16"), "UTF-16"),
        (b"[" + lines(ROW), "line 1: the array ends too early"),
        (b"[\n" + lines(ROW) + b" 5 ]", "ends too early"),
        (b"[{}] x", "more text"),
        (b'[\n{"a": "\xe9"}]', "line 2: byte 0xe9"),
        (b"[" * 100_000, "valid JSON"),
    ],
)
def test_files_that_cannot_be_read_at_all(content: bytes, told: str, tmp_path: Path):
    (tmp_path / "f").write_bytes(content)
    for allowed in (False, True):  # there is nothing to go on with
        with pytest.raises(BadData, match=rf"f.*{told}"):
            read_rows(tmp_path / "f", Skips(allowed))


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(BadData, match=r"nothing\.json: cannot be read"):
        read_rows(tmp_path / "nothing.json", Skips())
    with pytest.raises(BadData, match="folder"):
        read_rows(tmp_path, Skips())
    with pytest.raises(BadData, match="no subtask of MME"):
        mme.read(tmp_path, Skips())
    with pytest.raises(BadData, match=r"instances_val2014\.json: cannot be read"):
        chair.read(tmp_path, Skips())
    with pytest.raises(EvalError, match="option of amber, not of pope"):
        Sources("pope", tmp_path, split="g").check()
    with pytest.raises(EvalError, match="no benchmark"):
        Sources("vqa", tmp_path).check()


# -- the other benchmarks' files ---------------------------------------------------------------


def test_mme_files(tmp_path: Path):
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "existence.txt").write_bytes(b"1.jpg\tIs A?\tYes\r\n1.jpg\tIs B?\tNo\r\n")
    (folder / "OCR.txt").write_text("2.jpg\tA?\tYes\tyes, it is\n2.jpg\tB?\tNo\tno\n")
    items = mme.read(folder, Skips())
    assert [one.truth["task"] for one in items] == ["existence"] * 2 + ["OCR"] * 2
    assert items[0].image == "existence/1.jpg" and "existence/images/1.jpg" in items[0].others
    released = tmp_path / "set" / "artwork" / "questions_answers_YN"
    released.mkdir(parents=True)
    (released / "9.txt").write_text("Is A?\tYes\nIs B?\tNo\n")
    (released.parent / "images").mkdir()
    (released.parent / "images" / "9.png").touch()
    (item, _) = mme.read(tmp_path / "set", Skips())
    assert find_image(item, tmp_path / "set") == released.parent / "images" / "9.png"
    for bad, told in (
        ("1.jpg Is A? Yes\n", "line 3: .*between tabs, got 1"),
        ("3.jpg\tIs A?\tPerhaps\n", "line 3: the truth is 'Perhaps'"),
        ("3.jpg\tIs A?\tYes\n", "line 3: existence/3.jpg has 1 questions, expected 2"),
    ):
        text = "1.jpg\tIs A?\tYes\n1.jpg\tIs B?\tNo\n"
        (folder / "existence.txt").write_text(text + bad)
        with pytest.raises(BadData, match=told):
            mme.read(folder, Skips())
        skips = Skips(True)
        assert len(mme.read(folder, skips)) == 4 and len(skips.reasons) == 1


def test_amber_files(tmp_path: Path):
    truths = [
        {"id": 1, "type": "generative", "truth": ["cat"], "hallu": ["dog"]},
        {"id": 2, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 3, "type": "something new", "truth": "no"},
    ]
    queries = [{"id": i, "image": f"AMBER_{i}.jpg", "query": "Q?"} for i in (1, 2, 3)]
    (tmp_path / "query").mkdir()
    (tmp_path / "annotations.json").write_text(json.dumps(truths))
    (tmp_path / "query" / "query_all.json").write_text(json.dumps(queries))
    found = {split: amber.read(tmp_path, Skips(), split) for split in amber.SPLITS}
    assert {k: [i.id for i in v] for k, v in found.items()} == {
        "all": ["1", "2", "3"], "g": ["1"], "d": ["2", "3"], "de": [], "da": ["2"], "dr": ["3"],
    }  # fmt: skip
    with pytest.raises(EvalError, match="leaves nothing to ask"):
        read_items(Sources("amber", tmp_path, split="de"), Skips())
    truths[0]["hallu"] = "dog"
    (tmp_path / "annotations.json").write_text(json.dumps(truths[:2], indent=0))
    with pytest.raises(BadData, match=r"annotations.json, line 2: 'hallu' is 'dog'"):
        amber.read(tmp_path, Skips())
    skips = Skips(True)
    assert len(amber.read(tmp_path, skips)) == 1 and "no truth for the id 3" in skips.reasons[1]


def test_chair_files(tmp_path: Path):
    told: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1}],
    }
    said = {"annotations": [{"image_id": 7, "caption": "A dog."}]}

    def put() -> None:
        (tmp_path / "instances_val2014.json").write_text(json.dumps(told))
        (tmp_path / "captions_val2014.json").write_text(json.dumps(said))

    put()
    (tmp_path / "ids").write_text("COCO_val2014_000000000008.jpg\n7\n8\n")
    ids = chair.read_ids(tmp_path / "ids")
    assert [one.id for one in chair.read(tmp_path, Skips(), ids)] == ["8", "7"]
    with pytest.raises(BadData, match="no annotations of an image with the id 9"):
        chair.read(tmp_path, Skips(), [9])
    with pytest.raises(BadData, match=r"LisaAnne/Hallucination.*--synonyms"):
        chair.find_synonyms(None, tmp_path)
    (tmp_path / "ids").write_text("7\neight\n")
    with pytest.raises(BadData, match="line 2: 'eight' is no image id"):
        chair.read_ids(tmp_path / "ids")
    told["images"][1]["file_name"] = ["b.jpg"]
    put()
    with pytest.raises(BadData, match=r"images\[1\] has no id or no file_name"):
        chair.read(tmp_path, Skips())
    told["images"][1]["file_name"] = "b.jpg"
    told["annotations"].append({"id": 2, "image_id": 7, "category_id": 99})
    put()
    with pytest.raises(BadData, match="annotation 2: no id 99"):
        chair.read(tmp_path, Skips())
    del told["categories"]
    put()
    with pytest.raises(BadData, match="no list 'categories'"):
        chair.read(tmp_path, Skips())


# -- items -------------------------------------------------------------------------------------


def items(n: int, each: int = 2) -> list[Item]:
    return [Item(str(i), f"{i // each}.jpg", "?", {}) for i in range(n)]


def test_samples_keep_the_questions_of_an_image_together():
    every = items(40)
    some = sample(every, 11, 5)
    assert len(some) == 10 and some == [one for one in every if one in some]
    assert {one.image for one in some} == {one.image for one in every if one in some}
    assert sample(every, 11, 5) == some != sample(every, 11, 6)
    assert sample(every, None, 5) == every
    with pytest.raises(EvalError, match="up to 2"):
        sample(every, 1, 0)


def test_wrong_images_are_each_used_once_and_never_right():
    every = items(30, 3)
    shown = swap_images(every, 1)
    assert all(shown[one.id].image != one.image for one in every)
    used = [shown[one.id].image for one in every]
    assert sorted(used) == sorted(one.image for one in every)
    with pytest.raises(EvalError, match="two images"):
        swap_images(every[:3], 0)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "..\\a", "", "a\0b"])
def test_image_names_cannot_leave_the_folder(name: str, tmp_path: Path):
    assert not safe_name(name) and safe_name("a/b..c.jpg")
    with pytest.raises(BadData, match="leads out of the folder"):
        find_image(Item("1", name, "?", {}), tmp_path)


@pytest.mark.parametrize("seed", range(7))
def test_bytes_at_random_end_in_an_error_of_ours_or_in_none(seed: int, tmp_path: Path):
    chance, path = random.Random(seed), tmp_path / "f"
    good = [*GOOD.values(), filled(tmp_path / "a").read_bytes()][seed]
    for _ in range(40):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(data))
            data[at : at + chance.randint(0, 9)] = chance.choice(
                [b"", b"\xff", b"\0", b'"', b"}", b"[[", b"\n", b"\\ud800", b"null", b"1e999"]
            )
        path.write_bytes(data)
        for allowed in (False, True):
            for read in (lambda s: read_items(Sources("pope", path), s), lambda s: load(path)):
                with contextlib.suppress(AttnctlError):
                    read(Skips(allowed))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text": "a \ud800 b"}, "'text' holds half a character"),
        ({"image": "\udfff.jpg"}, "'image' holds half a character"),
    ],
)
def test_half_characters(fields: dict[str, str], told: str, tmp_path: Path):
    (tmp_path / "f").write_bytes(lines(ROW, other(2, **fields)))
    with pytest.raises(BadData, match=f"line 2: {told}"):
        pope.read(tmp_path / "f", Skips())
    with pytest.raises(BadData, match="there is no image"):
        find_image(Item("1", "a" * 5000, "?", {}), tmp_path)


# -- answers -----------------------------------------------------------------------------------

HEAD = {"run": "abc", "benchmark": "pope", "facts": {"items": "x"}, "tables": {}}


def filled(path: Path) -> Path:
    with AnswerFile(path, HEAD) as file:
        for item in items(3):
            file.add(item, {"answer": "yes \ud800 é", "ended": True})
    return path


def test_answers_come_back_whatever_is_cut_off(tmp_path: Path):
    whole = filled(tmp_path / "a").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in [*range(0, len(whole), 23), *ends, *(end - 1 for end in ends)]:
        (tmp_path / "a").write_bytes(whole[:size])
        with AnswerFile(tmp_path / "a", HEAD) as file:
            kept = sum(end <= size for end in ends)
            assert len(file.missing(items(3))) == 3 - max(0, kept - 1)
            for item in file.missing(items(3)):
                file.add(item, {"answer": "yes \ud800 é", "ended": True})
        assert (tmp_path / "a").read_bytes() == whole


def test_two_runs_never_share_a_file(tmp_path: Path):
    path = filled(tmp_path / "a")
    with pytest.raises(EvalError, match="another run"):
        AnswerFile(path, {**HEAD, "run": "other"})
    with AnswerFile(path, HEAD), pytest.raises(EvalError, match="another process"):
        AnswerFile(path, HEAD)
    with AnswerFile(path, HEAD):
        pass  # the lock is gone with the block


HOLD = """
import json, sys, time
from pathlib import Path
from attnctl.apps.eval.answer_file import AnswerFile

with AnswerFile(Path(sys.argv[1]), json.loads(sys.argv[2])):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    command = [sys.executable, "-P", "-c", HOLD, str(tmp_path / "a"), json.dumps(HEAD)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(EvalError, match="another process"):
                AnswerFile(tmp_path / "a", HEAD)
        finally:
            holder.kill()
    with AnswerFile(tmp_path / "a", HEAD) as file:
        assert len(file.missing(items(3))) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[1:], "line 1: this is no file of answers"),
        (lambda rows: [], "line 1: this is no file of answers"),
        (lambda rows: [rows[0], b"{", *rows[1:]], "line 2: no valid JSON"),
        (lambda rows: [*rows, rows[1]], "line 5: the item '0' was there before"),
        (lambda rows: [*rows, b"[]"], "line 5: expected a JSON object"),
        (lambda rows: [*rows, rows[1].replace(b"abc", b"xyz")], "line 5: the line is of run xyz"),
        (lambda rows: [*rows, rows[1].replace(b'"answer"', b'"said"')], "line 5: .*missing"),
    ],
)
def test_damaged_answers_are_told(change: Any, told: str, tmp_path: Path):
    path = filled(tmp_path / "a")
    path.write_bytes(b"".join(row + b"\n" for row in change(path.read_bytes().splitlines())))
    with pytest.raises(ValueError, match=rf"a, {told}"):
        load(path)
