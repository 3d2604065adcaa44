"""CLIP's byte-pair tokens. The vocabulary is bundled; that of a model folder can be used instead.

Text is brought to NFC, white space to single spaces, letters to lower case; words, digits and runs of marks are then
cut into the pieces that the merges know, of which the last of a word ends in `</w>`. Nothing is out of vocabulary.
The same ids as `CLIPTokenizer` of transformers 5, save that a tokenizer which pads with id 0 still reads `!` as 256,
the id that OpenCLIP learnt for it, where transformers gives 0. OpenAI's own tokenizer (clip/simple_tokenizer.py) also
undoes HTML entities and mends broken Unicode first. The work is done by the `tokenizers` library.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import CheckpointError, InputError
from sfumato.storage import read_json, write_json

MERGES = Path(__file__).parent / "clip_bpe" / "merges.txt"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"  # written in a prompt they are these marks, as in transformers
COMMA = ",</w>"
LENGTH = 77  # positions that CLIP knows
_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Text ↔ ids. `bos`, `eos`, `pad` and `comma` are ids; `len` is the number of ids.

    `vocabulary` maps pieces to ids, and `merges` has pairs of pieces in the order in which they are joined.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: int | None = None
    ):
        """`pad` fills windows after `eos`; None means `eos` itself, as CLIP-L has it. OpenCLIP-H and bigG have 0.

        `CheckpointError` when vocabulary and merges do not fit together.
        """
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        for mark in (BOS, EOS, COMMA):
            if mark not in vocabulary:
                raise CheckpointError(f"the tokenizer's vocabulary has no {mark!r}: it is not CLIP's")
        self.bos, self.eos, self.comma = (vocabulary[mark] for mark in (BOS, EOS, COMMA))
        self.vocabulary, self.merges = dict(vocabulary), tuple(merges)
        self._size = max(vocabulary.values()) + 1
        self.pad = self.eos if pad is None else pad
        if not 0 <= self.pad < self._size:
            raise InputError(
                f"pad must be a token id from 0 to {self._size - 1}, not {self.pad}", argument="pad"
            )
        try:
            model = models.BPE(
                vocab=dict(vocabulary), merges=list(merges), end_of_word_suffix="</w>", unk_token=EOS
            )
        except Exception as error:  # the library has no class of its own for a merge outside the vocabulary
            raise CheckpointError(f"the tokenizer's merges do not fit its vocabulary: {error}") from None
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.add_special_tokens([BOS, EOS])

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """The ids of the text, however many, without `bos` and `eos`. `InputError` for half of a surrogate pair."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # what the library makes of it depends on its version
            raise InputError(
                "the prompt holds half of a surrogate pair; give valid Unicode", argument="prompt"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """A readable form: words with single spaces between them, marks set apart, letters in lower case."""
        letters = {letter: byte for byte, letter in _byte_letters().items()}
        spelt = "".join(self._tokenizer.id_to_token(i) or "" for i in ids)
        words = (bytes(letters.get(c, 63) for c in word) for word in spelt.split("</w>"))
        return " ".join(word.decode("utf-8", errors="replace") for word in words).strip()


@functools.cache
def bundled(pad: int | None = None) -> ClipTokenizer:
    """CLIP's own tokenizer, of 49,408 ids: bos 49406, eos 49407."""
    merges = [(first, second) for first, second in _read_merges(MERGES)]
    letters = list(_byte_letters().values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    return ClipTokenizer({piece: i for i, piece in enumerate(pieces)}, merges, pad)


def open_folder(directory: Path, pad: int | None = None) -> ClipTokenizer:
    """The tokenizer in a model's `tokenizer/` folder: `vocab.json` and `merges.txt`, or `tokenizer.json`.

    `pad` None takes the folder's own. `CheckpointError` when the files are missing or are not a CLIP tokenizer's.
    """
    if (directory / "vocab.json").is_file():
        vocabulary: Any = read_json(directory / "vocab.json")
        merges: Any = _read_merges(directory / "merges.txt")
    elif (directory / "tokenizer.json").is_file():
        model = read_json(directory / "tokenizer.json").get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if isinstance(merges, list):  # pairs, or pairs as one text in files of older versions
            merges = [m.split(" ") if isinstance(m, str) else m for m in merges]
    else:
        raise CheckpointError(f"{directory} holds no tokenizer: no vocab.json and no tokenizer.json")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**24 for i in ids):
        raise CheckpointError(f"the vocabulary in {directory} must map pieces to ids")
    if not isinstance(merges, list) or not all(map(_is_pair, merges)):
        raise CheckpointError(f"the merges in {directory} must be pairs of pieces")
    merges = [tuple(merge) for merge in merges]
    return ClipTokenizer(vocabulary, merges, _folder_pad(directory, vocabulary) if pad is None else pad)


def save_folder(tokenizer: ClipTokenizer, directory: Path) -> None:
    """Write a model's `tokenizer/` folder, which `open_folder` and `CLIPTokenizer.from_pretrained` read."""
    pad = next(piece for piece, i in tokenizer.vocabulary.items() if i == tokenizer.pad)
    marks = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    write_json(directory / "vocab.json", tokenizer.vocabulary)
    lines = ["#version: 0.2", *map(" ".join, tokenizer.merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    write_json(directory / "special_tokens_map.json", marks)
    write_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "add_prefix_space": False, **marks},
    )


def _is_pair(merge: object) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(half, str) for half in merge)


def _folder_pad(directory: Path, vocabulary: Mapping[str, int]) -> int | None:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            mark = read_json(directory / name).get("pad_token")
            mark = mark.get("content") if isinstance(mark, dict) else mark
            if isinstance(mark, str) and mark in vocabulary:
                return vocabulary[mark]
    return None


def _read_merges(path: Path) -> list[list[str]]:
    """Lines of two pieces each, which the caller counts; a first line `#version…` is a heading."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: pieces may be odd spaces
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from None
    lines = lines[lines[0].startswith("#version") :]
    return [line.split(" ") for line in lines if line]


@functools.cache
def _byte_letters() -> dict[int, str]:
    """Byte → the letter that stands for it in the vocabulary (GPT-2, src/encoder.py), in the order of the ids.

    Printable Latin-1 bytes stand for themselves; the rest, among them the space, take letters from U+0100 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
