"""Drive the demo in a browser from end to end, and take the pictures of docs/demo.md.

    python -P docs/make_demo.py --url http://127.0.0.1:7860 --chromium /usr/bin/chromium

needs playwright (`pip install playwright`), a Chromium, and a running `attnctl demo`. It stops
with an error at the first thing that does not work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
SLOW = 240_000


def add(page: Page, name: str) -> None:
    """Add a control to the stack of the tab for pictures."""
    box = page.get_by_label("Control", exact=True).first
    box.click()
    box.fill(name)
    page.get_by_role("option").filter(has_text=f"{name}:").first.click()
    page.locator("#image-add").click()
    expect(page.get_by_role("button", name=f". {name}").first).to_be_visible(timeout=30_000)


def few_steps(page: Page, steps: int) -> None:
    """Set the number of steps."""
    if not page.locator("#image-steps").is_visible():
        page.get_by_role("button", name="Settings").first.click()
    number = page.locator("#image-steps input[type=number]")
    number.fill(str(steps))
    number.press("Tab")


def run(page: Page) -> None:
    """Run, and wait for the report."""
    page.get_by_role("button", name="Run").first.click()
    expect(page.locator("#image-report")).to_contain_text("Touched", timeout=SLOW)
    expect(page.locator("#image-slider img").first).to_be_visible(timeout=30_000)


def download(page: Page) -> None:
    """Download the controlled picture and read its record."""
    with page.expect_download() as caught:
        page.locator("a[download^='controlled']").first.click()
    with Image.open(caught.value.path()) as image:
        record = json.loads(image.text["attnctl"])  # type: ignore[attr-defined]
    assert [c["name"] for c in record["controls"]] == ["softpag", "nag"], record["controls"]
    assert record["steps"] == 8, record
    print("downloaded, with its record:", record["controls"][1]["text"])


def cancel(page: Page) -> None:
    """Start a long run and cancel it."""
    few_steps(page, 50)
    page.get_by_role("button", name="Run").first.click()
    expect(page.get_by_text("/50").first).to_be_visible(timeout=60_000)
    page.get_by_role("button", name="Cancel").first.click()
    expect(page.get_by_text("Cancelled.").first).to_be_visible(timeout=30_000)
    print("cancelled")
    few_steps(page, 8)


def shots(page: Page, name: str) -> None:
    """Take a picture of the whole page at two widths."""
    for width, height in ((1280, 900), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(1500)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide in a window of {width}"
        page.screenshot(path=PICTURES / f"demo-{name}-{width}.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    print("pictures of", name)


def pictures(page: Page) -> None:
    """Stack two controls, run, cancel, map words, choose heads."""
    few_steps(page, 8)
    add(page, "softpag")
    add(page, "nag")
    words = page.locator(".attnctl-control").last.get_by_label("negative").first
    words.press_sequentially("blue")
    expect(page.locator("#image-stack textarea")).to_have_value(
        "softpag:heads=mid\nnag:negative=blue", timeout=30_000
    )
    run(page)
    download(page)
    shots(page, "pictures")
    cancel(page)
    page.get_by_role("tab", name="Word heat maps").click()
    page.locator("#image-map").click()
    expect(page.get_by_text("up to").first).to_be_visible(timeout=SLOW)
    shots(page, "heatmaps")
    page.get_by_role("tab", name="Heads").click()
    page.get_by_role("button", name="Draw what each head does").click()
    table = page.locator("#image-heads img")
    expect(table).to_be_visible()
    page.wait_for_function(
        "old => document.querySelector('#image-heads img').src != old",
        arg=table.get_attribute("src"),
        timeout=SLOW,
    )
    table.click(position={"x": 60, "y": 60})
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Use these heads").click()
    expect(page.locator("#image-stack textarea")).to_have_value(
        "softpag:heads=L0H0\nnag:negative=blue", timeout=30_000
    )
    shots(page, "heads")


def questions(page: Page) -> None:
    """Ask about an example picture with a control."""
    page.get_by_role("tab", name="Questions").click()
    page.locator("table").last.locator("tbody tr").nth(1).click()
    expect(page.locator("#vlm-question textarea")).not_to_have_value("", timeout=30_000)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#vlm-controlled textarea")).not_to_have_value("", timeout=SLOW)
    shots(page, "questions")


def videos(page: Page) -> None:
    """Film a short video."""
    page.get_by_role("tab", name="Videos").click()
    page.get_by_role("button", name="Run").last.click()
    expect(page.locator("video").first).to_be_visible(timeout=SLOW)
    shots(page, "videos")


def main() -> None:
    """Drive everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("pageerror", lambda error: print("page error:", error))
        page.goto(args.url)
        expect(page.get_by_role("button", name="Run").first).to_be_visible(timeout=60_000)
        pictures(page)
        questions(page)
        videos(page)
        browser.close()


if __name__ == "__main__":
    main()
