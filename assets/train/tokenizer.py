"""A real CLIP tokenizer over few words: byte-level BPE in which every known word is one token.

Other words fall apart into letters, so no prompt can fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
STOP = "</w>"
Merge = tuple[str, str]


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for the bytes in CLIP's (and GPT-2's) vocabulary."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    odd = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in sorted(plain)] + [chr(256 + i) for i in range(len(odd))]


def split(word: str, merges: list[Merge]) -> list[str]:
    """Pieces of a word after all merges, earliest merge first."""
    pieces = [*word[:-1], word[-1] + STOP]
    rank = {merge: i for i, merge in enumerate(merges)}
    while known := [rank[pair] for pair in pairwise(pieces) if pair in rank]:
        pieces = join(pieces, merges[min(known)])
    return pieces


def join(pieces: list[str], merge: Merge) -> list[str]:
    """Pieces with every occurrence of one merge carried out, from the left."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == merge:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def learn(words: Iterable[str]) -> list[Merge]:
    """Merges that make each word one token; later ones never undo earlier ones."""
    merges: list[Merge] = []
    for word in words:
        while len(pieces := split(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def save_tokenizer(folder: Path, words: Iterable[str], length: int) -> CLIPTokenizer:
    """Write ``vocab.json`` and ``merges.txt`` and the tokenizer's configuration.

    Args:
        folder: where to.
        words: what becomes one token each.
        length: tokens per prompt, start and end included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters, merges = byte_letters(), learn(words)
    tokens = [*letters, *(letter + STOP for letter in letters), *map("".join, merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    listed = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    _write(folder / "merges.txt", listed)
    _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    _write(folder / "tokenizer_config.json", json.dumps(_configuration(length), indent=1) + "\n")
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _configuration(length: int) -> dict[str, object]:
    return {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
