"""Batches: each item once, the same files however often a run is broken off, clear failures."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctl.apps import cli
from attnctl.apps.batch import command, runner
from attnctl.apps.batch.command import Order, Outcome, draw_batch
from attnctl.apps.batch.items import items_of
from attnctl.apps.batch.manifest import Manifest, read_states
from attnctl.apps.batch.output import OutputError
from attnctl.apps.batch.plan import chunks, planned
from attnctl.apps.batch.readers import JobError, Raw, read_jobs
from attnctl.apps.bench.batch_crew import compare
from attnctl.apps.models import load
from attnctl.apps.pictures import read_metadata
from attnctl.errors import OptionError
from attnctl.processors.headhunter.crew import Crew
from attnctl.testing.brush import Brush

Files = dict[str, bytes]


def raw(prompt: str, **options: Any) -> Raw:
    return Raw("here", {"prompt": prompt, **options})


EIGHT = [raw("a red circle", seed="0-2"), raw("a ring", seed="3-5"), raw("a star", seed="6-7")]


def run(
    folder: Path,
    jobs: list[Raw] | None = None,
    pipe: Any = None,
    crew: Crew | None = None,
    **options: Any,
) -> Outcome:
    folder.mkdir(exist_ok=True)
    order = Order(Path("jobs.txt"), folder, **options)
    items = items_of(EIGHT if jobs is None else jobs, {}, {})
    return draw_batch(pipe or Brush(), items, order, crew or Crew(), lambda _: None)


def results(folder: Path) -> Files:
    """Every file but the manifest, which holds times; contact sheets and pictures alike."""
    skip = ("manifest.jsonl", "manifest-1.jsonl", "report.html")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in skip}


def noted(folder: Path) -> list[str]:
    lines = [
        json.loads(line)
        for path in folder.glob("manifest*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted(line["file"] for line in lines if line["state"] == "done")


def pictures(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*.png") if not p.name.startswith("contact"))


@pytest.fixture
def whole(tmp_path: Path) -> Files:
    """Results of a run that nothing interrupted."""
    run(tmp_path / "whole", batch=3)
    return results(tmp_path / "whole")


# ---- each item once


def test_every_item_has_a_file_a_line_and_its_record(tmp_path: Path) -> None:
    outcome = run(tmp_path)
    assert str(outcome) == "8 items: 8 done, 0 failed"
    assert pictures(tmp_path) == noted(tmp_path)
    assert len(set(noted(tmp_path))) == 8
    data = read_metadata(tmp_path / noted(tmp_path)[0])
    assert data["prompt"] == "a red circle" and "batch" not in data
    assert noted(tmp_path)[0] == f"a-red-circle-s0-{data['key'][:12]}.png"


def test_a_second_run_draws_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before, pipe = results(tmp_path), Brush()
    outcome = run(tmp_path, pipe=pipe)
    assert (outcome.drawn, outcome.done, pipe.calls) == (0, 8, [])
    assert str(outcome).endswith("(8 were there before)")
    assert results(tmp_path) == before
    assert len(noted(tmp_path)) == 8


def test_only_what_is_new_is_drawn(tmp_path: Path) -> None:
    run(tmp_path)
    pipe = Brush()
    outcome = run(tmp_path, [raw("new", seed="0-1"), *EIGHT], pipe)
    assert (outcome.drawn, outcome.items, pipe.calls) == (2, 10, [1, 1])


def test_whatever_matters_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnctl.apps.batch import plan

    jobs = [
        raw("x"), raw("y"), raw("x", seed=1), raw("x", steps=3), raw("x", guidance_scale=2.5),
        raw("x", height=8), raw("x", width=8), raw("x", negative_prompt="blue"),
        raw("x", name="mine"), raw("x", fps=3),
    ]  # fmt: skip
    assert run(tmp_path, jobs).drawn == len(jobs)
    for name, value in (("fingerprint", lambda _: "other"), ("versions", lambda: {"torch": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(plan, name, value)
            assert run(tmp_path, jobs).drawn == len(jobs)
    assert run(tmp_path, jobs).drawn == 0


def test_the_same_twice_is_drawn_once(tmp_path: Path) -> None:
    said: list[str] = []
    items = items_of([raw("x"), raw("x", seed="0-1")], {}, {})
    order = Order(Path("jobs.txt"), tmp_path)
    outcome = draw_batch(Brush(), items, order, Crew(), said.append)
    assert (outcome.items, outcome.drawn) == (2, 2)
    assert said == ["1 items ask for what another one does; drawn once"]


def test_a_file_that_is_gone_or_cut_is_drawn_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = results(tmp_path)
    first, second = pictures(tmp_path)[:2]
    (tmp_path / first).unlink()
    (tmp_path / second).write_bytes(before[second][:100])
    assert run(tmp_path).drawn == 2
    assert results(tmp_path) == before


# ---- batches


def test_items_of_equal_shape_are_drawn_together(tmp_path: Path) -> None:
    pipe = Brush()
    jobs = [raw("a", seed="0-4"), raw("b", height=8), raw("c"), raw("d", height=8)]
    run(tmp_path, jobs, pipe, batch=4)
    assert pipe.calls == [4, 2, 2]
    run(tmp_path, [raw("e", negative_prompt="x"), raw("f"), raw("g", negative_prompt="y")], pipe,
        batch=4)  # fmt: skip
    assert pipe.calls[3:] == [2, 1]


def test_a_resumed_run_draws_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, whole: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "resumed"
    write, calls = runner.write_result, iter(range(6))

    def tired(*args: Any) -> int:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runner, "write_result", tired)
        run(folder, batch=3)
    assert len(noted(folder)) == 6
    (folder / noted(folder)[1]).unlink()  # its batch has other rows that are done
    assert run(folder, batch=3).drawn == 3
    assert results(folder) == whole


def test_one_bad_item_takes_no_other_with_it(tmp_path: Path) -> None:
    pipe, jobs = Brush(), [raw("a"), raw("fail"), raw("c")]
    outcome = run(tmp_path, jobs, pipe, batch=3)
    assert (outcome.done, outcome.failed, pipe.calls) == (2, 1, [3, 1, 1, 1])
    (failed,) = (s for s in read_states(tmp_path).values() if s["state"] == "failed")
    assert failed["reason"] == "RuntimeError: out of paint"
    page = (tmp_path / "report.html").read_text()
    assert "2 done, 1 failed" in page and "here: RuntimeError: out of paint" in page

    pipe.broken = False
    assert run(tmp_path, jobs, pipe, batch=3).drawn == 0
    again = run(tmp_path, jobs, pipe, batch=3, retry_failed=True)
    assert (again.drawn, again.done, again.failed) == (1, 3, 0)
    assert run(tmp_path, jobs, pipe, batch=3, retry_failed=True).drawn == 0
    assert len(noted(tmp_path)) == 3


# ---- broken off anywhere


class Cut(Exception):
    """Stands for whatever ends a run."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> Iterator[int]:
    """Let the system call of this number fail, of those that write; yield once prepared."""
    count = 0

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise error
            return function(*args, **options)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    yield number


@pytest.mark.parametrize("kind", ["full", "ended"])
def test_a_run_that_ends_at_any_write_goes_on_and_is_the_same(
    tmp_path: Path, whole: Files, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    cuts = 0
    step = 1 if kind == "full" else 4
    for number in range(1, 200, step):
        folder = tmp_path / str(number)
        error = OSError(errno.ENOSPC, "No space left on device") if kind == "full" else Cut()
        with monkeypatch.context() as patch:
            next(cut_at(patch, number, error))
            try:
                run(folder, batch=3)
                break
            except (OutputError, Cut) as caught:
                cuts += 1
                if kind == "full":
                    assert "No space left on device; what is done stays done" in str(caught)
        for name in noted(folder):
            assert (folder / name).read_bytes() == whole[name]
        assert not [p for p in folder.iterdir() if p.name.endswith(".part")]
        assert run(folder, batch=3).done == 8
        assert results(folder) == whole
        assert len(noted(folder)) == 8
    assert cuts > 8 * 4 // step


def test_torn_lines_and_leftover_parts_are_cleared(tmp_path: Path, whole: Files) -> None:
    folder = tmp_path / "torn"
    run(folder, batch=3)
    manifest = folder / "manifest.jsonl"
    lines = manifest.read_bytes()
    last = json.loads(lines.splitlines()[-1])["file"]
    manifest.write_bytes(lines[:-20])  # killed while writing the last line
    (folder / last).rename(folder / f".{last}.123.part")
    assert run(folder, batch=3).drawn == 1
    assert results(folder) == whole
    assert manifest.read_bytes().count(b"\n") == 8


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b"{]\n")
    with pytest.raises(OptionError, match=r"manifest.jsonl, line 9: no valid JSON"):
        run(tmp_path)


def test_a_link_under_a_results_name_is_not_followed(tmp_path: Path) -> None:
    run(tmp_path / "out")
    precious = tmp_path / "precious"
    precious.write_bytes(b"old")
    name = pictures(tmp_path / "out")[0]
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to(precious)
    run(tmp_path / "out")
    assert precious.read_bytes() == b"old"
    assert not (tmp_path / "out" / name).is_symlink()


def test_two_runs_at_once_are_kept_apart(tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    manifest = Manifest(tmp_path / "out", 0)
    with pytest.raises(OutputError, match="another run"):
        run(tmp_path / "out")
    manifest.close()
    assert run(tmp_path / "out").done == 8


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
from pathlib import Path
from attnctl.apps import cli
from attnctl.apps.batch import command, runner
from attnctl.testing.brush import Brush
command.load = lambda *_: Brush()
sys.exit(cli.run(["batch", "jobs.txt", "--out", "out"]))
"""


def test_a_disk_without_room_is_told_and_nothing_is_lost(tmp_path: Path) -> None:
    prompts = [f"picture {i}" for i in range(20)]
    (tmp_path / "jobs.txt").write_text("\n".join(prompts))
    small = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, "3000"],  # the manifest's twelfth line or so
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert small.returncode == 2, small.stderr
    assert "attnctl: error: cannot write" in small.stderr and "manifest.jsonl" in small.stderr
    assert "what is done stays done" in small.stderr
    out = tmp_path / "out"
    done = noted(out)
    assert 0 < len(done) < 20
    assert (out / "manifest.jsonl").read_bytes().endswith(b"\n")
    assert set(done) <= set(pictures(out))
    outcome = run(out, [raw(prompt) for prompt in prompts])
    assert (outcome.drawn, outcome.done) == (20 - len(done), 20)
    assert len(noted(out)) == len(pictures(out)) == 20


@pytest.mark.parametrize("kind", ["protected", "proc", "file", "no parent"])
def test_folders_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "protected" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda *_: Brush())
    Path("jobs.txt").write_text("x")
    Path("file").write_text("x")
    Path("protected").mkdir(mode=0o500)
    out = {"no parent": "none/out", "proc": "/proc/self/task"}.get(kind, kind)
    assert cli.run(["batch", "jobs.txt", "--out", out]) == 2
    err = capsys.readouterr().err
    assert f"attnctl: error: cannot write {out}" in err and err.count("\n") == 1


# ---- with a model


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("tiny-sd3", device="cpu")


def test_pictures_are_those_of_generate(tmp_path: Path, pipe: Any) -> None:
    from attnctl.apps.generate import Settings, generate

    job = raw("a red circle", steps=1, seed=3, control=["softpag:scale=2"], name="mine")
    run(tmp_path, [job], pipe)
    (name,) = pictures(tmp_path)
    assert name.startswith("mine-s3-")
    same = generate("a red circle", "softpag:scale=2", model=pipe,
                    settings=Settings(steps=1, seed=3))  # fmt: skip
    with Image.open(tmp_path / name) as image:
        assert image.tobytes() == same.picture().tobytes()
    assert read_metadata(tmp_path / name)["report"] == same.metadata["report"]


def test_what_the_model_cannot_do_is_refused_before_drawing(tmp_path: Path, pipe: Any) -> None:
    for options, part in (
        ({"control": "softpag:heads=L99"}, "here: .*'L99' matches nothing"),
        ({"frames": 9}, "here: StableDiffusion3Pipeline takes no num frames"),
        ({"negative_prompt": "x", "guidance_scale": 1}, "here: a negative prompt changes nothing"),
    ):
        with pytest.raises(JobError, match=part):
            run(tmp_path, [raw("good"), raw("x", **options)], pipe)
    assert pictures(tmp_path) == []


def test_the_example_fits_the_model(pipe: Any) -> None:
    example = Path(__file__).resolve().parents[1] / "examples" / "batch.toml"
    plan = planned(pipe, items_of(read_jobs(example), {}, {}))
    assert len(plan) == 16
    assert [len(chunk) for chunk in chunks(plan, 8)] == [4, 4, 4, 4]
    assert {one.file.rsplit("-s", 1)[0] for one in plan} == {
        "ring",
        "a-red-circle-and-a-blue-square",
    }


def test_two_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = compare(tmp_path, processes=2, items=7, steps=1, batch=2)
    assert found["shares"] == [4, 3] and found["each item once"]
    assert (found["equal"], found["different"]) == (8, 0)  # with the contact sheet
    assert (tmp_path / "crew" / "report.html").is_file()


# ---- the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load", lambda *_: Brush())
    (tmp_path / "jobs.txt").write_text("a <b>red</b> circle\nfail\n")
    return tmp_path


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["batch", "jobs.txt", "--out", "out", "--seed", "0-1", "--grid", "steps=3,4"]
    assert cli.run(words) == 1
    out, err = capsys.readouterr()
    assert out == "8 items: 4 done, 4 failed\nwrote out/report.html\n"
    assert "attnctl: note: jobs.txt, line 2, seed 0: RuntimeError: out of paint" in err
    assert "8/8" in err
    page = (place / "out" / "report.html").read_text()
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page and "<b>" not in page
    assert "steps 4" in page
    for name in pictures(place / "out"):
        assert f'src="{name}"' in page
    with Image.open(place / "out" / "contact-1.png") as sheet:
        assert sheet.width > 4 * 192


MISTAKES = [
    ("batch jobs.txt", "--out"),
    ("batch none.txt --out out", "cannot read none.txt"),
    ("batch jobs.txt --out out --batch 0", "batch=0 must be at least 1"),
    ("batch jobs.txt --out out --grid steps", "write KEY=VALUE"),
    ("batch jobs.txt --out out --grid sleps=2", "no option 'sleps'"),
    ("batch jobs.txt --out out --seed x", "is no seed"),
    ("batch jobs.txt --out out --model nope", "there is no model 'nope'"),
    ("batch jobs.txt --out out --control nope", "there is no control 'nope'"),
    ("show --out a.png b.png", "is for --replay"),
]


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_write_nothing(
    words: str, part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("attnctl: error: ") and err.count("\n") == 1 and part in err
    assert [p.name for p in place.iterdir()] == ["jobs.txt"]
