"""A1111's prompts that change over the steps, and prompts joined by AND.

The schedules are those that AUTOMATIC1111/stable-diffusion-webui documents (modules/prompt_parser.py and its wiki).
"""

from __future__ import annotations

import time

import pytest

from sfumato.errors import InputError
from sfumato.text.editing import schedule, together


@pytest.mark.parametrize(
    ("prompt", "stages"),
    [
        ("test", [(10, "test")]),
        ("", [(10, "")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3 ]", [(3, "a "), (10, "a b")]),
        ("a [b::3] c", [(3, "a b c"), (10, "a  c")]),
        ("[cat:dog:0.5]", [(5, "cat"), (10, "dog")]),
        ("[cat:dog:.25]", [(2, "cat"), (10, "dog")]),
        ("[cat:dog:10]", [(10, "cat")]),
        ("[cat:dog:12]", [(10, "cat")]),
        ("[cat:dog:0]", [(10, "dog")]),
        ("[cat:dog:-1]", [(10, "dog")]),
        ("[cat:dog:1]", [(1, "cat"), (10, "dog")]),
        ("[cat:dog:1.0]", [(10, "cat")]),
        ("[::3]", [(10, "")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("([cat:dog:4]:1.2)", [(4, "(cat:1.2)"), (10, "(dog:1.2)")]),
        ("[[cat|dog]::2]", [(1, "cat"), (2, "dog"), (10, "")]),
    ],
)
def test_an_edit_happens_after_its_step(prompt, stages):
    assert list(schedule(prompt, 10)) == stages


def test_several_edits_as_the_wiki_has_them():
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[ in background:0.25] [shoddy:masterful:0.5]"
    )
    assert list(schedule(prompt, 100)) == [
        (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
        (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
        (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
        (75, "fantasy landscape with a lake and an oak in background masterful"),
        (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
    ]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("[cow|horse] in a field", ["cow in a field", "horse in a field"]),
        ("[a|(b:1.1)]", ["a", "(b:1.1)"]),
        ("[fe|]male", ["female", "male"]),
        ("[fe|||]male", ["female", "male", "male", "male"]),
        ("[a|b|[c|d]]", ["a", "b", "c", "a", "b", "d"]),
        ("[[b]|c]", ["[b]", "c"]),
    ],
)
def test_parts_take_turns_at_every_step(prompt, texts):
    stages = schedule(prompt, 12)
    drawn = [next(text for end, text in stages if step <= end) for step in range(1, 13)]
    assert drawn == (texts * 12)[:12]


@pytest.mark.parametrize(
    "prompt",
    [
        "a [b] (c:1.2) [d",
        "[a:b]",  # emphasis, with a colon in it
        "[a:b:c]",
        "[a:b:c:3]",
        "[::]",
        "[a:b:1e1]",
        r"\[a:b:3\]",
        r"[a\|b]",
        "a] b) [c (d:e",
        "http://x",
        "[a|b:c]",
    ],
)
def test_other_brackets_stay_as_they_are(prompt):
    assert list(schedule(prompt, 10)) == [(10, prompt)]


def test_brackets_without_a_partner_spoil_nothing():
    assert list(schedule("((a][:b:c [d:3]", 10)) == [(3, "((a][:b:c "), (10, "((a][:b:c d")]
    assert list(schedule("[a (b:c:3]", 10)) == [(3, "a (b"), (10, "c")]
    assert list(schedule("(x [a:b:3])", 10)) == [(3, "(x a)"), (10, "(x b)")]
    assert list(schedule("[x ([a:b:3]", 10)) == [(3, "[x (a"), (10, "[x (b")]
    assert list(schedule(r"[a\]b:c:3]", 10)) == [(3, r"a\]b"), (10, "c")]


def test_what_is_nested_deep_is_read():
    prompt = "[" * 60 + "a" + ":3]" * 60
    assert list(schedule(prompt, 10)) == [(3, ""), (10, "a")]


def test_nesting_and_numbers_have_a_limit():
    with pytest.raises(InputError, match="more than 100 edits"):
        schedule("[" * 5000 + "a" + ":3]" * 5000, 10)
    assert list(schedule(f"[a:b:{'9' * 5000}]", 10)) == [(10, "a")]
    assert list(schedule(f"[a:b:-{'9' * 5000}.5]", 10)) == [(10, "b")]


@pytest.mark.parametrize("prompt", ["(" * 16_000 + "]" * 16_000, "[" * 32_000, "[(" * 16_000, "[|]" * 10_000])
def test_hostile_prompts_take_no_time(prompt):
    began = time.perf_counter()
    assert schedule(prompt, 20)[-1][0] == 20
    assert time.perf_counter() - began < 5


def test_a_second_pass_counts_on():
    """As A1111's pass over the enlarged picture: numbers go on from the first's, shares from 1 to 2."""
    assert list(schedule("a [b:.5] c", 10, done=10)) == [(10, "a b c")]
    assert list(schedule("a [b:1.5] c", 10, done=10)) == [(5, "a  c"), (10, "a b c")]
    assert list(schedule("a [b:12] c", 10, done=10)) == [(2, "a  c"), (10, "a b c")]
    assert list(schedule("a [b:12] c", 10)) == [(10, "a  c")]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat :1.5", [("a cat :1.5", 1.0)]),  # nothing to weigh it against
        ("a cat AND a dog", [("a cat ", 1.0), (" a dog", 1.0)]),
        (
            "a cat :1.2 AND a dog AND a penguin :-0.5",
            [("a cat", 1.2), (" a dog ", 1.0), (" a penguin", -0.5)],
        ),
        ("SAND AND BANDS", [("SAND ", 1.0), (" BANDS", 1.0)]),
        ("a\nb :2 AND c", [("a\nb", 2.0), (" c", 1.0)]),
        ("a AND", [("a ", 1.0), ("", 1.0)]),
    ],
)
def test_and_joins_prompts_with_weights(prompt, parts):
    assert list(together(prompt)) == parts


def test_a_weight_without_measure_is_refused():
    with pytest.raises(InputError, match="joined by AND is 1000"):
        together("a :1000 AND b")
