"""Words plus bytes: known words are one token each; anything else, and everything in quotes, is spelt in bytes.

Spelling keeps rare words readable to the network (character-aware encoders, 2212.10562) and means that no text is
ever out of vocabulary. Case is folded except inside quotes, where a user means the letters themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sfumato.errors import InputError

PAD, START, WORD_OPEN, WORD_CLOSE = 0, 1, 2, 3  # spelt words stand between WORD_OPEN and WORD_CLOSE
FIRST_BYTE = 4
FIRST_WORD = FIRST_BYTE + 256
_QUOTED = re.compile(r"(\"[^\"\n]*\"|“[^“”\n]*”|＂[^＂\n]*＂)")
_PIECE = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_", re.UNICODE)


def split(text: str) -> list[str]:
    """Quoted strings as they are (in straight quotes), words and single marks under NFKC and case folding."""
    pieces: list[str] = []
    for number, part in enumerate(_QUOTED.split(text)):
        if number % 2:  # what the pattern caught stands between what it did not
            pieces.append(f'"{part[1:-1]}"')
        else:
            pieces += [p.casefold() for p in _PIECE.findall(unicodedata.normalize("NFKC", part))]
    return pieces


def letters(piece: str) -> str:
    """What a piece says: itself, or what stands between its quotes."""
    return piece[1:-1] if len(piece) > 1 and piece.startswith('"') else piece


def learn_words(texts: Iterable[str], limit: int = 4096) -> tuple[str, ...]:
    """The `limit` most frequent words of the texts (ties by alphabet); quoted strings are never words."""
    counts = Counter(piece for text in texts for piece in split(text) if not piece.startswith('"'))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(word for word, _ in ranked[:limit])


class Tokenizer:
    """Text → token ids, and back to text for reading. `words` fixes the ids; its order is part of a model."""

    def __init__(self, words: Sequence[str], max_tokens: int = 128):
        self.words = tuple(words)
        self.max_tokens = max_tokens
        self._ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return FIRST_WORD + len(self.words)

    def encode(self, text: str) -> list[int]:
        """START and the text's tokens. Longer than `max_tokens` is an `InputError`, never a silent cut."""
        ids = [START]
        for piece in split(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids += [WORD_OPEN, *(FIRST_BYTE + byte for byte in letters(piece).encode()), WORD_CLOSE]
        if len(ids) > self.max_tokens:
            raise InputError(
                f"the prompt needs {len(ids)} tokens and this model reads at most {self.max_tokens}; shorten it "
                "(a word the model does not know costs a token a letter)",
                argument="prompt",
            )
        return ids

    def batch(self, texts: Sequence[str], multiple: int = 8) -> tuple[Tensor, Tensor]:
        """`encode` each text and `pad` them together."""
        return pad([self.encode(text) for text in texts], multiple)

    def decode(self, ids: Iterable[int]) -> str:
        """A readable form of the tokens: known words as they are, spelt ones joined from their bytes."""
        pieces: list[str] = []
        spelling: bytearray | None = None
        for token in ids:
            if token == WORD_OPEN:
                spelling = bytearray()
            elif token == WORD_CLOSE and spelling is not None:
                pieces.append(spelling.decode("utf-8", errors="replace"))
                spelling = None
            elif FIRST_BYTE <= token < FIRST_WORD and spelling is not None:
                spelling.append(token - FIRST_BYTE)
            elif token >= FIRST_WORD:
                pieces.append(self.words[token - FIRST_WORD])
        return " ".join(pieces)


def pad(rows: Sequence[Sequence[int]], multiple: int = 8) -> tuple[Tensor, Tensor]:
    """ids (B, N) int64, N the longest row rounded up to `multiple`, and mask (B, N) bool, True on real tokens."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.full((len(rows), length), PAD, dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, ids != PAD
