"""Words to tokens: every encoder of a pipeline, fast and slow tokenizers, errors that help."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

import attnctl
from attnctl import assets
from attnctl.testing import zoo
from attnctl.words import concepts, find_words, phrases
from attnctl.words.pieces import piece_spans, pieces_of

TEXT = "a red circle and a bluish  square, a café"
CORPUS = [
    "a red circle and a blue square",
    "an astronaut riding a horse on the moon",
    "circles, squares, rings and triangles: bluish, reddish, greenish",
    "the café is squarish; die Straße ist naß",
]


@functools.cache
def clip() -> Any:
    """A byte-level BPE of CLIP's kind that knows few words whole."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        show_progress=False,
        vocab_size=340,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(CORPUS, trainer)
    ends = ("<|startoftext|>", 0), ("<|endoftext|>", 1)
    raw.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=list(ends)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )


@functools.cache
def t5() -> Any:
    """A unigram tokenizer of T5's kind: blanks belong to the pieces, no token at the start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        show_progress=False,
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
    )
    raw.train_from_iterator([*CORPUS, TEXT], trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


class Slow:
    """The same tokenizer as the slow kind shows itself: no offsets."""

    is_fast, padding_side = False, "right"

    def __init__(self, fast: Any) -> None:
        self.fast = fast

    def __call__(self, text: str, **cut: Any) -> Any:
        return {"input_ids": self.fast(text, **cut)["input_ids"]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fast, name)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        raw = self.fast.backend_tokenizer.decoder.decode(tokens)
        return raw.replace("</w>", " ")


def spelled(tokenizer: Any, text: str, words: str) -> str:
    """Return the pieces found for some words, written together."""
    (where,) = phrases(text, words)
    indices = pieces_of(piece_spans(tokenizer, text), where.start, where.stop, text)
    pieces = tokenizer.convert_ids_to_tokens([tokenizer(text)["input_ids"][i] for i in indices])
    return "".join(pieces).replace("</w>", "").replace("▁", "").replace("Ġ", "")


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize("make", [clip, t5], ids=["clip", "t5"])
def test_all_pieces_of_a_word_and_nothing_else(make: Any, kind: str) -> None:
    tokenizer = make() if kind == "fast" else Slow(make())
    for word in ("red", "circle", "bluish", "square"):
        assert spelled(tokenizer, TEXT, word) == word
    assert spelled(tokenizer, TEXT, "red circle") == "redcircle"
    assert spelled(tokenizer, TEXT, "bluish square") == "bluishsquare"
    accented = "cafÃ©" if make is clip else "café"  # the bytes of the letter in CLIP's alphabet
    assert spelled(tokenizer, TEXT, "café") == accented
    assert len(piece_spans(tokenizer, TEXT)) == len(tokenizer(TEXT)["input_ids"])


@pytest.mark.parametrize("make", [clip, t5], ids=["clip", "t5"])
def test_slow_and_fast_agree(make: Any) -> None:
    for text in [*CORPUS, TEXT]:
        fast, slow = piece_spans(make(), text), piece_spans(Slow(make()), text)
        for match in {m for word in text.split() for m in phrases(text, word)}:
            one = pieces_of(fast, match.start, match.stop, text)
            other = pieces_of(slow, match.start, match.stop, text)
            # a lone blank before a word spells nothing; fast ones may count it to the word
            assert other and set(other) <= set(one) and len(one) - len(other) <= 1


def test_a_slow_tokenizer_that_does_not_spell_its_text_is_refused() -> None:
    class Garbled(Slow):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "?" * len(tokens)

    with pytest.raises(attnctl.HostError, match="give the token positions"):
        piece_spans(Garbled(t5()), TEXT)


# -- pipelines --------------------------------------------------------------------------------


@functools.cache
def shipped(name: str) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(assets.path(name))


PROMPT = "a red circle and a blue squarish ring"


def test_clip_of_tiny_sd_counts_its_start_token() -> None:
    found = find_words(shipped("tiny-sd"), PROMPT, ["red", "squarish", "red circle"])
    assert [f.positions for f in found] == [(2,), (7, 8, 9, 10), (2, 3)]
    ids = shipped("tiny-sd").tokenizer(PROMPT)["input_ids"]
    pieces = shipped("tiny-sd").tokenizer.convert_ids_to_tokens([ids[i] for i in range(7, 11)])
    assert "".join(pieces) == "squarish</w>"


def test_tiny_sd3_has_t5_after_clip() -> None:
    pipe = shipped("tiny-sd3")
    (found,) = find_words(pipe, PROMPT, ["circle"], max_sequence_length=32)
    assert found.tokens == {"tokenizer": (3,), "tokenizer_2": (3,), "tokenizer_3": (2,)}
    assert found.positions == (3, pipe.tokenizer_max_length + 2)


def test_the_positions_are_those_that_the_denoiser_gets() -> None:
    """Changing the word changes the text sequence from the word on, by each causal encoder."""
    pipe = shipped("tiny-sd")
    one, other = (pipe.encode_prompt(p, "cpu", 1, False)[0] for p in (PROMPT, "a red ring and a"))
    (found,) = find_words(pipe, PROMPT, ["circle"])
    changed = (one != other).any(-1)[0].nonzero().flatten()
    assert changed[0] == found.positions[0]


def stand_in(cls: str, **tokenizers: Any) -> Any:
    """A pipeline of its denoiser's class and its tokenizers."""
    family = {"flux": "transformer", "wan": "transformer", "sdxl": "unet", "sd3": "transformer"}
    pipe = zoo.FAMILIES[cls].build()
    assert hasattr(pipe, family[cls])
    for name, tokenizer in tokenizers.items():
        setattr(pipe, name, tokenizer)
    return pipe


def test_flux_has_t5_alone_in_its_sequence() -> None:
    pipe = stand_in("flux", tokenizer=clip(), tokenizer_2=t5())
    (found,) = find_words(pipe, TEXT, ["circle"])
    assert found.positions == found.tokens["tokenizer_2"] != found.tokens["tokenizer"]


def test_wan_has_its_t5_from_the_first_position() -> None:
    pipe = stand_in("wan", tokenizer=t5())
    (found,) = find_words(pipe, "  " + TEXT, ["circle"])
    assert found.positions == find_words(pipe, TEXT, ["circle"])[0].positions
    assert found.positions == found.tokens["tokenizer"]


def test_two_clips_share_their_positions() -> None:
    pipe = stand_in("sdxl", tokenizer=clip(), tokenizer_2=clip())
    (found,) = find_words(pipe, TEXT, ["circle"])
    assert found.positions == found.tokens["tokenizer"] == found.tokens["tokenizer_2"]


def test_sd3_with_other_prompts_for_other_encoders() -> None:
    pipe = stand_in("sd3", tokenizer=clip(), tokenizer_2=clip(), tokenizer_3=t5())
    (both,) = find_words(pipe, "a blue horse", ["horse"], prompt_3="a horse in the café")
    assert both.tokens["tokenizer"] and min(both.positions) < 77 < max(both.positions)
    (late,) = find_words(pipe, "a blue horse", ["café"], prompt_3="a horse in the café")
    assert not late.tokens["tokenizer"] and min(late.positions) > 77


# -- what is asked for ------------------------------------------------------------------------


TWICE = "a red circle and a blue circle"


def test_occurrences() -> None:
    pipe = shipped("tiny-sd")
    words = ["circle#2", "circle#1", "circle#all", "blue circle"]
    found = [f.positions for f in find_words(pipe, TWICE, words)]
    assert found == [(7,), (3,), (3, 7), (6, 7)]
    first, second = concepts(TWICE)
    nouns = find_words(pipe, TWICE, {"a": first.noun, "b": second.noun, "c": second})
    assert [f.positions for f in nouns] == [(3,), (7,), (6, 7)]


def test_positions_and_names_of_ones_own() -> None:
    bare = SimpleNamespace()  # given positions need nothing of the pipeline
    found = find_words(bare, "", {"it": [5, 3, 5], "one": 2})
    assert [(f.text, f.positions) for f in found] == [("it", (3, 5)), ("one", (2,))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["circle"], r"2 times.*circle#1 in \"a red \[circle\] and.*circle#2 in.*circle#all"),
        (["crcle"], "not in the prompt.*Did you mean 'circle'.*a, red, circle, and, blue"),
        (["circl"], "not in the prompt"),
        (["circle#3"], "stands 2 times"),
        (["ring#1"], "'ring' is not in the prompt"),
        ([], "no words"),
        (["red", "red"], "given twice"),
        (5, "no list of words"),
        ({"x": [-1]}, "0 or more"),
        ({"x": []}, "expected a phrase"),
        ({"x": 1.5}, "expected a phrase"),
    ],
)
def test_errors_show_what_there_is(words: Any, message: str) -> None:
    with pytest.raises(attnctl.OptionError, match=message):
        find_words(shipped("tiny-sd"), TWICE, words)


def test_a_word_that_is_cut_off_is_an_error() -> None:
    long = "a red circle and " * 6 + "a ring"
    with pytest.raises(attnctl.OptionError, match=r"cut off.*20 tokens"):
        find_words(shipped("tiny-sd"), long, ["ring"])


def test_pipelines_that_cannot_tell() -> None:
    with pytest.raises(attnctl.HostError, match="no tokenizer"):
        find_words(zoo.FAMILIES["sd1"].build(), "a ring", ["ring"])
    pipe = zoo.FAMILIES["sana"].build()
    pipe.tokenizer = t5()
    with pytest.raises(attnctl.HostError, match="text layout that is not known"):
        find_words(pipe, "a ring", ["ring"])


@pytest.mark.parametrize(
    ("prompt", "want"),
    [
        ("a red circle and a blue square", [("circle", ["red"]), ("square", ["blue"])]),
        ("an orange ring", [("ring", ["orange"])]),
        ("a picture of a big red circle, a ring", [("circle", ["big", "red"]), ("ring", [])]),
        (
            "A cat sitting on the wooden floor next to two flying birds",
            [("cat", []), ("floor", ["wooden"]), ("birds", ["flying"])],
        ),
        (
            "a green triangle on a grey background",
            [("triangle", ["green"]), ("background", ["grey"])],
        ),
        ("and the of", []),
    ],
)
def test_concepts(prompt: str, want: list[Any]) -> None:
    found = concepts(prompt)
    assert [(c.noun.text, [a.text for a in c.attributes]) for c in found] == want
    for c in found:
        assert prompt[c.phrase.start : c.phrase.stop] == str(c)


def test_no_words_means_the_concepts() -> None:
    found = find_words(shipped("tiny-sd"), TWICE)
    assert [f.text for f in found] == ["red circle", "blue circle"]
    same = find_words(shipped("tiny-sd"), "a ring and a ring")
    assert [(f.text, f.positions) for f in same] == [("ring#1", (2,)), ("ring#2", (5,))]
    with pytest.raises(attnctl.OptionError, match="no concept"):
        find_words(shipped("tiny-sd"), "and the")
