"""The pages: code blocks run, links resolve, named code exists, generated files are current."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import attnctl
from attnctl import assets
from attnctl.apps.control_syntax import parse_control
from attnctl.hosts.families import Family
from attnctl.testing import zoo

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REGISTRY = sys.modules["attnctl.control"]._REGISTRY

_BLOCK = re.compile(r"^<!-- (runs|runs on) -->\n+```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_CODE = re.compile(r"`((?:\w+/)+\w+\.py)(?:::([\w.]+))?`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- code ------------------------------------------------------------------------------------


def chains(page: Path) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield (number, blocks): a block that runs, with those that run on in its names."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        if match[1] == "runs":
            found.append([])
        found[-1].append((line, match[2]))
    yield from enumerate(found)


CHAINS = [
    pytest.param(page, blocks, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, blocks in chains(page)
]


@pytest.fixture
def same_registry() -> Iterator[None]:
    """Forget the controls that an example registers."""
    attnctl.controls()
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.mark.usefixtures("same_registry")
@pytest.mark.parametrize(("page", "blocks"), CHAINS)
def test_code_runs(
    page: Path, blocks: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a chain of blocks in one fresh module, then the tests that they define."""
    if any('"tiny-sd3"' in code for _, code in blocks) and "tiny-sd3" not in assets.names():
        pytest.skip("tiny-sd3 is not in this tree")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("example_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks:
        # blank lines before it make the line numbers of a traceback those of the page
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))
    for name, value in list(vars(module).items()):
        if name.startswith("test_"):
            value()


def test_there_is_code_to_run() -> None:
    pages = {name_of(param.values[0]) for param in CHAINS}
    assert {"CONTRIBUTING.md", "docs/concepts.md", "docs/selectors.md"} <= pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_python_block_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        entries = re.match(r'\s*"(?!"")', block)  # of a dict, shown without its braces
        inside = f"{{\n{block}}}" if entries else block
        ast.parse(inside)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_file_in_a_page_is_the_file(page: Path) -> None:
    for name, code in _FILE.findall(page.read_text(encoding="utf-8")):
        assert code == (ROOT / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_mark_is_lost(page: Path) -> None:
    """A comment that is not right above a python block would run nothing."""
    marks = re.findall(r"^<!-- runs(?: on)? -->", page.read_text(), re.MULTILINE)
    assert len(marks) == sum(len(blocks) for _, blocks in chains(page))


# -- links and names ---------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and mkdocs make them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(text))
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@functools.cache
def names_in(file: Path) -> set[str]:
    """Return the functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_code_exists(page: Path) -> None:
    """`folder/file.py::Class.method` in a page is there; new files of the example are not."""
    for path, name in _CODE.findall(page.read_text(encoding="utf-8")):
        if "sharpen" in path:
            continue
        assert (ROOT / path).is_file(), path
        assert not name or name in names_in(ROOT / path), f"{path}::{name}"


def test_every_family_field_is_explained() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Family):
        assert f"| `{field.name}` |" in text


def test_every_control_has_its_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in attnctl.controls():
        assert f"controls/{name}.md" in index and f"controls/{name}.md" in nav
        assert (ROOT / "docs" / "controls" / f"{name}.md").is_file()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE))
    assert pages == listed


# -- generated files ---------------------------------------------------------------------------


@functools.cache
def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_current() -> None:
    drawing = script("make_query_path")
    assert drawing.PICTURE.read_text(encoding="utf-8") == drawing.svg()


def test_the_support_table_is_current() -> None:
    table = script("make_support")
    try:
        made = table.page()
    except zoo.FamilyUnavailable as error:
        pytest.skip(f"the table is made with a newer diffusers: {error}")
    assert table.PAGE.read_text(encoding="utf-8") == made


def test_the_steering_tables_are_current() -> None:
    """Else run `python docs/make_steering.py`."""
    tables = script("make_steering")
    text = tables.PAGE.read_text(encoding="utf-8")
    files = {file.stem for file in tables.MEASURED.glob("*.json")}
    assert {found[2] for found in tables.TABLE.finditer(text)} == files
    assert tables.page(text) == text


def test_prompts_that_come_again_are_not_counted_twice(tmp_path: Path) -> None:
    """A file pooled with itself says nothing new; with other prompts the interval narrows."""
    tables = script("make_steering")
    tables.MEASURED = tmp_path
    for name, first, guidance in (("one", 0, 5), ("other", 40, 5), ("strong", 40, 7)):
        arms = {"stock": "01" * 20, "a": "0111" * 10, "placebo mild: a": "01" * 20, "b": "1" * 40}
        rows = [
            {
                "arm": arm,
                "hits": hits,
                "controls": [] if arm == "stock" else [f"{arm[-1]}:scale=1"],
            }
            for arm, hits in arms.items()
        ]
        data = {
            "model": "toy", "rows": rows, "prompts": [f"p{first + i}" for i in range(40)],
            "settings": {"guidance_scale": guidance, "n": 40, "seed": first},
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    alone, twice, more = (
        tables.pooled(names) for names in (["one"], ["one", "one"], ["one", "other"])
    )
    gains = [
        re.search(r"\| `a:scale=1` \| 75.0 \| (.*) \|", text)[1] for text in (alone, twice, more)
    ]
    assert gains[0].startswith("+25.0 [") and gains[0].endswith("10:0")
    assert gains[1] == gains[0].replace("10:0", "20:0")
    low = [float(gain.split("[")[1].split(",")[0]) for gain in gains]
    assert low[0] == low[1] < low[2] < 25
    assert "`a:scale=1` less its placebo `placebo mild: a:scale=1`: +25.0" in more
    assert "80 pictures of 40 different prompts" in twice and "80 pictures of 80" in more
    with pytest.raises(ValueError, match="cannot be pooled"):
        tables.pooled(["one", "strong"])
    head, _, line, *_ = tables.over("a:scale=1", ["one", "strong"]).splitlines()
    assert head == "| less `a:scale=1` | guidance 5 | guidance 7 | together |"
    gains = re.sub(r" \[.*?\]", "", line)
    assert gains == "| `b:scale=1` | +25.0, 10:0 | +25.0, 10:0 | +25.0, 20:0 |"
    apart, _, both = (float(low) for low in re.findall(r"\[([+-][\d.]+)", line))
    assert apart < both < 25
    once, twice = (tables.over("a:scale=1", ["one"] * n).splitlines()[2] for n in (1, 2))
    assert once.count("|") == 3 and twice.count(re.search(r"\[.*?\]", once)[0]) == 3


@pytest.mark.parametrize("name", attnctl.controls())
def test_the_options_of_a_control_are_current(name: str) -> None:
    """Else run `python docs/make_controls.py`."""
    pages = script("make_controls")
    page = (ROOT / "docs" / "controls" / f"{name}.md").read_text(encoding="utf-8")
    assert pages.written(page, name) == page
    for option in dataclasses.fields(attnctl.controls()[name]):
        line = next(s for s in page.splitlines() if s.startswith(f"| `{option.name}` |"))
        assert line.split(" | ")[-1].strip("| "), f"{name}: {option.name} has no description"


@pytest.mark.parametrize("name", attnctl.controls())
def test_every_control_has_its_picture(name: str) -> None:
    """Else run `python -P docs/make_pictures.py NAME` and look at what it drew."""
    pictures = script("make_pictures")
    page = (ROOT / "docs" / "controls" / f"{name}.md").read_text(encoding="utf-8")
    assert pictures.START in page and pictures.written(page, name) == page
    assert parse_control(pictures.setting(name)).name == name
    file = pictures.FOLDER / "controls" / f"{name}.png"
    assert file.stat().st_size <= 60_000
    with Image.open(file) as image:
        image.load()
        assert image.width >= 600 and len(image.convert("RGB").getcolors(1 << 20)) > 8


def test_the_pictures_are_of_controls_that_exist() -> None:
    pictures = script("make_pictures")
    files = {file.stem for file in (pictures.FOLDER / "controls").glob("*.png")}
    assert files | set(pictures.SETTINGS) | set(pictures.WITHOUT_CFG) <= set(attnctl.controls())


def test_the_performance_page_is_current() -> None:
    made = script("make_performance")
    assert made.PAGE.read_text(encoding="utf-8") == made.page()


def test_the_diagrams_are_current() -> None:
    drawing = script("make_concepts")
    for name, svg in drawing.pictures().items():
        assert (drawing.FOLDER / name).read_text(encoding="utf-8") == svg


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir"]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "controls" / "pag" / "index.html").is_file()
    assert (tmp_path / "outside" / "CONTRIBUTING" / "index.html").is_file()
