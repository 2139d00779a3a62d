"""A real Llama tokenizer over few words: BPE with byte fallback, every known word one token.

Other words fall apart into letters and other letters into bytes, so no text can fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from attnctl.assets.train.tokenizer import Merge, join

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNKNOWN, START, END, PAD, IMAGE = SPECIAL
SPACE = "▁"
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
LETTERS = (SPACE, *(chr(code) for code in range(33, 127)))
LENGTH = 1024
CONFIGURATION = {
    "tokenizer_class": "LlamaTokenizer",
    "model_max_length": LENGTH,
    "padding_side": "left",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "unk_token": UNKNOWN,
    "bos_token": START,
    "eos_token": END,
    "pad_token": PAD,
    "image_token": IMAGE,
    "extra_special_tokens": {"image_token": IMAGE},
}


def pieces(word: str, merges: list[Merge]) -> list[str]:
    """Pieces of a word after all merges, earliest merge first."""
    parts = list(word)
    rank = {merge: i for i, merge in enumerate(merges)}
    while known := [rank[pair] for pair in pairwise(parts) if pair in rank]:
        parts = join(parts, merges[min(known)])
    return parts


def learn(words: Iterable[str]) -> list[Merge]:
    """Merges that make each word one token; later ones never undo earlier ones."""
    merges: list[Merge] = []
    for word in words:
        while len(parts := pieces(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    return merges


def save_tokenizer(
    folder: Path, words: Iterable[str], starts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """Write ``tokenizer.json`` and its configuration, and load them.

    Args:
        folder: where to.
        words: what becomes one token each after a space.
        starts: what becomes one token each where no space precedes, as after a line break.
    """
    merges = learn([*(SPACE + word for word in words), *starts])
    listed = dict.fromkeys([*SPECIAL, *BYTES, *LETTERS, *map("".join, merges)])
    vocabulary = {token: i for i, token in enumerate(listed)}
    bpe = models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    core = Tokenizer(bpe)
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    core.post_processor = TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A {START} $B",
        special_tokens=[(START, SPECIAL.index(START))],
    )
    core.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    text = json.dumps(CONFIGURATION, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
