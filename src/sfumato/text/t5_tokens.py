"""T5's tokens: pieces of words, the likeliest cut of a text under a unigram model (Kudo 2018, 1804.10959).

The vocabulary is not bundled: it is in `tokenizer.json` (or `spiece.model`) of every repository that has the encoder.
The `tokenizers` library does the work, by the file's own rules. A text ends in `</s>`; what follows is filled with
`<pad>`, and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import CheckpointError, InputError
from sfumato.text.sentencepiece import read_model
from sfumato.text.syntax import Sections
from sfumato.text.windows import Window, check_weight
from sfumato.types import MAX_TEXT_LENGTH as MOST

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS, PAD = "</s>", "<pad>"
LENGTH = (
    256  # tokens that a prompt is filled up to, as diffusers does; Stability's reference and ComfyUI have 77
)
FILES = ("tokenizer.json", "spiece.model")


class T5Tokenizer:
    """Text → ids. `eos` and `pad` are ids; `len` is one more than the largest id."""

    def __init__(self, tokenizer: Tokenizer, source: str = "the tokenizer"):
        """`CheckpointError`, in which `source` stands for the file, when it is not T5's."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        eos, pad = (tokenizer.token_to_id(mark) for mark in (EOS, PAD))
        if eos is None or pad is None:
            raise CheckpointError(f"{source} is not T5's: its vocabulary has no {EOS} and {PAD}")
        self.eos, self.pad = eos, pad
        self._tokenizer = tokenizer
        self._size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def __len__(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """The ids of the text, however many, without `eos`."""
        return [i for i, _ in self.placed(text)]

    def placed(self, text: str) -> list[tuple[int, int]]:
        """The ids of the text, each with the place in it of the last character that it stands for."""
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # what the library makes of it depends on its version
            raise InputError(
                "the prompt holds half of a surrogate pair; give valid Unicode", argument="prompt"
            ) from None
        return [(i, max(start, stop - 1)) for i, (start, stop) in zip(found.ids, found.offsets, strict=True)]


def open_file(path: Path) -> T5Tokenizer:
    """The tokenizer of a `tokenizer.json` or `spiece.model`. `CheckpointError` when it is neither, or not T5's."""
    if path.suffix == ".model":
        return T5Tokenizer(read_model(path), str(path))
    from tokenizers import Tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}") from None
    except Exception as error:  # the library has no class of its own
        raise CheckpointError(f"{path} is no tokenizer that the tokenizers library reads: {error}") from None
    return T5Tokenizer(tokenizer, str(path))


def find(places: Iterable[Path]) -> Path | None:
    """The first of the places that is a tokenizer's file, or the file in the first folder that holds one."""
    for place in places:
        for path in (place, *(place / name for name in FILES)):
            if path.is_file() and path.name.endswith(FILES):
                return path
    return None


def lay_out(
    prompts: Sequence[Sections], tokenizer: T5Tokenizer, length: int = LENGTH, most: int = MOST
) -> list[Window]:
    """Parsed prompts → one window each, all of one size: `length` tokens, or as many as the longest needs.

    A prompt is cut into pieces as a whole, so that weights change no id; a token has the weight of its last character.
    Where CLIP would begin a new window there is a space. `InputError` for a weight beyond ±100, and for a prompt of
    more than `most` tokens: nothing is cut.
    """
    rows = [_row(sections, tokenizer, most) for sections in prompts]
    size = max(length, *(len(ids) for ids, _ in rows))
    return [
        Window((*ids, *[tokenizer.pad] * (size - len(ids))), (*weights, *[1.0] * (size - len(weights))))
        for ids, weights in rows
    ]


def _row(sections: Sections, tokenizer: T5Tokenizer, most: int) -> tuple[list[int], list[float]]:
    text, weights = "", list[float]()  # a weight for each character
    for section in sections:
        if text and section:
            text, weights = text + " ", [*weights, 1.0]
        for piece in section:
            check_weight(piece)
            text += piece.text
            weights += [piece.weight] * len(piece.text)
    tokens = tokenizer.placed(text)
    if len(tokens) + 1 > most:
        raise InputError(
            f"the prompt has {len(tokens) + 1} tokens of T5, with its end mark; at most {most} are read: shorten it, "
            "or leave T5 out",
            argument="prompt",
        )
    ids = [*(i for i, _ in tokens), tokenizer.eos]
    return ids, [*(weights[place] if place < len(weights) else 1.0 for _, place in tokens), 1.0]
