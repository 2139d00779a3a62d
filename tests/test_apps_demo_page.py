"""The demo's page over its own network interface, driven by gradio's client."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctl.apps.demo.heads import Grid
from attnctl.apps.demo.house import House
from attnctl.apps.demo.limits import Limits
from attnctl.apps.demo.service import Service
from attnctl.apps.demo.shelf import Shelf
from attnctl.apps.pictures import read_metadata

pytest.importorskip("gradio")

PROMPT = "a red circle and a blue square"
LIMITS = Limits(per_minute=200, upload_bytes=200_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    house = House(["tiny-sd", "tiny-wan", "tiny-llava"], device="cpu")
    return Service(house, Shelf(folder, 2**27), LIMITS)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    from attnctl.apps.demo.serve import launch

    before = os.environ.get("GRADIO_TEMP_DIR")
    blocks = launch(service, root_path="/behind", block=False)
    try:
        yield str(blocks.local_url)
    finally:
        blocks.close()
        os.environ.pop("GRADIO_TEMP_DIR")
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from gradio_client import Client

    got = tmp_path_factory.mktemp("downloads")
    return Client(url, verbose=False, download_files=str(got), analytics_enabled=False)


def settings(**values: Any) -> dict[str, Any]:
    plain = {"negative": "", "seed": 0, "steps": 2, "guidance": 3, "width": 0, "height": 0}
    return {"model": "tiny-sd", "prompt": PROMPT, "stack": "", **plain, "frames": 0, **values}


def test_draw_two_controls(client: Any, folder: Path) -> None:
    out = client.predict(
        **settings(stack="softpag:u=0.5\nnag:negative=blue"), api_name="/draw"
    )  # fmt: skip
    slider, files, report, code = out[:4]
    assert len(slider) == len(files) == 2
    controls = read_metadata(files[1])["controls"]
    assert [c["name"] for c in controls] == ["softpag", "nag"]
    assert read_metadata(slider[0])["controls"] == []
    assert "Touched" in report and "attnctl.patch(pipe, attnctl.control('softpag'" in code


def test_word_heat_maps(client: Any) -> None:
    maps, sheet, report = client.predict(
        **settings(), words="red circle, square", api_name="/heatmap"
    )
    assert [one["caption"].split(":")[0] for one in maps] == ["red circle", "square"]
    assert read_metadata(sheet)["words"] == ["red circle", "square"]
    assert "heatmap" in report


def test_every_head_is_drawn(client: Any, service: Service) -> None:
    picture = client.predict(**settings(steps=1), api_name="/heads")
    drawn = Image.open(picture).convert("RGB")
    plain = Grid(service.house.guests["tiny-sd"].heads).picture()
    assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()


def test_film(client: Any) -> None:
    pytest.importorskip("av")
    from attnctl.apps.videos import read_video_metadata

    asked = settings(model="tiny-wan", stack="softpag", frames=5, prompt="a red circle")
    files = client.predict(**asked, api_name="/film")[2]
    assert [read_video_metadata(Path(file))["frames"] for file in files] == [5, 5]
    assert read_video_metadata(Path(files[1]))["controls"][0]["name"] == "softpag"


def test_a_film_with_word_heat_maps(client: Any) -> None:
    pytest.importorskip("av")
    from attnctl.apps.videos import read_frames, read_video_metadata

    asked = settings(model="tiny-wan", frames=5, prompt="a red circle moving left", steps=1)
    clip, sheet, files, report = client.predict(
        **asked, words="circle, left", api_name="/film_heatmap"
    )
    clip = clip["video"] if isinstance(clip, dict) else clip
    assert read_video_metadata(Path(files[0]))["words"] == ["circle", "left"]
    assert len(read_frames(Path(clip))) == 5
    assert read_metadata(files[1])["words"] == ["circle", "left"] and sheet
    assert "heatmap" in report


def test_every_head_of_a_film_is_drawn(client: Any, service: Service) -> None:
    asked = settings(model="tiny-wan", frames=1, prompt="a red circle", steps=1)
    drawn = Image.open(client.predict(**asked, api_name="/film_heads")).convert("RGB")
    plain = Grid(service.house.guests["tiny-wan"].heads).picture()
    assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()


def test_where_words_and_heads_look(client: Any, service: Service, tmp_path: Path) -> None:
    from gradio_client import handle_file

    Image.new("RGB", (72, 72), (90, 90, 90)).save(tmp_path / "q.png")
    asked = (handle_file(tmp_path / "q.png"), "Describe the image.", 6, "pai:alpha=0.5")
    answer, maps, sheet, report, code = client.predict(
        "tiny-llava", *asked, api_name="/answer_heatmap"
    )
    record = read_metadata(sheet)
    assert record["answer"] == answer and record["controls"][0]["name"] == "pai"
    assert all("%" in one["caption"] for one in maps)
    assert "48 heads of 8 sites" in report and "sink" in report and "'pai'" in code
    drawn = Image.open(client.predict("tiny-llava", *asked, api_name="/answer_heads"))
    plain = Grid(service.house.guests["tiny-llava"].heads).picture()
    assert drawn.size == plain.size and drawn.convert("RGB").tobytes() != plain.tobytes()


def ask(client: Any, picture: Any, question: str = "Is there a ring?") -> Any:
    return client.predict("tiny-llava", picture, question, 4, "pai:alpha=0.5", api_name="/answer")


def test_answer(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file

    Image.new("RGB", (72, 72), (90, 90, 90)).save(tmp_path / "q.png")
    stock, controlled, record, report, code = ask(client, handle_file(tmp_path / "q.png"))
    assert stock and controlled
    assert json.loads(Path(record).read_text())["answers"]["controlled"] == controlled
    assert "pai" in report and "attnctl.patch(model" in code


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x" * 2000}, "at most 1000"),
        ({"width": 4096}, "at most 1024"),
        ({"guidance": 1, "negative": "blue"}, "changes nothing"),
        ({"stack": "softpag:heads=/etc/passwd.txt"}, "name of a file"),
        ({"stack": "attend-and-excite:updates=1000000"}, "too much"),
        ({"stack": "nonsense"}, "no control"),
        ({"model": "/etc/passwd"}, "not in the list"),
        ({"steps": 5000}, "50"),
    ],
)
def test_refusals_are_told(values: dict[str, Any], reason: str, client: Any, folder: Path) -> None:
    from gradio_client.exceptions import AppError

    before = set(folder.rglob("*"))
    with pytest.raises(AppError, match=reason):
        client.predict(**settings(**values), api_name="/draw")
    assert set(folder.rglob("*")) == before


def test_wrong_uploads_are_refused(client: Any, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(AppError):
        ask(client, handle_file(tmp_path / "a.png"))
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(AppError, match="no picture"):
        ask(client, handle_file(tmp_path / "a.svg"))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../../etc/passwd", "/proc/self/environ", "/etc/hostname"]
)
def test_no_path_of_a_visitor_is_opened(path: str, url: str, service: Service) -> None:
    import httpx

    for name in (path, path.replace("/", "%2F")):
        got = httpx.get(f"{url}gradio_api/file={name}", timeout=20)
        assert got.status_code in (403, 404), (name, got.status_code)
    body = {
        "data": ["tiny-llava", {"path": path, "meta": {"_type": "gradio.FileData"}}, "?", 4, ""]
    }
    event = httpx.post(f"{url}gradio_api/call/answer", json=body, timeout=20).json()["event_id"]
    said = httpx.get(f"{url}gradio_api/call/answer/{event}", timeout=60).text
    assert "event: error" in said and "root:" not in said


def test_addresses_and_inline_data_are_refused(url: str) -> None:
    import httpx

    png = base64.b64encode(b"\x89PNG").decode()
    for file in (
        {"path": "http://169.254.169.254/latest"},
        {"path": "x.png", "url": f"data:image/png;base64,{png}"},
    ):
        body = {"data": ["tiny-llava", file, "?", 4, ""]}
        got = httpx.post(f"{url}gradio_api/call/answer", json=body, timeout=20)
        assert got.status_code == 400 and "uploaded" in got.text
    big = httpx.post(f"{url}gradio_api/call/answer", content=b"x" * 10_000_000, timeout=20)
    assert big.status_code == 413
    file = {"files": ("a.png", bytes(LIMITS.upload_bytes * 3))}
    assert httpx.post(f"{url}gradio_api/upload", files=file, timeout=20).status_code == 413


def test_a_run_can_be_cancelled(client: Any) -> None:
    job = client.submit(**settings(steps=50), api_name="/draw")
    while not (job.status().progress_data or job.done()):
        time.sleep(0.05)
    start = time.monotonic()
    assert client.predict(api_name="/cancel") == "Cancelled."
    job.result(30)
    assert time.monotonic() - start < 10
    assert client.predict(api_name="/cancel") == "Nothing was running."


def test_the_page_works_below_the_path_of_a_proxy(url: str) -> None:
    import httpx

    page = httpx.get(url, headers={"host": "public.example"}, timeout=20).text
    assert "http://public.example/behind" in page or '"root":"/behind"' in page.replace(" ", "")
