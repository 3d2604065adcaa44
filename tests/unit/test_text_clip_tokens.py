"""CLIP's tokens: known ids, round trips, and tokenizers from model folders."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import CheckpointError, InputError
from sfumato.text.clip_tokens import MERGES, ClipTokenizer, _byte_letters, bundled, open_folder


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return bundled()


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, int], list[str]]:
    """The vocabulary as published folders have it, worked out here from the merges' file."""
    merges = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    printable = [chr(b) for r in (range(33, 127), range(161, 173), range(174, 256)) for b in r]
    letters = printable + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return {piece: i for i, piece in enumerate(pieces)}, merges


# --- what is known of CLIP ---------------------------------------------------------------------------------------


def test_the_vocabulary_has_its_known_size_and_marks(tokenizer):
    assert len(tokenizer) == 49_408
    assert (tokenizer.bos, tokenizer.eos, tokenizer.comma) == (49_406, 49_407, 267)
    assert tokenizer.pad == 49_407 and bundled(0).pad == 0


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of an astronaut riding a horse", [320, 1125, 539, 550, 18376, 6765, 320, 4558]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("dog, cat.", [1929, 267, 2368, 269]),
        ("", []),
        (" \n\t", []),
    ],
)
def test_known_texts_have_their_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


def test_case_spaces_and_composition_do_not_matter(tokenizer):
    assert tokenizer.encode("  A  Photo\n\tOF ") == tokenizer.encode("a photo of")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")


def test_digits_stand_alone_and_marks_together(tokenizer):
    assert tokenizer.encode("2024") == [t for d in "2024" for t in tokenizer.encode(d)]
    assert len(tokenizer.encode("!!!")) == 1 and len(tokenizer.encode("it's")) == 2


def test_the_marks_of_a_window_keep_their_ids_when_written(tokenizer):
    assert tokenizer.encode("a<|endoftext|>b") == [320, 49_407, *tokenizer.encode("b")]


@settings(deadline=None)
@given(st.text(max_size=40))
def test_every_text_has_ids(text):
    ids = bundled().encode(text)
    assert all(0 <= i < 49_408 for i in ids)
    # Unicode does not count the four separators as white space, as Python does
    assert bool(ids) == any(not c.isspace() or c in "\x1c\x1d\x1e\x1f" for c in text)


@settings(deadline=None)
@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyzéøжд漢字", min_size=1), min_size=1))
def test_words_come_back(words):
    text = " ".join(words)
    assert bundled().decode(bundled().encode(text)) == text


def test_letters_of_a_sign_of_several_bytes_come_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode("👩‍👩‍👧 Straße")) == "👩‍👩‍👧 straße"
    assert tokenizer.decode(tokenizer.encode("👩")[:1]) != "👩"  # half a sign is not an error


def test_a_long_text_is_not_cut(tokenizer):
    assert len(tokenizer.encode("cat " * 5_000)) == 5_000
    assert tokenizer.decode(tokenizer.encode("a" * 32_000)) == "a" * 32_000


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("a \ud83d b")


def test_the_licence_stands_beside_the_vocabulary():
    assert "Copyright (c) 2021 OpenAI" in (MERGES.parent / "LICENSE.txt").read_text(encoding="utf-8")
    assert MERGES.stat().st_size < 1_500_000


def test_bytes_have_letters_of_their_own():
    letters = _byte_letters()
    assert sorted(letters) == list(range(256)) and len(set(letters.values())) == 256
    assert not any(c.isspace() for c in letters.values())


# --- folders -----------------------------------------------------------------------------------------------------

TEXTS = ("a photo of a cat, 4k", "ÜBER 漢字 👩‍👩‍👧 it's", "")


def test_a_folder_of_vocabulary_and_merges_gives_the_same_ids(tmp_path, files, tokenizer):
    vocabulary, merges = files
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    opened = open_folder(tmp_path)
    assert len(opened) == len(tokenizer) and opened.pad == 49_407
    assert [opened.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert open_folder(tmp_path, pad=0).pad == 0


@pytest.mark.parametrize("pairs", [False, True])
def test_a_folder_with_tokenizer_json_gives_the_same_ids(tmp_path, files, tokenizer, pairs):
    vocabulary, merges = files
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [m.split(" ") for m in merges] if pairs else merges,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}), encoding="utf-8")
    opened = open_folder(tmp_path)
    assert [opened.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


@pytest.mark.parametrize("mark", ["!", {"content": "!", "lstrip": False}])
@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_the_folder_says_what_pads(tmp_path, mark, name):
    pieces = ["!", "a", "b", "ab</w>", "b</w>", ",</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("a b</w>")  # the heading may be absent
    assert open_folder(tmp_path).pad == 7
    (tmp_path / name).write_text(json.dumps({"pad_token": mark}))
    assert open_folder(tmp_path).pad == 0
    assert open_folder(tmp_path, pad=5).pad == 5
    assert open_folder(tmp_path).encode("AB b") == [3, 4]


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        (None, None, "holds no tokenizer"),
        ("[1]", "a b", "JSON list; an object"),
        ("{}", "a b", "must map pieces to ids"),
        ('{"a": "x"}', "a b", "must map pieces to ids"),
        ('{"a": -1}', "a b", "must map pieces to ids"),
        ('{"a": 99999999999}', "a b", "must map pieces to ids"),
        ('{"a": 0}', "a b c", "must be pairs"),
        ('{"a": 0}', "", "has no '<|startoftext|>': it is not CLIP's"),
        ('{"a": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, ",</w>": 3}', "a b", "do not fit"),
        ('{"a": 0}', None, "cannot be read"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(tmp_path, vocabulary, merges, message):
    if vocabulary is not None:
        (tmp_path / "vocab.json").write_text(vocabulary)
    if merges is not None:
        (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(CheckpointError) as caught:
        open_folder(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model", [None, [], {}, {"vocab": {"a": 0}}, {"vocab": {"a": 0}, "merges": [["a"], 3]}]
)
def test_a_broken_tokenizer_json_is_refused(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(CheckpointError):
        open_folder(tmp_path)


def test_padding_must_be_an_id():
    for pad in (-1, 49_408):
        with pytest.raises(InputError, match="from 0 to 49407"):
            bundled(pad)
