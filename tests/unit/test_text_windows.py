"""Prompts in windows: nothing is cut, nothing learnt is split, and where a prompt breaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfumato.errors import CheckpointError, InputError
from sfumato.text.clip_tokens import bundled
from sfumato.text.inversion import Inversion, read_inversion
from sfumato.text.syntax import Piece, parse
from sfumato.text.weighting import blended, from_empty, scaled
from sfumato.text.windows import LENGTH, ROOM, Window, empty_window, lay_out, level

BOS, EOS, COMMA = 49_406, 49_407, 267
CAT, DOG = 2368, 1929


def windows(prompt: str, rule: str = "a1111", inversions=(), backtrack: int = 20) -> tuple[Window, ...]:
    return lay_out(parse(prompt, rule), bundled(), inversions, backtrack)


def inside(window: Window) -> list[int]:
    """The ids between the marks, without padding."""
    assert window.ids[0] == BOS and len(window.ids) == len(window.weights) == LENGTH
    return list(window.ids[1 : window.ids.index(EOS)])


def learnt(name: str, count: int, width: int = 4) -> Inversion:
    return Inversion(name, (name,), torch.randn(count, width, generator=torch.Generator().manual_seed(count)))


# --- one window --------------------------------------------------------------------------------------------------


def test_a_short_prompt_is_one_padded_window():
    (window,) = windows("a photo of a cat")
    assert window.ids == (BOS, 320, 1125, 539, 320, CAT, *[EOS] * 71)
    assert window.weights == (1.0,) * LENGTH and not window.weighted and not window.inversions


def test_padding_is_the_tokenizer_s():
    (window,) = lay_out(parse("cat"), bundled(0))
    assert window.ids == (BOS, CAT, EOS, *[0] * 74)
    assert empty_window(bundled(0)).ids == (BOS, EOS, *[0] * 75)


def test_an_empty_prompt_is_the_empty_window():
    for prompt in ("", "  ", "()", "\\"):
        assert windows(prompt) == (empty_window(bundled()),)


def test_weights_stand_on_their_tokens():
    (window,) = windows("a (cat dog:1.5) [cat]")
    assert window.ids[1:5] == (320, CAT, DOG, CAT)
    assert window.weights[:6] == (1, 1, 1.5, 1.5, pytest.approx(1 / 1.1), 1) and window.weighted


def test_pieces_are_tokens_of_their_own():
    """As in all references: brackets inside a word cut it."""
    assert inside(windows("(cat)s")[0]) == [CAT, *bundled().encode("s")] != inside(windows("cats")[0])


# --- many windows ------------------------------------------------------------------------------------------------


def test_75_tokens_are_one_window_and_76_are_two():
    assert [len(inside(w)) for w in windows("cat " * 75)] == [75]
    assert windows("cat " * 75)[0].ids[-1] == EOS
    assert [len(inside(w)) for w in windows("cat " * 76)] == [75, 1]


def test_a_prompt_breaks_after_a_near_comma():
    prompt = "cat " * 60 + ", " + "dog " * 20
    first, second = windows(prompt)
    assert inside(first) == [CAT] * 60 + [COMMA]
    assert inside(second) == [DOG] * 20
    assert [len(inside(w)) for w in windows(prompt, backtrack=0)] == [75, 6]


def test_how_near_a_comma_must_be():
    """With a backtrack of 20 the comma may be the 20th token from the end, so that 19 move."""
    for before, expected in ((55, [56, 20]), (54, [75, 1])):
        prompt = "cat " * before + ", " + "dog " * (75 - before)
        assert [len(inside(w)) for w in windows(prompt)] == expected


def test_a_comma_just_past_the_end_takes_nothing_along():
    prompt = "cat " * 70 + ", " + "dog " * 4 + ", dog"
    assert [len(inside(w)) for w in windows(prompt)] == [75, 2]
    assert inside(windows(prompt)[1]) == [COMMA, DOG]


def test_a_comma_of_an_earlier_window_is_forgotten():
    sizes = [len(inside(w)) for w in windows("cat " * 74 + ", " + "dog " * 80)]
    assert sizes == [75, 75, 5]


def test_weights_move_with_their_tokens():
    first, second = windows("cat " * 60 + ", (" + "dog " * 20 + ":1.5)")
    assert not first.weighted
    assert second.weights == (1.0, *[1.5] * 20, *[1.0] * 56)


def test_break_fills_a_window():
    first, second = windows("cat BREAK dog")
    assert (inside(first), inside(second)) == ([CAT], [DOG])
    assert [inside(w) for w in windows("BREAK cat BREAK BREAK dog BREAK")] == [[], [CAT], [], [DOG]]
    assert [len(inside(w)) for w in windows("cat " * 75 + "BREAK dog")] == [75, 1]
    assert [inside(w) for w in windows("BREAK")] == [[]]
    assert [inside(w) for w in windows("cat BREAK dog", rule="none")] == [
        [CAT, *bundled().encode("break"), DOG]
    ]


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["cat", "dog", ",", "antidisestablishmentarianism", "👩‍👩‍👧", "(a:1.2)"]),
        max_size=150,
    ),
    st.integers(0, 74),
)
def test_nothing_is_cut_and_the_order_stays(words, backtrack):
    prompt = " ".join(words)
    rows = windows(prompt, backtrack=backtrack)
    expected = [i for piece in parse(prompt)[0] for i in bundled().encode(piece.text)]
    assert [i for row in rows for i in inside(row)] == expected
    assert all(len(inside(row)) >= ROOM - backtrack for row in rows[:-1])
    assert len(rows) == 1 or inside(rows[-1])


def test_prompts_are_brought_to_one_number_of_windows():
    long, short = windows("cat " * 160), windows("dog")
    rows = level([long, short], bundled())
    assert rows[0] == long and [len(row) for row in rows] == [3, 3]
    assert rows[1] == (*short, empty_window(bundled()), empty_window(bundled()))


def test_what_cannot_be_laid_out_is_refused_by_name():
    for prompt in ("(cat:101)", "(cat:-1000)", "(" * 9000 + "cat" + ")" * 9000):
        with pytest.raises(InputError, match='weight of "cat" in the prompt') as caught:
            windows(prompt)
        assert caught.value.argument == "prompt"
    with pytest.raises(InputError, match="between -100 and 100"):
        lay_out(((Piece("cat", float("nan")),),), bundled())
    for backtrack in (-1, 75):
        with pytest.raises(InputError, match="from 0 to 74"):
            windows("cat", backtrack=backtrack)


# --- textual inversion -------------------------------------------------------------------------------------------


def test_a_trigger_becomes_its_vectors():
    style = learnt("my-style", 3)
    (window,) = windows("a (My-Style:1.2) cat", inversions=[style])
    assert window.inversions == ((2, style),)
    assert window.ids[:7] == (BOS, 320, 0, 0, 0, CAT, EOS)
    assert window.weights[:6] == (1, 1, 1.2, 1.2, 1.2, 1)


def test_a_trigger_is_whole_words():
    style = learnt("cat", 1)
    assert not windows("cats concatenate", inversions=[style])[0].inversions
    assert windows("cat-like", inversions=[style])[0].inversions == ((1, style),)


def test_the_longest_trigger_wins():
    short, long = learnt("bad", 1), learnt("bad-hands-5", 2)
    (window,) = windows("bad, bad-hands-5", inversions=[short, long])
    assert window.inversions == ((1, short), (3, long))


def test_comfy_s_way_to_call_an_inversion():
    style = learnt("style", 2)
    for prompt in ("embedding:style", "(embedding:style:1.3)"):
        (window,) = windows(prompt, rule="comfy", inversions=[style])
        assert window.inversions == ((1, style),) and window.ids[:4] == (BOS, 0, 0, EOS)


@pytest.mark.parametrize("count", [1, 8, 75])
def test_vectors_are_never_split(count):
    style = learnt("style", count)
    for before in range(0, 76, 5):
        rows = windows("cat " * before + "style dog", inversions=[style])
        places = [(i, start) for i, row in enumerate(rows) for start, _ in row.inversions]
        assert len(places) == 1 and 1 <= places[0][1] <= LENGTH - 1 - count
        assert places[0] == ((0, before + 1) if before + count <= ROOM else (1, 1))
        assert sum(CAT in row.ids for row in rows) == bool(before)
        assert DOG in rows[-1].ids


def test_vectors_move_with_the_text_after_a_comma():
    style = learnt("style", 4)
    first, second = windows("cat " * 65 + ", dog style " + "dog " * 5, inversions=[style])
    assert not first.inversions and inside(first) == [CAT] * 65 + [COMMA]
    assert second.inversions == ((2, style),) and second.ids[:7] == (BOS, DOG, 0, 0, 0, 0, DOG)


def test_inversions_that_cannot_be_called_are_refused():
    with pytest.raises(InputError, match="two textual inversions are called by 'Style'"):
        windows("cat", inversions=[learnt("style", 1), learnt("Style", 2)])
    with pytest.raises(InputError, match="visible"):
        windows("cat", inversions=[learnt(" ", 1)])
    with pytest.raises(InputError, match="'big' has 76 vectors; a window holds 75"):
        windows("big cat", inversions=[learnt("big", 76)])


# --- their files -------------------------------------------------------------------------------------------------


def test_the_layouts_of_files(tmp_path):
    one, many = torch.randn(768), torch.randn(5, 768, dtype=torch.float16)
    save_file({"emb_params": many}, tmp_path / "nice.safetensors")
    save_file({"<cat-toy>": one}, tmp_path / "learned.safetensors")
    save_file({"clip_l": many, "clip_g": torch.randn(5, 1280)}, tmp_path / "large.safetensors")
    nice = read_inversion(tmp_path / "nice.safetensors")
    assert list(nice) == [""] and nice[""].triggers == ("nice",)
    assert nice[""].vectors.dtype == torch.float32 and torch.equal(nice[""].vectors, many.float())
    learned = read_inversion(tmp_path / "learned.safetensors")[""]
    assert learned.triggers == ("learned", "<cat-toy>") and torch.equal(learned.vectors, one[None])
    large = read_inversion(tmp_path / "large.safetensors")
    assert {key: (i.name, len(i), i.width) for key, i in large.items()} == {
        "clip_l": ("large", 5, 768),
        "clip_g": ("large", 5, 1280),
    }
    (window,) = windows("a <cat-toy> and learned", inversions=[learned])
    assert [start for start, _ in window.inversions] == [2, 4]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it holds nothing"),
        ({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, "it holds a, b"),
        ({"clip_l": torch.zeros(2, 4), "clip_g": torch.zeros(3, 4)}, "different numbers"),
        ({"emb_params": torch.zeros(2, 4, 4)}, r"\(n, D\) numbers"),
        ({"emb_params": torch.zeros(0, 4)}, r"\(n, D\) numbers"),
        ({"emb_params": torch.tensor(1.0)}, r"\(n, D\) numbers"),
        ({"emb_params": torch.zeros(2, 4, dtype=torch.int64)}, r"\(n, D\) numbers"),
        ({"emb_params": torch.tensor([[1.0, float("nan")]])}, "emb_params holds numbers that are not finite"),
    ],
)
def test_files_that_are_no_inversion_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_inversion(tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickled_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"nice{suffix}"
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}}, path)
    with pytest.raises(CheckpointError, match="pickled checkpoint, which can run code"):
        read_inversion(path)
    renamed = path.rename(tmp_path / "nice.safetensors")
    with pytest.raises(CheckpointError, match="pickled"):
        read_inversion(renamed)


# --- what a weight does ------------------------------------------------------------------------------------------


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    z, empty = torch.randn(2, LENGTH, 8, generator=draw) + 0.5
    weights = torch.ones(LENGTH, 1)
    weights[3], weights[4], weights[5] = 1.5, 0.0, -1.0
    return z, weights, empty


def test_a1111_scales_tokens_and_keeps_the_mean(features):
    z, weights, _ = features
    out = scaled(z, weights)
    torch.testing.assert_close(out.mean(), z.mean())
    ratio = out / (z * weights)
    torch.testing.assert_close(ratio[[0, 3, 5]], ratio[0, 0].expand(3, 8))
    assert torch.equal(scaled(z, weights, keep_mean=False), z * weights)
    torch.testing.assert_close(scaled(z, torch.ones_like(weights)), z)


def test_comfy_moves_tokens_away_from_the_empty_prompt(features):
    z, weights, empty = features
    out = from_empty(z, weights, empty)
    assert torch.equal(out[:3], z[:3])
    torch.testing.assert_close(out[3], 1.5 * z[3] - 0.5 * empty[3])
    torch.testing.assert_close(out[4], empty[4])
    torch.testing.assert_close(out[5], 2 * empty[5] - z[5])


def test_compel_blends_with_features_that_lack_the_stretch(features):
    z, _, without = features
    torch.testing.assert_close(blended(z, [(0.5, without)]), (z + without) / 2)
    torch.testing.assert_close(blended(z, [(0.0, without)]), without, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(blended(z, [(1 - 1e-9, without)]), z)
    torch.testing.assert_close(blended(z, [(0.5, without), (0.5, z)]), (2 * z + without) / 3)


def test_weighting_in_half_precision_sums_in_float32():
    z = torch.full((LENGTH, 768), 300.0, dtype=torch.float16)  # their sum is far beyond float16
    assert torch.isfinite(scaled(z, torch.full((LENGTH, 1), 1.5))).all()
