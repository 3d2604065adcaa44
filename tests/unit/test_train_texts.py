"""Captions of frozen encoders are read once, and what is remembered changes no number."""

from __future__ import annotations

import pytest
import torch

from sfumato.train.texts import Remembered
from sfumato.types import Conditioning


class Reader:
    """Features that tell the text; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts) -> Conditioning:
        self.asked.append(list(texts))
        rows = torch.tensor([[float(sum(map(ord, text)))] for text in texts])
        return Conditioning(rows[:, None].expand(-1, 3, 4).contiguous(), None, rows)


@pytest.mark.parametrize("together", [True, False])
def test_each_text_is_read_once(together):
    reader = Reader()
    told, fresh = Remembered(reader, together=together), Reader()
    for texts in (["a", "b", "a"], ["b", "c"], ["a", "b", "c"]):
        found, right = told(texts), fresh(texts)
        assert torch.equal(found.tokens, right.tokens) and torch.equal(found.vector, right.vector)
        assert found.mask is None
    assert reader.asked == ([["a", "b"], ["c"]] if together else [["a"], ["b"], ["c"]])


def test_what_was_used_last_is_kept_while_there_is_room():
    reader = Reader()
    told = Remembered(reader, together=False, room=3 * (3 * 4 + 1) * 4)
    told(["a", "b", "c"])
    told(["a"])
    told(["d"])  # in the place of b
    reader.asked.clear()
    told(["a", "c", "d"])
    assert not reader.asked
    told(["b"])
    assert reader.asked == [["b"]]
    many = told(["a", "b", "c", "d", "e"])  # more than there is room for are told all the same
    assert torch.equal(many.tokens, Reader()(["a", "b", "c", "d", "e"]).tokens)
