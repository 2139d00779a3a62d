"""The demo without its page: fields, stacks, limits, uploads, the output folder, the gate."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import attnctl
from attnctl.apps.chosen import choose
from attnctl.apps.demo.command import Order, demo
from attnctl.apps.demo.fields import fields, value_text
from attnctl.apps.demo.gate import Gate
from attnctl.apps.demo.heads import Grid, toggled
from attnctl.apps.demo.house import House
from attnctl.apps.demo.limits import Limits
from attnctl.apps.demo.service import Asked, Service
from attnctl.apps.demo.shelf import Shelf
from attnctl.apps.demo.stack import add, read_stack, remove, set_heads, set_option
from attnctl.apps.demo.uploads import read_upload
from attnctl.apps.demo.watch import Cancelled, TooLong, Watch
from attnctl.apps.models import ModelError
from attnctl.apps.pictures import PictureError, read_metadata
from attnctl.errors import AttnctlError, MissingExtra, OptionError

PROMPT = "a red circle and a blue square"
LIMITS = Limits()


@pytest.fixture(scope="module")
def house() -> House:
    return House(["tiny-sd3", "tiny-llava"], device="cpu")


@pytest.fixture
def service(house: House, tmp_path: Path) -> Service:
    return Service(house, Shelf(tmp_path / "out", 2**26), LIMITS)


def asked(model: str = "tiny-sd3", text: Any = PROMPT, stack: Any = "", **values: Any) -> Asked:
    return Asked("me", lambda *_: None, model, text, stack, {"steps": 2, **values})


# ---- the form


@pytest.mark.parametrize("name", attnctl.controls())
def test_a_form_written_back_unchanged_is_the_same_control(name: str, house: House) -> None:
    """Every option of every registered control survives the way through its widget."""
    kind = "tiny-llava" if "causal" in attnctl.controls()[name].kinds else "tiny-sd3"
    target = house.guests[kind].target
    before = choose(target, name)
    text = name
    for field in fields(before):
        text = set_option(text, 0, field.key, value_text(field.key, field.value), target)
    (after,) = read_stack(text, target, Limits(letters=10_000))
    assert after.options == before.options


def test_fields_are_typed() -> None:
    kinds = {f.key: f.kind for f in fields(choose(None, attnctl.control("softpag")))}
    assert kinds["u"] == kinds["start"] == "part"
    assert kinds["scale"] == "number"
    assert kinds["convention"] == "choice"
    assert kinds["heads"] == "text"
    whole = {f.key: f for f in fields(choose(None, attnctl.control("attend-and-excite")))}
    assert whole["updates"].kind == "whole"
    assert whole["normalise"].kind == "flag"
    assert all(f.about for f in whole.values())


def test_editing_a_stack(house: House) -> None:
    target = house.guests["tiny-sd3"].target
    text = add(add("", "softpag", target), "nag", target)
    text = set_option(text, 1, "negative", "blue\nred", target)
    text = set_heads(text, 1, [(0, 1), (2, 3)], target)
    first, second = read_stack(text, target, LIMITS)
    assert first.options["heads"] == "L0H1,L2H3"
    assert second.options["negative"] == "blue red"
    assert remove(text, 0) == str(second)
    with pytest.raises(OptionError, match="number 3"):
        set_option(text, 2, "u", "1", target)
    with pytest.raises(OptionError, match="no head is chosen"):
        set_heads(text, 1, [], target)
    with pytest.raises(OptionError, match="m3id acts on no heads"):
        set_heads("m3id", 1, [(0, 1)], target)


def test_each_model_is_offered_what_it_admits(house: House) -> None:
    pictures, questions = house.guests["tiny-sd3"], house.guests["tiny-llava"]
    assert "softpag" in pictures.offered and "pai" not in pictures.offered
    assert "pai" in questions.offered and "softpag" not in questions.offered
    found = [choose(pictures.target, name).preset for name in pictures.presets]
    own = [one is not None and one.layers > 0 for one in found]
    assert own == sorted(own, reverse=True)  # those made for such a model come first
    assert own[pictures.presets.index("softpag")]
    with pytest.raises(ModelError, match="no such model"):
        house.guest("tiny-sd3", "vlm")


def test_a_click_finds_the_head_that_is_drawn_there() -> None:
    grid = Grid(((0, 0), (0, 1), (3, 0), (3, 2)))
    picture = np.asarray(grid.picture([(3, 2)]))
    ys, xs = np.nonzero((picture == (20, 120, 80)).all(-1))
    assert grid.at(xs.mean(), ys.mean()) == (3, 2)
    assert grid.at(0, 0) is None
    assert grid.at(*reversed(picture.shape[:2])) is None
    assert toggled([(0, 1)], (3, 2)) == [(0, 1), (3, 2)]
    assert toggled([(0, 1)], (0, 1)) == []
    assert toggled([(0, 1)], None) == [(0, 1)]


# ---- runs


def test_draw_gives_files_with_their_record_and_code_that_does_the_same(
    service: Service, house: House
) -> None:
    told: list[tuple[str, int, int]] = []
    order = asked(stack="softpag:u=0.5,scale=1\nnag:negative=blue", seed=3)
    made = service.draw(Asked("me", lambda *a: told.append(a), *vars_of(order)), "image")
    assert told == [(name, n, 2) for name in ("stock", "controlled") for n in (1, 2)]
    record = read_metadata(made.files["controlled"])
    assert [c["name"] for c in record["controls"]] == ["softpag", "nag"]
    assert "64 heads of 8 sites" in made.report and "times" in made.report
    for name, code in (("controlled", made.code), ("stock", made.code.replace("handle", "#", 1))):
        pipe = house.guests["tiny-sd3"].tool
        space: dict[str, Any] = {"pipe": pipe}
        try:
            exec(code, space)
        finally:
            if "handle" in space:
                space["handle"].undo()
        drawn = np.asarray(space["image"])
        assert np.array_equal(drawn, np.asarray(Image.open(made.files[name]))), name


def vars_of(order: Asked) -> tuple[Any, ...]:
    return order.model, order.text, order.stack, order.settings


def test_heat_maps_lie_over_the_picture(service: Service) -> None:
    made = service.map_words(asked(), "red circle, square")
    assert list(made.captions) == ["red circle", "square"]
    assert read_metadata(made.files["sheet"])["words"] == ["red circle", "square"]
    with pytest.raises(OptionError, match="at most 8"):
        service.map_words(asked(), ",".join("abcdefghi"))


def test_no_more_heads_are_drawn_than_allowed(service: Service, house: House) -> None:
    few = Service(house, service.shelf, Limits(heads=8))
    with pytest.raises(OptionError, match="64 heads"):
        few.draw_heads(asked(steps=1))


def test_answers_stock_and_controlled(service: Service, tmp_path: Path) -> None:
    Image.new("RGB", (72, 72), (90, 90, 90)).save(tmp_path / "q.png")
    order = asked("tiny-llava", "Is there a red circle in the image?", "pai:alpha=0.5")
    made = service.answer(order, tmp_path / "q.png", 4)
    assert set(made.texts) == {"stock", "controlled"}
    assert json.loads(Path(made.files["record"]).read_text())["controls"][0]["name"] == "pai"
    with pytest.raises(OptionError, match="1 to 128"):
        service.answer(order, tmp_path / "q.png", 10**6)


def test_where_words_look(service: Service, house: House, tmp_path: Path) -> None:
    Image.new("RGB", (72, 72), (90, 90, 90)).save(tmp_path / "q.png")
    told: list[tuple[int, int]] = []
    order = Asked(
        "me", lambda name, done, total: told.append((done, total)), "tiny-llava",
        "Describe the image.", "pai:alpha=0.5",
    )  # fmt: skip
    made = service.map_answer(order, tmp_path / "q.png", 5)
    assert list(made.captions) == [word for word in made.files if word != "sheet"]
    assert all(Path(file).is_file() for file in made.files.values())
    assert told and all(done <= total == 7 for done, total in told)
    # a row of the grid for each layer, and heads of one layer look at different things
    grid = service.look_heads(order, tmp_path / "q.png", 5)
    assert grid.heads == house.guests["tiny-llava"].heads
    assert len({cell.tobytes() for cell in grid.cells}) > 40
    with pytest.raises(OptionError, match="1 to 128"):
        service.map_answer(order, tmp_path / "q.png", 0)
    with pytest.raises(ModelError, match="no such model"):
        service.look_heads(asked("tiny-sd3"), tmp_path / "q.png", 5)


def test_cancelled_runs_end_at_once_and_leave_the_model_stock(
    service: Service, house: House
) -> None:
    before = service.draw(asked(), "image")
    order = Asked(
        "me", lambda name, done, _: service.cancel("me") if done == 1 else None,
        *vars_of(asked(stack="softpag", steps=40)),
    )  # fmt: skip
    with pytest.raises(Cancelled, match="cancelled"):
        service.draw(order, "image")
    assert service.cancel("me") == 0  # nothing is left behind
    assert "progress_bar" not in vars(house.guests["tiny-sd3"].tool)
    after = service.draw(asked(), "image")
    same = [np.asarray(Image.open(made.files["stock"])) for made in (before, after)]
    assert np.array_equal(*same)


def test_a_run_that_takes_too_long_is_stopped(house: House, tmp_path: Path) -> None:
    limits = Limits(seconds=0.2)
    service = Service(house, Shelf(tmp_path, 2**26), limits)
    with pytest.raises(TooLong, match=r"0\.2 seconds"):
        service.draw(asked(steps=50), "image")


def test_runs_take_turns(service: Service, house: House) -> None:
    """A run that waits for the slot can be cancelled, and does not touch the model."""
    caught: list[Exception] = []

    def wait() -> None:
        try:
            service.draw(asked(stack="softpag"), "image")
        except Cancelled as error:
            caught.append(error)

    with house.slot:
        thread = threading.Thread(target=wait)
        thread.start()
        while not service.cancel("me"):
            pass
    thread.join(20)
    assert len(caught) == 1


def test_watching_changes_nothing(house: House) -> None:
    pipe = house.guests["tiny-sd3"].tool
    call = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt"}

    def draw() -> torch.Tensor:
        images: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        return images

    stock = draw()
    with Watch(60).over(pipe):
        assert torch.equal(draw(), stock)
    assert all(not m._forward_pre_hooks for m in pipe.transformer.modules())


# ---- hostile visitors


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"text": ""}, "empty"),
        ({"text": "x" * 10_000_000}, "at most 1000"),
        ({"text": None}, "empty"),
        ({"model": "../../etc"}, "no such model"),
        ({"model": "/etc/passwd"}, "no such model"),
        ({"model": ["tiny-sd3"]}, "no such model"),
        ({"steps": 10**9}, "too much"),
        ({"steps": 51}, "at most 50"),
        ({"steps": 0}, "at least 1"),
        ({"steps": float("nan")}, "no whole number"),
        ({"steps": "10"}, "no number"),
        ({"width": 1032, "height": 1032}, "at most 1024"),
        ({"seed": -1}, "outside"),
        ({"seed": float("inf")}, "no whole number"),
        ({"guidance_scale": float("nan")}, "no usable number"),
        ({"guidance_scale": []}, "no number"),
        ({"stack": "\n".join(["softpag"] * 5)}, "at most 4"),
        ({"stack": "softpag:u=nan"}, "not a number"),
        ({"stack": "softpag:heads=/etc/passwd.txt"}, "name of a file"),
        ({"stack": "softpag:heads=secret.json"}, "name of a file"),
        ({"stack": "softpag:heads=..\\secret"}, "name of a file"),
        ({"stack": "softpag:heads=L99"}, "L99"),
        ({"stack": "regulation:iterations=100000000"}, "too much"),
        ({"stack": "no-such"}, "no control"),
        ({"stack": "softpag:__class__=1"}, "no option"),
    ],
)
def test_what_is_refused(values: dict[str, Any], reason: str, service: Service) -> None:
    with pytest.raises(AttnctlError, match=reason):
        service.draw(asked(**values), "image")
    assert list(service.shelf.folder.iterdir()) == []


TEXT = st.text(alphabet=st.sampled_from("ablu=:,.~/\\-_ 019LH!\n\x00é"), max_size=40)


@settings(max_examples=150, deadline=None)
@given(text=TEXT, name=st.sampled_from(["softpag:", "nag:negative=", "softpag:heads=", ""]))
def test_no_stack_does_anything_but_make_controls(
    text: str, name: str, house: House, monkeypatch_open: list[str]
) -> None:
    """Whatever is written: controls, or a refusal in words; no file is opened."""
    target = house.guests["tiny-sd3"].target
    try:
        chosen = read_stack(name + text, target, LIMITS)
    except AttnctlError as error:
        assert str(error)
    else:
        assert len(chosen) <= LIMITS.controls
    assert monkeypatch_open == []


@pytest.fixture(scope="module")
def monkeypatch_open() -> Any:
    """Note every file that a head set would be read from."""
    from attnctl.processors.headhunter.headset import HeadSet

    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadSet, "load", lambda path: opened.append(str(path)))
        yield opened


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose head claims a size, with almost nothing inside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data)
        )  # fmt: skip

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_uploads_are_checked(tmp_path: Path) -> None:
    cases = {
        "bomb.png": (bomb(60_000, 60_000), "pixels"),
        "big.png": (bomb(5000, 5000), "pixels"),
        "broken.png": (bomb(50, 50), "broken"),
        "text.png": (b"hello", "no picture"),
        "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        "a.gif": (b"GIF89a" + bytes(40), "no picture"),
        "empty.png": (b"", "no picture"),
        "long.png": (bytes(LIMITS.upload_bytes + 1), "larger"),
    }
    for name, (data, reason) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=reason):
            read_upload(tmp_path / name, LIMITS)
    for missing in (tmp_path / "nothing.png", None):
        with pytest.raises(PictureError):
            read_upload(missing, LIMITS)
    Image.new("RGBA", (7, 5)).save(tmp_path / "good.webp")
    assert read_upload(tmp_path / "good.webp", LIMITS).mode == "RGB"


def test_the_shelf_stays_small(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "a" / "b", 1000)
    paths = [Path(shelf.put(bytes(300), "x.png")) for _ in range(6)]
    assert len({path.name for path in paths}) == 6
    assert all(path.parent == shelf.folder for path in paths)
    assert sum(p.stat().st_size for p in shelf.folder.iterdir()) <= 1000
    assert paths[-1].exists() and not paths[0].exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnctlError, match="cannot make"):
        Shelf(tmp_path / "file", 1000)


# ---- the gate


class Visits:
    """Sends requests through a gate to an application that answers 200."""

    def __init__(self, limits: Limits, waiting: int = 0) -> None:
        self.bodies: list[bytes] = []
        self.gate = Gate(self.app, limits, lambda number: number == 7, lambda client: waiting)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def post(self, path: str, *parts: bytes, client: str = "1.2.3.4", method: str = "POST") -> Any:
        """Return the status and the reason."""
        messages = [
            {"type": "http.request", "body": p, "more_body": i < len(parts) - 1}
            for i, p in enumerate(parts)
        ]
        sent: list[dict[str, Any]] = []

        async def receive() -> Any:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [],
                 "client": (client, 1)}  # fmt: skip
        asyncio.run(self.gate(scope, receive, send))
        status = sent[0]["status"] if sent else None
        return status, sent[1]["body"].decode() if len(sent) > 1 else ""


JOIN = "/gradio_api/queue/join"


def test_the_gate_counts_runs_per_visitor() -> None:
    visits = Visits(Limits(per_minute=3))
    run = b'{"fn_index": 7}'
    assert [visits.post(JOIN, run)[0] for _ in range(4)] == [200, 200, 200, 429]
    assert visits.post(JOIN, run, client="5.6.7.8")[0] == 200
    assert visits.post(JOIN, b'{"fn_index": 1}')[0] == 200  # edits are another matter
    assert "at most 3 a minute" in visits.post("/gradio_api/call/draw", b"{}")[1]
    assert visits.post(JOIN, b"", method="GET")[0] == 200
    assert Visits(Limits(at_once=2), waiting=2).post(JOIN, run)[0] == 429


def test_the_gate_bounds_bodies_and_names_of_files() -> None:
    visits = Visits(Limits(body_bytes=1000, upload_bytes=5000, per_minute=99))
    assert visits.post(JOIN, *[b"x" * 600] * 2)[0] == 413
    assert visits.post("/gradio_api/upload", *[b"x" * 6000] * 4)[0] is None  # cut off
    assert visits.post("/gradio_api/upload", *[b"x" * 600] * 4)[0] == 200
    for file in (
        {"path": "http://10.0.0.1/x.png"},
        {"path": "/tmp/x", "url": "data:image/png;base64,AAAA"},
        {"path": "file:///etc/passwd"},
    ):
        body = json.dumps({"data": ["a", [{"value": file}]]}).encode()
        assert visits.post(JOIN, body)[0] == 400, file
    good = json.dumps({"data": ["see http://a.b", {"path": "/tmp/x", "url": "http://a/b"}]})
    assert visits.post(JOIN, good.encode()[:9], good.encode()[9:])[0] == 200
    assert visits.bodies[-1] == good.encode()
    assert visits.post(JOIN, b"[" * 900)[0] == 200  # no JSON: the page's own business


# ---- the command


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(MissingExtra, match=r"attnctl\[demo\]"):
        demo(Order(), print)


def test_a_wrong_root_path_is_refused() -> None:
    with pytest.raises(OptionError, match="must begin with a slash"):
        demo(Order(root_path="attnctl"), print)
