"""Text to tokens and back, and an encoder that does not read padding."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.text import TextConfig, TextEncoder, Tokenizer, learn_words
from sfumato.text.tokenizer import FIRST_BYTE, FIRST_WORD, PAD, START, WORD_CLOSE, WORD_OPEN, letters, split

WORDS = ("a", "red", "cube", "left", "of", ",", "half-open", "artist's")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(WORDS)


def spelt(text: str) -> list[int]:
    return [WORD_OPEN, *(FIRST_BYTE + byte for byte in text.encode()), WORD_CLOSE]


# --- tokens ------------------------------------------------------------------------------------------------------


def test_a_known_word_is_one_token(tokenizer):
    assert tokenizer.encode("A red cube") == [START, FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2]
    assert len(tokenizer) == 4 + 256 + len(WORDS)


def test_an_unknown_word_is_spelt(tokenizer):
    assert tokenizer.encode("red zebra") == [START, FIRST_WORD + 1, *spelt("zebra")]


def test_quotes_keep_case_and_never_become_words(tokenizer):
    assert tokenizer.encode('a "Red CUBE"') == [START, FIRST_WORD, *spelt("Red CUBE")]
    assert tokenizer.encode('"red"') == [START, *spelt("red")]


def test_quotes_keep_bytes(tokenizer):
    """Outside quotes look-alikes are one letter (NFKC); between them the user means these very ones."""
    for text in ("ﬁ", "①", "ＲＥＤ", "e\u0301", "2²"):
        assert tokenizer.encode(f'"{text}"') == [START, *spelt(text)]
    assert tokenizer.encode("ＲＥＤ") == tokenizer.encode("red")


def test_quotes_of_a_phone_or_an_east_asian_keyboard_are_quotes(tokenizer):
    for text in ("“Red”", "＂Red＂"):
        assert tokenizer.encode(text) == [START, *spelt("Red")]
    assert split('say "a “b” C"') == ["say", '"a “b” C"']


def test_an_unclosed_quote_is_a_mark(tokenizer):
    assert split('12" Red disc') == ["12", '"', "red", "disc"]
    assert split('"Red\nCube"') == ['"', "red", "cube", '"']
    assert tokenizer.encode('"') == [START, *spelt('"')] != tokenizer.encode('""')


def test_words_may_hold_hyphens_and_apostrophes(tokenizer):
    assert split("An artist's half-open box, left") == ["an", "artist's", "half-open", "box", ",", "left"]
    assert tokenizer.encode("half-open, artist's")[1:] == [FIRST_WORD + 6, FIRST_WORD + 5, FIRST_WORD + 7]


def test_white_space_and_case_do_not_matter(tokenizer):
    assert tokenizer.encode("  RED\t\n cube ") == tokenizer.encode("red cube")
    assert tokenizer.encode("") == tokenizer.encode(" \n") == [START]


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧", "كرة حمراء", "קובייה אדומה", "红色 立方体", "Straße", "नीला घन", "_", "\x01"]
)
def test_no_text_is_out_of_vocabulary(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) > 1 and max(ids) < len(tokenizer)
    assert tokenizer.decode(ids).replace(" ", "") == "".join(split(text))


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_decoding_gives_the_pieces_back(text):
    tokenizer = Tokenizer(WORDS, max_tokens=1000)
    ids = tokenizer.encode(text)
    assert PAD not in ids
    assert tokenizer.decode(ids) == " ".join(map(letters, split(text)))


def test_decoding_forgives_broken_spelling(tokenizer):
    assert tokenizer.decode([START, WORD_OPEN, FIRST_BYTE + 0xC3, WORD_CLOSE, FIRST_WORD + 1, PAD]) == "� red"
    assert tokenizer.decode([WORD_CLOSE, FIRST_BYTE + 65, WORD_OPEN, FIRST_BYTE + 65]) == ""


def test_a_prompt_that_is_too_long_is_refused_with_its_length(tokenizer):
    assert len(tokenizer.encode("red " * 127)) == 128
    with pytest.raises(InputError, match=r"needs 129 tokens .* at most 128") as caught:
        tokenizer.encode("red " * 128)
    assert caught.value.argument == "prompt"
    with pytest.raises(InputError, match=r"needs 203 tokens"):
        tokenizer.encode('"' + "é" * 100 + '"')


def test_a_batch_is_padded_to_a_common_multiple(tokenizer):
    ids, mask = tokenizer.batch(["red cube", "", "a red cube left of a red cube"], multiple=4)
    assert ids.shape == mask.shape == (3, 12) and ids.dtype == torch.int64
    assert mask.sum(1).tolist() == [3, 1, 9]
    assert ids[0, :3].tolist() == tokenizer.encode("red cube")
    assert not ids[~mask].any()


# --- the vocabulary ----------------------------------------------------------------------------------------------


def test_words_are_learnt_by_frequency_then_alphabet():
    texts = ["a red cube", "A blue cube", 'a sign "cube cube cube cube"']
    assert learn_words(texts) == ("a", "cube", "blue", "red", "sign")
    assert learn_words(texts, limit=2) == ("a", "cube")


def test_the_vocabulary_does_not_depend_on_the_order_of_texts():
    texts = [f"w{i % 7} x{i % 5}, y{i}" for i in range(60)]
    expected = learn_words(texts, 20)
    random.Random(0).shuffle(texts)
    assert learn_words(iter(texts), 20) == expected


def test_learnt_words_become_single_tokens():
    texts = ["A red cube, left of a half-open box.", "Straße"]
    tokenizer = Tokenizer(learn_words(texts))
    for text in texts:
        assert len(tokenizer.encode(text)) == 1 + len(split(text))


# --- the encoder -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tokenizer) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextConfig(len(tokenizer), width=64, depth=2, heads=2)).eval()


@torch.no_grad()
def test_the_encoder_does_not_read_padding(tokenizer, encoder):
    ids, mask = tokenizer.batch(["a red cube", "red"], multiple=8)
    features = encoder(ids, mask)
    assert features.shape == (2, 8, 64)
    spoiled = torch.where(mask, ids, torch.randint_like(ids, len(tokenizer)))
    assert torch.equal(encoder(spoiled, mask)[mask], features[mask])
    longer_ids, longer_mask = tokenizer.batch(["a red cube", "red"], multiple=32)
    longer = encoder(longer_ids, longer_mask)
    torch.testing.assert_close(longer[:, :8][mask], features[mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_encoder_reads_order(tokenizer, encoder):
    (ids, mask), (other, _) = tokenizer.batch(["red left cube"]), tokenizer.batch(["cube left red"])
    one, two = encoder(ids, mask)[0], encoder(other, mask)[0]
    assert (one[1] - two[3]).abs().max() > 1e-2  # "red", first and last
    assert (one[2] - two[2]).abs().max() > 1e-3  # "left", between other neighbours


def test_every_weight_of_the_encoder_is_used(tokenizer, encoder):
    ids, mask = tokenizer.batch(["a red cube"])
    targets = torch.randn(1, ids.shape[1], 64, generator=torch.Generator().manual_seed(0))
    loss = (encoder(ids, mask) * targets)[mask].sum()
    gradients = torch.autograd.grad(loss, list(encoder.parameters()), allow_unused=True)
    names = [name for name, _ in encoder.named_parameters()]
    idle = [n for n, g in zip(names, gradients, strict=True) if g is None or not g.abs().max() > 0]
    assert not idle
