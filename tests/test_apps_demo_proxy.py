"""The demo below the path of a proxy: page, parts, events, files, uploads; a browser if any."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctl.apps.demo.house import House
from attnctl.apps.demo.limits import Limits
from attnctl.apps.demo.service import Service
from attnctl.apps.demo.shelf import Shelf
from attnctl.apps.pictures import read_metadata
from attnctl.testing.proxy import Proxy, shown_below

pytest.importorskip("gradio")

PREFIX = "/apps/attnctl"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRAW = {
    "model": "tiny-sd", "prompt": "a red circle", "stack": "softpag", "negative": "", "seed": 0,
    "steps": 2, "guidance": 3, "width": 0, "height": 0, "frames": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    from attnctl.apps.demo.serve import launch

    house = House(["tiny-sd", "tiny-llava"], device="cpu")
    shelf = Shelf(tmp_path_factory.mktemp("demo") / "out", 2**27)
    before = os.environ.get("GRADIO_TEMP_DIR")
    blocks = launch(Service(house, shelf, Limits(per_minute=200)), root_path=PREFIX, block=False)
    try:
        with shown_below(str(blocks.local_url), PREFIX) as made:
            yield made
    finally:
        blocks.close()
        os.environ.pop("GRADIO_TEMP_DIR")
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture
def clean(proxy: Proxy) -> Iterator[Proxy]:
    """The proxy; afterwards, nothing was asked for outside of the path, and nothing failed."""
    proxy.outside.clear()
    proxy.failed.clear()
    seen = proxy.seen
    yield proxy
    assert proxy.seen > seen
    # browsers look for an icon at the root of every host by themselves
    assert set(proxy.outside) <= {"/favicon.ico"} and proxy.failed == []


def parts_of(text: str) -> set[str]:
    """Return the addresses that a page names, but for the manifest, which it takes out itself."""
    named = re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    elsewhere = ("http", "data:", "#", "//")
    return {
        one
        for one in named
        if not one.startswith(elsewhere) and one not in ("./", "", "/manifest.json")
    }


def test_the_proxy_itself_notes_what_is_outside(proxy: Proxy) -> None:
    import httpx

    got = httpx.get(proxy.url.removesuffix(f"{PREFIX}/") + "/config", timeout=20)
    assert got.status_code == 404 and proxy.outside == ["/config"]
    proxy.outside.clear()
    with shown_below("http://127.0.0.1:1", "/none") as empty:  # nobody listens there
        assert httpx.get(empty.url, timeout=20).status_code == 502


def test_the_page_and_every_part_that_it_names(clean: Proxy) -> None:
    import httpx

    page = httpx.get(clean.url, timeout=20)
    assert page.status_code == 200
    parts = parts_of(page.text)
    assert any(one.endswith(".js") for one in parts) and any(".css" in one for one in parts)
    with httpx.Client(timeout=20) as client:
        for one in parts:
            got = client.get(str(page.url.join(one)))
            assert got.status_code == 200, one
            assert "text/html" not in got.headers["content-type"], one
        config = client.get(f"{clean.url}config").json()
    assert config["root"] == clean.url.rstrip("/")


def test_events_files_and_uploads(clean: Proxy, tmp_path: Path) -> None:
    """What gradio's client does: queue, stream of events, download, upload, cancel."""
    from gradio_client import Client, handle_file

    client = Client(
        clean.url, verbose=False, download_files=str(tmp_path), analytics_enabled=False
    )
    job = client.submit(**DRAW, api_name="/draw")
    files = job.result(120)[1]
    assert [c["name"] for c in read_metadata(files[1])["controls"]] == ["softpag"]
    Image.new("RGB", (72, 72), (90, 90, 90)).save(tmp_path / "q.png")
    asked = ("tiny-llava", handle_file(tmp_path / "q.png"), "Is there a ring?", 4, "")
    stock, _, record, *_ = client.predict(*asked, api_name="/answer")
    assert json.loads(Path(record).read_text())["answers"]["stock"] == stock
    _, maps, sheet, *_ = client.predict(*asked, api_name="/answer_heatmap")
    assert maps and read_metadata(sheet)["question"] == "Is there a ring?"
    assert client.predict(api_name="/cancel") == "Nothing was running."


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium and playwright",
)
def test_a_browser(clean: Proxy, tmp_path: Path) -> None:
    from playwright import sync_api

    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            visit(browser.new_page(), clean, tmp_path, sync_api.expect)
        finally:
            browser.close()


def visit(page: Any, proxy: Proxy, folder: Path, expect: Any) -> None:
    """Run, download the result, upload a picture, ask about it, look at the answer's maps."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda one: problems.append(one.url) if elsewhere(one.url, proxy) else None)
    page.goto(proxy.url)
    expect(page.locator("link[rel=manifest]")).to_have_count(0, timeout=30_000)
    page.get_by_role("button", name="Settings").first.click()
    page.locator("#image-steps input[type=number]").fill("2")
    page.locator("#image-steps input[type=number]").press("Tab")
    page.get_by_role("button", name="Run").first.click()
    expect(page.locator("#image-report")).to_contain_text("No controls", timeout=120_000)
    expect(page.locator("#image-slider img").first).to_be_visible(timeout=30_000)
    with page.expect_download() as caught:
        page.locator("a[download^='stock']").first.click()
    assert read_metadata(caught.value.path())["steps"] == 2
    Image.new("RGB", (72, 72), (90, 90, 90)).save(folder / "q.png")
    page.get_by_role("tab", name="Questions").click()
    page.locator("#vlm-picture input[type=file]").set_input_files(folder / "q.png")
    expect(page.locator("#vlm-picture img")).to_be_visible(timeout=30_000)
    page.locator("#vlm-question textarea").fill("Is there a ring?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#vlm-stock textarea")).not_to_have_value("", timeout=60_000)
    page.get_by_role("tab", name="Words").locator("visible=true").click()
    page.locator("#vlm-map").click()
    expect(page.locator("#vlm-mapped textarea")).not_to_have_value("", timeout=60_000)
    expect(page.locator("#vlm-maps img").first).to_be_visible(timeout=30_000)
    assert problems == []


def elsewhere(url: str, proxy: Proxy) -> bool:
    """Whether a browser leaves the path; pictures made in the page have no address."""
    return not url.startswith((proxy.url, "data:", "blob:"))
