"""Files of jobs: what they may hold, what becomes of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnctl
from attnctl.apps import cli
from attnctl.apps.batch import command
from attnctl.apps.batch.grid import grid_words
from attnctl.apps.batch.items import Item, items_of
from attnctl.apps.batch.readers import JobError, read_jobs
from attnctl.apps.batch.seeds import seeds, total
from attnctl.testing.brush import Brush

Make = Callable[..., list[Item]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Items of a file's text."""

    def made(ending: str, text: str | bytes, grid: dict[str, Any] | None = None, **defaults: Any):
        path = tmp_path / f"jobs.{ending}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return items_of(read_jobs(path), defaults, grid or {})

    return made


def test_text_holds_a_prompt_per_line(make: Make) -> None:
    found = make("txt", "a red circle\n\n  a blue ring, #2 \r\n", steps=3)
    assert [item.prompt for item in found] == ["a red circle", "a blue ring, #2"]
    assert [item.where for item in found] == ["jobs.txt, line 1", "jobs.txt, line 3"]
    assert {item.settings.steps for item in found} == {3}


def test_csv_has_a_column_per_option(make: Make) -> None:
    text = (
        "prompt,seed,control,control,steps,negative_prompt,guidance_scale\n"
        '"a red, round\ncircle",0-1,"softpag:heads=L0,L1,u=0.5",nag:negative=blue,4,green,2.5\n'
        "a ring,,,,,,\n"
    )
    first, second, third = make("csv", text, steps=9)
    assert first.prompt == "a red, round\ncircle"
    assert first.controls == ("softpag:heads=L0,L1,u=0.5", "nag:negative=blue")
    assert (first.settings.seed, second.settings.seed) == (0, 1)
    assert (first.settings.steps, third.settings.steps) == (4, 9)
    assert (first.settings.negative_prompt, third.settings.negative_prompt) == ("green", None)
    assert (first.settings.guidance_scale, third.controls) == (2.5, ())


def test_json_lines_and_toml_say_the_same(make: Make) -> None:
    job = {"prompt": "x", "seed": [1, "4-5"], "control": ["pag", "softpag:u=0.5"], "frames": 9}
    job |= {"grid": {"steps": [2, 3], "softpag.u": [0.25, "0.75"]}, "name": "my file", "fps": 8}
    toml = """
[defaults]
frames = 9
fps = 8
[grid]
steps = [2, 3]
[[job]]
prompt = "x"
seed = [1, "4-5"]
control = ["pag", "softpag:u=0.5"]
name = "my file"
[job.grid]
"softpag.u" = [0.25, "0.75"]
"""
    lines, tables = make("jsonl", json.dumps(job)), make("toml", toml)
    assert len(lines) == 2 * 2 * 3
    assert [vars(a) | {"where": ""} for a in lines] == [vars(b) | {"where": ""} for b in tables]
    assert {item.settings.seed for item in lines} == {1, 4, 5}
    assert {item.controls for item in lines} == {
        ("pag", "softpag:u=0.25"),
        ("pag", "softpag:u=0.75"),
    }
    assert {item.settings.frames for item in lines} == {9}


def test_stacks_can_be_compared_in_a_grid(make: Make) -> None:
    grid = {"control": [[], ["pag"], ["pag", "nag:negative=blue"]], "guidance_scale": [1, 2.5]}
    found = make("txt", "x", grid)
    assert [len(item.controls) for item in found] == [0, 0, 1, 1, 2, 2]
    assert [item.settings.guidance_scale for item in found] == [1, 2.5] * 3


def test_grids_of_the_command_line() -> None:
    assert grid_words(["steps=1, 2", "softpag.heads=L0,L1|mid"]) == {
        "steps": ["1", "2"],
        "softpag.heads": ["L0,L1", "mid"],
    }
    for word in ("steps", "steps=", "=3"):
        with pytest.raises((attnctl.OptionError, JobError)):
            items_of(read_jobs_of_nothing(), {}, grid_words([word]))
    with pytest.raises(attnctl.OptionError, match="twice"):
        grid_words(["steps=1", "steps=2"])


def read_jobs_of_nothing() -> list[Any]:
    from attnctl.apps.batch.readers import Raw

    return [Raw("here", {"prompt": "x"})]


def test_seeds() -> None:
    assert [seed for part in seeds("0-2, 7") for seed in part] == [0, 1, 2, 7]
    assert total(seeds(f"0-{2**63 - 1}")) == 2**63
    assert seeds(2**63 - 1) == (range(2**63 - 1, 2**63),)
    for bad in (-1, 2**63, "", "1-", "3-1", "a", "1;2", 1.5, True, None, f"{2**63}", [[], {}]):
        with pytest.raises(attnctl.OptionError):
            seeds(bad)


LONG = 10_000_000
REFUSED: list[tuple[str, str | bytes, str]] = [
    ("txt", "", "holds no job"),
    ("txt", "x" * LONG, "10000000 letters"),
    ("txt", b"a\nb\xff\n", "line 2: not UTF-8"),
    ("txt", "a\0b", "control character U\\+0000"),
    ("pdf", "x", "must end in .txt, .csv"),
    ("csv", "", "holds no job"),
    ("csv", "seed\n1", "'prompt' among them"),
    ("csv", "prompt,steps,steps\nx,1,2", "comes twice"),
    ("csv", "prompt,steps\nx", "line 2: 1 cells, but 2 columns"),
    ("csv", "prompt,steps\nx,1,2", "3 cells"),
    ("csv", 'prompt\n"x', "line 2: unexpected end"),
    ("csv", 'prompt\n"x"y', "line 2: .*expected"),
    ("csv", "prompt\n" + "x" * LONG, "line 2: field larger"),
    ("csv", "prompt,sead\nx,1", "no option 'sead'. Did you mean 'seed'"),
    ("csv", "prompt,seed\n,1", "there is no prompt"),
    ("csv", "prompt,seed\n ,1", "prompt is empty"),
    ("csv", "prompt,steps\nx,2.5", "steps='2.5' is not a whole number"),
    ("csv", "prompt,guidance_scale\nx,nan", "no usable number"),
    ("csv", "prompt,name\nx,../../etc/passwd", "cannot be used for files"),
    ("jsonl", '{"prompt": "x"', "line 1: no valid JSON"),
    ("jsonl", "[1]", "expected an object"),
    ("jsonl", "[" * 100_000, "no valid JSON"),
    ("jsonl", '{"prompt": "x", "prompt": "y"}', "comes twice"),
    ("jsonl", '{"prompt": "x", "guidance_scale": NaN}', "NaN is no number"),
    ("jsonl", '{"prompt": "x", "guidance_scale": 1e999}', "no usable number"),
    ("jsonl", '{"prompt": "x", "steps": ' + "9" * 5000 + "}", "no valid JSON"),
    ("jsonl", '{"prompt": "x", "steps": true}', "not a whole number"),
    ("jsonl", '{"prompt": "x", "height": 100000000000}', "height 100000000000 is too much"),
    ("jsonl", '{"prompt": "x", "height": 16000, "width": 16000}', "more than 67108864 pixels"),
    ("jsonl", '{"prompt": "x", "steps": 0}', "at least 1"),
    ("jsonl", '{"prompt": ["x"]}', "must be text"),
    ("jsonl", '{"prompt": "\\ud800"}', "control character"),
    ("jsonl", '{"prompt": "x", "seed": "0-99999999"}', "ask for 100000000 pictures"),
    ("jsonl", '{"prompt": "x", "grid": {"steps": 3}}', "must be a list"),
    ("jsonl", '{"prompt": "x", "grid": {"seed": [3]}}', "seeds are no part"),
    ("jsonl", '{"prompt": "x", "grid": {"pag.scale": [3]}}', "has no control pag"),
    ("jsonl", '{"prompt": "x", "grid": 3}', "grid must hold lists"),
    ("jsonl", '{"prompt": "x", "control": "softpag:u=nan"}', "u="),
    ("jsonl", '{"prompt": "x", "control": "softpag:scale=nan"}', "scale='nan'"),
    ("jsonl", '{"prompt": "x", "control": "nope"}', "there is no control 'nope'"),
    ("jsonl", '{"prompt": "x", "name": "/etc/passwd"}', "cannot be used for files"),
    ("jsonl", '{"prompt": "x", "name": "a\\u0000"}', "cannot be used for files"),
    ("jsonl", '{"prompt": "x", "name": ".."}', "cannot be used for files"),
    ("jsonl", json.dumps({"prompt": "x", "name": "\u540d" * 60}), "cannot be used for files"),
    ("jsonl", json.dumps({"prompt": "x", "name": "n" * 300}), "cannot be used for files"),
    ("toml", "[[job]", "no valid TOML"),
    ("toml", "[jobs]\nx = 1", "'jobs' is none of"),
    ("toml", "job = 3", "'job' is none of"),
    ("toml", "job = [3]", "expected a table"),
    ("toml", '[[job]]\nprompt = "x"\nguidance_scale = nan', "no usable number"),
    ("toml", '[[job]]\nprompt = "x"\nsteps = 2026-01-01', "not a whole number"),
]


@pytest.mark.parametrize(
    ("ending", "text", "part"), REFUSED, ids=[f"{r[0]}: {r[2][:30]}" for r in REFUSED]
)
def test_what_is_refused(make: Make, ending: str, text: str | bytes, part: str) -> None:
    with pytest.raises(JobError, match=part) as caught:
        make(ending, text)
    assert len(str(caught.value)) < 500
    assert "jobs" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, part in (("none.txt", "No such file"), ("folder.txt", "directory")):
        (tmp_path / "folder.txt").mkdir(exist_ok=True)
        with pytest.raises(JobError, match=part):
            read_jobs(tmp_path / name)
    huge = tmp_path / "huge.csv"
    with huge.open("wb") as file:
        file.truncate(65 * 2**20)
    with pytest.raises(JobError, match="larger than 64 MiB"):
        read_jobs(huge)


# ---- anything at all


NASTY = st.sampled_from(
    ["../../x", "/etc/passwd", "C:\\x", "a/b", "..", "con", "a\0b", "-rf", "~/x", "x\n../y",
     "<script>", "%2e%2e/", "nan", "inf", "-1", "1e400", "0-9999999999999", "softpag:u=nan",
     "softpag:heads=../..", "uniform", "\u202e", "\ud800"]
)  # fmt: skip
VALUES = st.one_of(
    NASTY,
    st.text(max_size=30),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(NASTY, max_size=3),
    st.dictionaries(st.sampled_from(["steps", "softpag.u", "name"]), st.lists(NASTY, max_size=2)),
)
KEYS = st.sampled_from(
    ["prompt", "seed", "name", "steps", "height", "width", "control", "negative_prompt",
     "guidance_scale", "frames", "fps", "grid", "file", "../x"]
)  # fmt: skip
JOBS = st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=3)


def as_json(jobs: list[dict[str, Any]]) -> bytes:
    named = [{"prompt": "x", "steps": 1, **job} for job in jobs]
    return "\n".join(map(json.dumps, named)).encode()


def as_csv(jobs: list[dict[str, Any]]) -> bytes:
    keys = ["prompt", "name", *sorted({key for job in jobs for key in job} - {"prompt", "name"})]
    rows = [[str(job.get(key, "x")) for key in keys] for job in jobs]
    text = "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows)
    return (",".join(keys) + "\n" + text).encode("utf-8", "surrogatepass")


FILES = st.one_of(
    st.tuples(st.just("jsonl"), JOBS.map(as_json)),
    st.tuples(st.just("csv"), JOBS.map(as_csv)),
    st.tuples(st.sampled_from(["txt", "csv", "jsonl", "toml"]), st.binary(max_size=200)),
    st.tuples(st.sampled_from(["txt", "csv", "jsonl", "toml"]), NASTY.map(
        lambda text: text.encode("utf-8", "surrogatepass"))),
)  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(file=FILES)
def test_hostile_files_are_refused_or_stay_inside_the_folder(
    file: tuple[str, bytes], tmp_path_factory: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: Brush())
    monkeypatch.setattr(cli, "note", lambda text: None)
    place = tmp_path_factory.mktemp("hostile")
    monkeypatch.chdir(place)
    ending, data = file
    (place / f"jobs.{ending}").write_bytes(data)
    code = cli.run(["batch", f"jobs.{ending}", "--out", "out", "--batch", "2"])
    out, err = capsys.readouterr()
    assert code in (0, 2), (out, err)
    assert "Traceback" not in err
    if code == 2:
        assert err.count("attnctl: error: ") == 1 and len(err) < 1000
    made = tree(place) - {f"jobs.{ending}", "out"}
    assert all(name.startswith("out/") and name.count("/") == 1 for name in made), made
    assert not [name for name in made if name.endswith(".part")]
    if code == 0:
        lines = (place / "out" / "manifest.jsonl").read_text().splitlines()
        files = [json.loads(line)["file"] for line in lines]
        assert len(files) == len(set(files)) > 0
        assert {f"out/{name}" for name in files} <= made


def test_nan_is_no_option_of_any_control() -> None:
    for name, cls in attnctl.controls().items():
        for field in dataclasses.fields(cls):
            if isinstance(field.default, float) and math.isfinite(field.default):
                with pytest.raises(attnctl.OptionError):
                    attnctl.control(name, **{field.name: "nan"})
