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


def add(page: Page, name: str, kind: str = "image") -> None:
    """Add a control to the stack of a tab."""
    box = page.get_by_label("Control", exact=True).locator("visible=true").first
    box.click()
    box.fill(name)
    page.get_by_role("option").filter(has_text=f"{name}:").first.click()
    page.locator(f"#{kind}-add").click()
    shown = page.get_by_role("button", name=f". {name}").locator("visible=true")
    expect(shown.first).to_be_visible(timeout=30_000)


def few_steps(page: Page, steps: int, kind: str = "image") -> None:
    """Set the number of steps."""
    if not page.locator(f"#{kind}-steps").is_visible():
        page.get_by_role("button", name="Settings").locator("visible=true").click()
    number = page.locator(f"#{kind}-steps input[type=number]")
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
    tab(page, "Heat maps")
    page.locator("#image-map").click()
    expect(page.locator("#image-maps img").first).to_be_visible(timeout=SLOW)
    shots(page, "heatmaps")
    heads(page, "image", "softpag:heads=L0H0\nnag:negative=blue")
    shots(page, "heads")


def tab(page: Page, name: str) -> None:
    """Open a tab within the open tab."""
    page.get_by_role("tab", name=name).locator("visible=true").click()


def heads(page: Page, kind: str, stack: str) -> None:
    """Fill the head grid, choose its first head, and give it to the first control."""
    tab(page, "Heads")
    table = page.locator(f"#{kind}-heads img")
    expect(table).to_be_visible()
    old = table.get_attribute("src")
    page.get_by_role("button", name="Draw wh").locator("visible=true").click()
    page.wait_for_function(
        f"old => document.querySelector('#{kind}-heads img').src != old", arg=old, timeout=SLOW
    )
    table.click(position={"x": 60, "y": 60})
    page.wait_for_timeout(2000)
    page.get_by_role("button", name="Use these heads").locator("visible=true").click()
    expect(page.locator(f"#{kind}-stack textarea")).to_have_value(stack, timeout=30_000)


def questions(page: Page) -> None:
    """Ask about an example picture with a control, map the answer, choose a head."""
    page.get_by_role("tab", name="Questions").click()
    page.locator("table").last.locator("tbody tr").nth(2).click()
    expect(page.locator("#vlm-question textarea")).not_to_have_value("", timeout=30_000)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#vlm-controlled textarea")).not_to_have_value("", timeout=SLOW)
    shots(page, "questions")
    page.locator("#vlm-question textarea").fill("Describe the image.")
    tab(page, "Words")
    page.locator("#vlm-map").click()
    expect(page.locator("#vlm-mapped textarea")).not_to_have_value("", timeout=SLOW)
    shots(page, "looks")
    heads(page, "vlm", "pai:heads=L0H0")
    shots(page, "looking-heads")


def videos(page: Page) -> None:
    """Film a video with a control, map its words, choose a head."""
    page.get_by_role("tab", name="Videos").click()
    few_steps(page, 6, "video")
    add(page, "softpag", "video")
    page.get_by_role("button", name="Run").last.click()
    expect(page.locator("video").nth(1)).to_be_visible(timeout=SLOW)
    shots(page, "videos")
    tab(page, "Heat maps")
    page.locator("#video-map").click()
    expect(page.locator("#video-sheet img")).to_be_visible(timeout=SLOW)
    shots(page, "video-heatmaps")
    heads(page, "video", "softpag:scale=1.5,heads=L0H0")
    shots(page, "video-heads")


def main() -> None:
    """Drive everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", default="pictures,questions,videos", help="tabs to drive")
    args = parser.parse_args()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("pageerror", lambda error: print("page error:", error))
        page.goto(args.url)
        expect(page.get_by_role("button", name="Run").first).to_be_visible(timeout=60_000)
        for part in (pictures, questions, videos):
            if part.__name__ in args.only:
                part(page)
        browser.close()


if __name__ == "__main__":
    main()
