"""The plug-ins for lmms-eval and VLMEvalKit, against stubs of the interfaces they document."""

import importlib
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import attnctl
from attnctl import assets
from attnctl.apps.control_syntax import parse_control
from attnctl.apps.eval.answering import Answerer, chat
from attnctl.apps.plugins.loading import control_texts
from attnctl.assets.world.pope import pope
from attnctl.processors.analysis.asking import asked

pytestmark = pytest.mark.skipif("tiny-llava" not in assets.names(), reason="no tiny-llava here")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ModelManifest:
    """As lmms_eval.models.registry_v2's."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class LmmsBase:
    """As lmms_eval.api.model.lmms, without the abstract methods' check."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.kept: list[Any] = []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *a: self.kept.append(a))


class ChatMessages:
    """As lmms_eval.protocol.ChatMessages: content has "text", or a medium under "url"."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages

    def extract_media(self) -> tuple[list[Any], list[Any], list[Any]]:
        parts = [part for one in self.messages for part in one["content"]]
        return tuple(  # type: ignore[return-value]
            [part["url"] for part in parts if part["type"] == kind]
            for kind in ("image", "video", "audio")
        )

    def to_hf_messages(self) -> list[dict[str, Any]]:
        def plain(part: dict[str, Any]) -> dict[str, Any]:
            if part["type"] == "text":
                return part
            return {"type": part["type"], part["type"]: part["url"]}

        return [
            {"role": one["role"], "content": [plain(part) for part in one["content"]]}
            for one in self.messages
        ]


class VlmBase:
    """As vlmeval.vlm.base.BaseModel, as far as single questions go."""

    INTERLEAVE = False

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, Any]], dataset: Any = None) -> str:
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, types.ModuleType]]:
    content: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": LmmsBase},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": {}},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": VlmBase},
    }
    modules = {}
    for name, names in content.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(names)
        monkeypatch.setitem(sys.modules, name, modules[name])
    yield modules
    for name in ("lmms_eval_model", "vlmevalkit_model"):
        sys.modules.pop(f"attnctl.apps.plugins.{name}", None)


@pytest.fixture(scope="module")
def cases() -> list[Any]:
    return pope("adversarial", 2, 0)[:8]


STRONG = "pai:alpha=6,rows=answer"


@pytest.fixture(scope="module")
def straight(cases: list[Any]) -> dict[str, list[str]]:
    """By control, the same questions without a plug-in, one at a time."""
    answerer = Answerer.load("tiny-llava", "cpu")

    def told() -> list[str]:
        return [answerer.reply([chat(c.question)], [[c.image]], 8)[0].text for c in cases]

    found = {"": told()}
    with attnctl.patch(answerer.model, parse_control(STRONG)):
        found[STRONG] = told()
    assert found[STRONG] != found[""]
    return found


def requests(cases: list[Any], **options: Any) -> list[Any]:
    def to_messages(case: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": case.image}, {"type": "text", "text": case.question}]
        return [{"role": "user", "content": content}]

    def made(i: int) -> Any:
        gen = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "until": ["\n\n"], **options}
        args = (cases[i].question, to_messages, gen, i, "pope", "test")
        return types.SimpleNamespace(args=args)

    return [made(i) for i in range(len(cases))]


def lmms_model(cases: list[Any], **arguments: Any) -> Any:
    module = importlib.import_module("attnctl.apps.plugins.lmms_eval_model")
    made = module.AttnctlModel("tiny-llava", device="cpu", **arguments)
    made.task_dict = {"pope": {"test": cases}}
    return made


@pytest.mark.usefixtures("stubs")
def test_lmms_eval_model(
    cases: list[Any], straight: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = lmms_model(cases, batch_size="3", max_batch_size=None)
    assert plain.generate_until(requests(cases)) == straight[""]
    assert not plain.is_simple and len(plain.kept) == len(cases)
    controlled = lmms_model(cases, control=f'"{STRONG}"')
    told = controlled.generate_until(requests(cases))
    assert told == straight[STRONG]
    mixed = requests(cases[:2])
    mixed[1].args[2]["until"] = "es"
    assert plain.generate_until(mixed) == [t.split("es")[0] if i else t
                                           for i, t in enumerate(straight[""][:2])]  # fmt: skip
    for call in (plain.loglikelihood, plain.generate_until_multi_round):
        with pytest.raises(NotImplementedError):
            call([])
    with pytest.raises(ValueError, match="video"):
        film = lambda case: [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]  # noqa: E731
        args = ("", film, {}, 0, "pope", "test")
        plain.generate_until([types.SimpleNamespace(args=args)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        lmms_model(cases)


@pytest.mark.usefixtures("stubs")
def test_options_of_lmms_eval_tasks() -> None:
    module = importlib.import_module("attnctl.apps.plugins.lmms_eval_model")
    greedy = {"temperature": 0, "top_p": 1.0, "num_beams": 2, "image_aspect_ratio": "pad"}
    assert module.decoding(greedy) == (1024, {"num_beams": 2, "do_sample": False})
    sampled = {"temperature": 0.5, "top_p": None, "max_new_tokens": 3}
    assert module.decoding(sampled) == (3, {"temperature": 0.5, "do_sample": True})
    assert module.cut("a\n\nb", ["x", "\n\n"]) == "a" and module.cut("ab", None) == "ab"


def test_the_entry_point(stubs: dict[str, types.ModuleType]) -> None:
    told = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'"lmms_eval\.models"\]\nattnctl = "(.+):(.+)"', told)
    assert found
    module, name = found.groups()
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "attnctl" and manifest.simple_class_path is None
    home, _, cls = manifest.chat_class_path.rpartition(".")
    loaded = getattr(importlib.import_module(home), cls)
    assert issubclass(loaded, LmmsBase) and not loaded.is_simple


def test_vlmevalkit_model(
    cases: list[Any],
    straight: dict[str, list[str]],
    stubs: dict[str, types.ModuleType],
    tmp_path: Path,
) -> None:
    module = importlib.import_module("attnctl.apps.plugins.vlmevalkit_model")
    module.register("pai", "tiny-llava", STRONG, max_new_tokens=8, device="cpu")
    model = stubs["vlmeval.config"].supported_VLM["pai"]()
    told = []
    for case in cases:
        case.image.save(tmp_path / "a.png")
        message = [
            {"type": "image", "value": str(tmp_path / "a.png")},
            {"type": "text", "value": case.question},
        ]
        told.append(model.generate(message, "POPE"))
    assert told == straight[STRONG]
    with pytest.raises(ValueError, match="'video'"):
        model.generate([{"type": "video", "value": "a"}])


def test_control_strings() -> None:
    assert control_texts("") == [] == control_texts('""')
    assert control_texts(f"'{STRONG} + var'") == [STRONG, "var"]


def test_a_template_that_writes_the_first_token_itself(cases: list[Any]) -> None:
    """As Gemma3's and Idefics3's do: the tokenizer must not put a second one before it."""
    answerer, case = Answerer.load("tiny-llava", "cpu"), cases[0]
    carver = attnctl.Carver(answerer.model, answerer.processor)
    seen: list[list[list[int]]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:  # the prompt, and no written token
            seen[-1].append(kwargs["input_ids"][0].tolist())

    answerer.model.register_forward_pre_hook(note, with_kwargs=True)
    for start in ("", "{{ bos_token }}"):
        answerer.processor.chat_template = start + answerer.processor.chat_template
        seen.append([])
        answerer.reply([chat(case.question)], [[case.image]], 1)
        carver.ask([case.image], case.question)
        inputs = asked(answerer.model, answerer.processor, case.image, case.question)
        seen[-1].append(inputs["input_ids"][0].tolist())
    first = answerer.processor.tokenizer.bos_token_id
    for plain, written in zip(*seen, strict=True):
        assert plain[0] == written[0] == first and written.count(first) == 1
        assert plain[2:] == written[2:]  # a first word has a blank before it or not


def test_answers_do_not_depend_on_the_batch(cases: list[Any]) -> None:
    answerer = Answerer.load("tiny-llava", "cpu")
    asked = [case.question + " " * (i % 3) for i, case in enumerate(cases)]
    asked[1] = "Describe the image."
    chats, images = [chat(one) for one in asked], [[case.image] for case in cases]
    together = answerer.reply(chats, images, 30)
    alone = [answerer.reply([c], [i], 30)[0] for c, i in zip(chats, images, strict=True)]
    assert together == alone and all(reply.ended for reply in together)
    assert not answerer.reply(chats[1:2], images[1:2], 2)[0].ended
    text_only = answerer.reply([chat("Is there a red circle in the image?", 0)], [[]], 8)
    assert text_only[0].text
