"""The command line as a person meets it: output, exit codes, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import attnctl
from attnctl.apps import cli, draw, generate
from attnctl.apps.pictures import read_metadata

PROMPT = "a red circle and a blue square"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def attnctl_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "attnctl.apps.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def test_a_fresh_process_draws_and_says_nothing_else(place: Path) -> None:
    done = attnctl_process("generate", PROMPT, "--control", "softpag", "--compare",
                           "--steps", "2", "--out", "pair.png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.strip().split("\n")
    assert lines[0].startswith("softpag: preset ")
    report = " ".join(done.stdout.split())  # wrapped at 80 columns
    assert "16 attention calls at 8 sites, 2 forwards, steps 0-1" in report
    assert lines[-1].startswith("wrote pair.png (")
    assert max(map(len, lines)) <= 80
    assert [p.name for p in place.iterdir()] == ["pair.png"]
    with Image.open(place / "pair.png") as image:
        assert min(image.size) > 320


def test_version() -> None:
    done = attnctl_process("--version")
    assert (done.returncode, done.stdout) == (0, f"attnctl {attnctl.__version__}\n")


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """What version and help import."""
    code = """
import sys
from attnctl.apps.cli import run
assert run(["--version"]) == run(["--help"]) == run(["generate", "--help"]) == 0
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.strip().split("\n")[-1].split())


def test_version_and_help_come_at_once(imported: set[str]) -> None:
    assert "typer" in imported
    assert not imported & {"diffusers", "transformers", "PIL", "rich"}


def test_version_and_help_do_without_torch(imported: set[str]) -> None:
    assert "torch" not in imported


def test_help_fits_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], *([c, "--help"] for c in ("generate", "sites", "controls"))):
        assert cli.run(words) == 0
        out = capsys.readouterr().out
        assert "Usage: attnctl" in out
        assert max(map(len, out.split("\n"))) <= 80
        assert "...\n" not in out.partition("Commands:")[2]  # a summary cut off


def test_the_plain_picture_keeps_its_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert cli.run(["generate", PROMPT, "--steps", "1", "--seed", "5"]) == 0
    assert capsys.readouterr().out.endswith("wrote attnctl-002.png (64 x 64)\n")
    first, second = (Image.open(place / f"attnctl-00{i}.png") for i in (1, 2))
    assert first.size == (64, 64)
    assert first.tobytes() == second.tobytes()
    assert read_metadata("attnctl-001.png")["seed"] == 5
    assert "Steps: 1," in first.text["parameters"]


def test_several_controls_and_their_report(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--control", "softpag:heads=L0H0,L1,scale=2", "--control", "nag:negative=blue, green"]
    assert cli.run(["generate", PROMPT, "--steps", "1", "--out", "a.png", *words]) == 0
    out = capsys.readouterr().out
    assert "softpag(heads=L0H0,L1, scale=2.0) on transformer: 9 heads of 2 sites" in out
    assert "nag(negative=blue, green) on transformer" in out
    assert "preset" not in out
    texts = [c["text"] for c in read_metadata("a.png")["controls"]]
    assert texts == ["softpag:heads=L0H0,L1,scale=2", "nag:negative=blue, green"]


def test_a_control_that_does_nothing_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "1", "--out", "a.png", "--control", "softpag:scale=0"]
    assert cli.run(["generate", PROMPT, *words]) == 0
    assert "attnctl: note: softpag did nothing" in capsys.readouterr().err


def test_a_prompt_cut_short_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "a red circle and " * 20, "--steps", "1", "--out", "a.png"]) == 0
    err = capsys.readouterr().err
    assert "attnctl: note: The following part of your input was truncated" in err
    assert err.count("\n") == err.count("attnctl: note")


MISTAKES = [
    ("generate x --control nope", "there is no control 'nope'"),
    ("generate x --control softpug", "Did you mean 'softpag'"),
    ("generate x --control softpag:strength=2", "no option 'strength'"),
    ("generate x --control softpag:u=2", "outside [0, 1]"),
    ("generate x --control softpag:u=much", "u='much'"),
    ("generate x --control softpag:heads=L99", "'L99' matches nothing"),
    ("generate x --control softpag:heads=", "selector is empty"),
    ("generate x --control pladis", "acts on cross attention"),
    ("generate x --compare", "--compare needs a --control"),
    ("generate x --model nope", "there is no model 'nope'"),
    ("generate x --model .", "no model_index.json"),
    ("generate x --steps 0", "steps 0 must be at least 1"),
    ("generate x --steps two", "--steps"),
    ("generate x --seed -1", "seed -1 is outside"),
    ("generate x --seed 99999999999999999999999", "seed"),
    ("generate x --seed 1.5", "--seed"),
    ("generate x --guidance-scale nan", "guidance scale nan"),
    ("generate x --height 63", "divisible"),
    ("generate x --height -8", "height -8 must be at least 1"),
    ("generate x --device tpu", "there is no device 'tpu'"),
    ("generate x --dtype int8", "there is no dtype 'int8'"),
    ("generate x --out none/a.png", "does not exist"),
    ("generate x --out /proc/a.png", "cannot write into the folder /proc"),
    ("generate x --out a.jpg", "must end in .png"),
    ("generate x --out .", "must end in .png"),
    ("generate x --bogus", "--bogus"),
    ("generate", "PROMPT"),
    ("genrate x", "Did you mean 'generate'"),
    ("sites nope", "there is no model 'nope'"),
    ("sites", "MODEL"),
    ("sites tiny-sd3 --kind cross", "no cross sites; its kinds are: joint"),
    ("sites tiny-sd3 --kind nope", "is not one of self, cross"),
    ("sites tiny-sd3 --select L99", "'L99' matches nothing"),
    ("sites tiny-sd3 --select attn7", "'attn7' matches nothing"),
    ("controls nope", "there is no control 'nope'"),
    ("show none.png", "No such file"),
    ("show .", "cannot read"),
]


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_every_mistake_is_one_line_and_exit_code_2(
    words: str, part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(words.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("attnctl: error: ") and err.count("\n") == 1
    assert part in err
    assert out == ""
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_a_mistake(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", prompt]) == 2
    assert capsys.readouterr().err == "attnctl: error: the prompt is empty\n"


def test_the_output_is_checked_before_anything_is_drawn(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "load", lambda *_: pytest.fail("loaded"))
    assert cli.run(["generate", PROMPT, "--out", "none/a.png"]) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError, MemoryError])
def test_a_run_cut_off_leaves_nothing_behind(
    error: type[BaseException],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def cut(*_: Any) -> None:
        if error is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        raise error("out of\nluck")

    monkeypatch.setattr(generate, "draw_rows", cut)
    (place / "a.png").write_bytes(b"old")
    code = cli.run(["generate", PROMPT, "--out", "a.png"])
    assert code == {KeyboardInterrupt: 130, ValueError: 2}.get(error, 1)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0
    assert (place / "a.png").read_bytes() == b"old"
    assert [p.name for p in place.iterdir()] == ["a.png"]


def test_no_traceback_in_a_fresh_process() -> None:
    done = attnctl_process("generate", PROMPT, "--control", "softpag:u=2")
    assert done.returncode == 2
    assert done.stderr == "attnctl: error: softpag: u=2.0 is outside [0, 1]\n"


def test_tracebacks_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTNCTL_TRACEBACK", "1")
    assert cli.run(["show", "none.png"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().split("\n")[-1].startswith("attnctl: error: ")


def test_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sites", "tiny-sd3"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0].split() == ["layer", "kind", "heads", "dim", "tokens", "name"]
    assert lines[1].split()[0] == "L0"
    assert lines[1].split()[-1] == "transformer_blocks.0.attn"
    assert int(lines[1].split()[4]) > 64
    assert max(map(len, lines)) <= 80
    assert cli.run(["sites", "tiny-sd3", "--select", "L1H0", "--wide"]) == 0
    assert "1 of them selected" in capsys.readouterr().out


def test_sites_of_a_vision_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sites", "tiny-llava", "--select", "L2", "--wide"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[1].split()[:2] == ["L2", "causal"]
    assert lines[1].split()[-1] == "model.language_model.layers.2.self_attn"
    assert "6 of them selected" in " ".join(lines)


def test_controls_lists_every_control_with_its_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["controls"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 80
    for name in attnctl.controls():
        assert f"\n{name} " in out
    assert "scale=3  u=0.5" in out


@pytest.mark.parametrize("name", list(attnctl.controls()))
def test_one_control_in_detail(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["controls", name]) == 0
    out = capsys.readouterr().out
    cls = attnctl.controls()[name]
    assert out.startswith(f"{name} = attnctl.{cls.__name__}, on ")
    for option in dataclasses.fields(cls):
        assert f"\n  {option.name}=" in out
    assert "no description" not in out
    assert "\ncost\n  " in out and "\npaper\n  " in out and "none named" not in out
    assert max(map(len, out.split("\n"))) <= 80


def test_the_cost_is_what_a_control_declares() -> None:
    from attnctl.apps.controls_table import cost, papers

    assert cost(attnctl.SoftPAG).startswith("one more row")
    assert cost(attnctl.PLADIS) == "no extra rows"
    assert "itself" in cost(attnctl.Radial)
    assert cost(attnctl.VCD).startswith("a second pass") and "backward" in cost(attnctl.AStar)
    authors = [text.split(",")[0] for text in papers(attnctl.PLADIS)]
    assert authors == ["Kim and Sim", "Peters et al."]


def completed(*words: str) -> set[str]:
    """What a shell is offered after these words, the last of which is being typed."""
    line = ["attnctl", *words]
    done = attnctl_process(
        _ATTNCTL_COMPLETE="complete_bash",
        COMP_WORDS=" ".join(line),
        COMP_CWORD=str(len(line) - 1),
    )
    return set(done.stdout.split())


def test_shells_complete_commands_options_and_names() -> None:
    assert completed("ba") == {"batch"}
    assert completed("batch", "--re") == {"--retry-failed"}
    assert completed("generate", "--model", "tiny-sd") >= {"tiny-sd", "tiny-sd3"}
    assert completed("batch", "--control", "so") == {"softpag"}


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "ein roter Kreis ü", "--steps", "1", "--out", "a.png"]) == 0
    capsys.readouterr()
    assert cli.run(["show", "a.png"]) == 0
    assert '"prompt": "ein roter Kreis ü"' in capsys.readouterr().out
