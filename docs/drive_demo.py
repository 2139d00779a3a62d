"""Drive the demo without its page: every run, two at once, cancel, memory; also at real sizes.

    python -P docs/drive_demo.py tiny --device cuda --out tiny.json
    python -P docs/drive_demo.py wan --device cuda --out wan.json
    python -P docs/drive_demo.py llava --device cuda --out llava.json

`tiny` needs no gradio and no network: the runs of the page's buttons (`apps/demo/service.py`) on
the shipped models. It stops with an error at the first thing that is not as it should be. `wan`
and `llava` have the shapes of Wan 2.1 1.3B and LLaVA-1.5 7B with random weights, of which only
time and memory mean anything; `--small` shrinks them to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnctl import assets
from attnctl.apps.demo.house import Guest, House
from attnctl.apps.demo.limits import Limits
from attnctl.apps.demo.service import Asked, Service
from attnctl.apps.demo.shelf import Shelf
from attnctl.apps.demo.watch import Cancelled
from attnctl.apps.eval.answering import Answerer
from attnctl.assets.world.pope import pope

PROMPT, MOTION = "a red circle and a blue square", "a red circle moving left slowly"
QUESTION = "Describe the image."


class Drive:
    """A service, and the times and peaks of its runs.

    Args:
        service: to drive.
        device: "cuda" or "cpu".
        out: file of the figures, written anew after each of them.
        facts: written into it as well.
    """

    def __init__(self, service: Service, device: str, out: Path, facts: dict[str, Any]) -> None:
        self.service, self.cuda = service, device.startswith("cuda")
        self.out, self.found = out, dict(facts)
        self.found["gpu"] = torch.cuda.get_device_name() if self.cuda else None

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.found[name] = value
        print(f"{name:24} {value}", flush=True)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def run(self, name: str, work: Callable[[], Any], again: bool = True) -> Any:
        """Run something, a second time for its time if it is to be warm; note time and peak."""
        if again:
            work()
        self._wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        before, start = self.allocated(), time.perf_counter()
        out = work()
        self._wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        memory = {"before": before, "peak": peak, "after": self.allocated()}
        mib = {f"mib_{key}": value >> 20 for key, value in memory.items()}
        self.note(name, {"seconds": round(seconds, 3), **mib})
        return out

    def allocated(self) -> int:
        """Return the bytes of living tensors on the GPU."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def asked(
    model: str, text: str, stack: str = "", session: str = "one", tell: Any = None, **values: Any
) -> Asked:
    """Return what a visitor asks for."""
    return Asked(session, tell or (lambda *_: None), model, text, stack, values)


def tiny(drive: Drive, photo: Path, small: bool) -> None:
    """Every run of the page on the shipped models, two at once, cancel, memory."""
    service = drive.service
    start = drive.allocated()
    few = {"steps": 2} if small else {}
    short = {"frames": 5} if small else {}
    image = asked("tiny-sd3", PROMPT, "softpag", **few)
    two = asked("tiny-sd", PROMPT, "softpag\npladis", **few)
    video = asked("tiny-wan", MOTION, "softpag", **few, **short)
    question = asked("tiny-llava", QUESTION, "pai:alpha=0.5")
    drive.run("draw tiny-sd3", lambda: service.draw(image, "image"))
    drive.run("draw tiny-sd, two", lambda: service.draw(two, "image"))
    drive.run("maps tiny-sd3", lambda: service.map_words(image, ""))
    drive.run("heads tiny-sd3", lambda: service.draw_heads(image), again=False)
    drive.run("film tiny-wan", lambda: service.draw(video, "video"))
    drive.run("maps tiny-wan", lambda: service.map_words(video, "red, circle", "video"))
    drive.run("heads tiny-wan", lambda: service.draw_heads(video, "video"), again=False)
    drive.run("answer tiny-llava", lambda: service.answer(question, photo, 32))
    drive.run("maps tiny-llava", lambda: service.map_answer(question, photo, 32))
    drive.run("heads tiny-llava", lambda: service.look_heads(question, photo, 32))
    drive.note("together", together(service))
    drive.note("cancel", cancelled(service))
    kept = drive.allocated() - start
    drive.note("mib_of_models", start >> 20)
    drive.note("bytes_kept_after_all", kept)
    assert kept < 2**24, f"{kept >> 20} MiB are still held after all runs"


def together(service: Service) -> dict[str, Any]:
    """Run two visitors at once: they must take turns on the one place, and both be served."""
    inside, most, lock = 0, 0, threading.Lock()
    slot, times, files = service.house.slot, {}, {}

    def counted(name: str, done: int, total: int) -> None:
        nonlocal most
        with lock:
            most = max(most, inside)

    class Slot:
        """The place, with the number of those on it."""

        def __enter__(self) -> None:
            nonlocal inside
            slot.acquire()
            with lock:
                inside += 1

        def __exit__(self, *_: object) -> None:
            nonlocal inside
            with lock:
                inside -= 1
            slot.release()

    def visit(session: str, model: str) -> None:
        start = time.perf_counter()
        made = service.draw(asked(model, PROMPT, "softpag", session, counted), "image")
        files[session] = len(made.files)
        times[session] = round(time.perf_counter() - start, 3)

    service.house.slot = Slot()  # type: ignore[assignment]
    try:
        threads = [
            threading.Thread(target=visit, args=pair)
            for pair in (("first", "tiny-sd3"), ("second", "tiny-sd3"), ("third", "tiny-sd"))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        service.house.slot = slot
    assert files == {"first": 2, "second": 2, "third": 2}, files
    assert most == 1, f"{most} runs on the one place"
    return {"seconds": times, "most_on_the_place": most}


def cancelled(service: Service) -> dict[str, Any]:
    """Cancel a long run at its third step; the next run must be as before, bit for bit."""
    order = asked("tiny-sd3", PROMPT)
    before = Path(service.draw(order, "image").files["stock"]).read_bytes()
    at = [0.0, 0]

    def tell(name: str, done: int, total: int) -> None:
        if done == 3:
            at[0] = time.perf_counter()
            at[1] = service.cancel("one")

    try:
        service.draw(asked("tiny-sd3", PROMPT, "softpag", tell=tell, steps=50), "image")
    except Cancelled:
        seconds = time.perf_counter() - at[0]
    else:
        raise AssertionError("the run was not cancelled")
    after = Path(service.draw(order, "image").files["stock"]).read_bytes()
    assert before == after, "the model is not what it was"
    return {"runs": at[1], "seconds_to_end": round(seconds, 4), "next_run_equal": True}


# -- real sizes ----------------------------------------------------------------------------------


def wan(drive: Drive, small: bool) -> None:
    """About 480 x 832 x 81 with Wan 2.1 1.3B's transformer: film, and film with maps."""
    from diffusers import WanPipeline, WanTransformer3DModel

    guest = drive.service.house.guests["tiny-wan"]
    old = guest.tool
    shape: dict[str, Any] = {"num_layers": 30, "ffn_dim": 8960, "num_attention_heads": 12}
    shape = {"num_layers": 2, "ffn_dim": 64, "num_attention_heads": 2} if small else shape
    with torch.device(old.device):
        transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1), attention_head_dim=128, in_channels=8, out_channels=8,
            text_dim=96, freq_dim=256, rope_max_seq_len=1024, **shape,
        )  # fmt: skip
    parts = {**old.components, "transformer": transformer.to(old.dtype).eval()}
    pipe = WanPipeline(**{k: v for k, v in parts.items() if k != "transformer_2"})
    pipe.register_to_config(_name_or_path="wan-1.3b shape")
    drive.service.house.guests["wan"] = Guest("wan", "video", pipe)
    # the small autoencoder shrinks by 4 x 4 x 2, Wan's with its patches by 16 x 16 x 4:
    # 21 x 32 x 48 tokens are about those of 81 frames of 480 x 832 (21 x 30 x 52)
    size = {"height": 32, "width": 32, "frames": 5} if small else {
        "height": 128, "width": 192, "frames": 41,
    }  # fmt: skip
    order = asked("wan", MOTION, steps=2, guidance_scale=3.0, **size)
    drive.run("film", lambda: drive.service.draw(order, "video"))
    drive.run("maps", lambda: drive.service.map_words(order, "red, circle, left", "video"))


def llava(drive: Drive, photo: Path, small: bool) -> None:
    """An answer of 32 tokens with LLaVA-1.5 7B's shape: answer, maps, head grid."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor
    from transformers import LlavaForConditionalGeneration as Llava

    teller = drive.service.house.guests["tiny-llava"].tool
    old, own = teller.model.config, teller.processor
    sizes: dict[str, Any] = {} if not small else {
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }  # fmt: skip
    eyes = CLIPVisionConfig(
        image_size=336, patch_size=14, projection_dim=768,
        **({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16} if not small else sizes),
    )  # fmt: skip
    words = LlamaConfig(
        vocab_size=old.text_config.vocab_size, bos_token_id=1, eos_token_id=None, pad_token_id=3,
        max_position_embeddings=4096, **(sizes or {"num_hidden_layers": 32}),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=eyes, text_config=words, image_token_index=old.image_token_index,
        image_seq_length=576,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(teller.model.dtype)
    with torch.device(teller.model.device):
        model = Llava(config).eval()
    torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    look = type(own.image_processor)(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor = LlavaProcessor(
        look, own.tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=own.chat_template,
    )  # fmt: skip
    drive.service.house.guests["llava"] = Guest(
        "llava", "vlm", Answerer(model, processor, "llava-1.5-7b shape")
    )
    order = asked("llava", QUESTION)
    service = drive.service
    drive.run("answer", lambda: service.answer(order, photo, 32))
    drive.run("maps", lambda: service.map_answer(order, photo, 32))
    drive.run("heads", lambda: service.look_heads(order, photo, 32))
    order = asked("llava", QUESTION, "pai:alpha=0.2")
    drive.run("maps under pai", lambda: service.map_answer(order, photo, 32))


def encoder() -> bool:
    """Whether PyAV is there; without it videos are kept as they are, and nothing encodes them."""
    try:
        import av  # noqa: F401
    except ImportError:
        from attnctl.apps.demo import runs, service

        plain = lambda frames, fps, record: b"".join(f.tobytes() for f in frames)  # noqa: E731
        runs.mp4_bytes = service.mp4_bytes = plain
        return False
    return True


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("tiny", "wan", "llava"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = {"tiny": assets.names(), "wan": ["tiny-wan"], "llava": ["tiny-llava"]}[args.part]
    with tempfile.TemporaryDirectory() as folder:
        limits = Limits(seconds=600)
        house = House(names, args.device)
        service = Service(house, Shelf(Path(folder) / "out", limits.folder_bytes), limits)
        device = next(iter(house.guests.values())).tool
        where = str((device.model if hasattr(device, "model") else device).device)
        facts = {"part": args.part, "torch": torch.__version__, "small": args.small}
        drive = Drive(service, where, args.out, {**facts, "videos_encoded": encoder()})
        photo = Path(folder) / "photo.png"
        pope("adversarial", n_images=1, seed=0)[0].image.save(photo)
        if args.part == "tiny":
            tiny(drive, photo, args.small)
        elif args.part == "wan":
            wan(drive, args.small)
        else:
            llava(drive, photo, args.small)


if __name__ == "__main__":
    main()
