"""What brackets, signs and BREAK mean under each rule, and that any text is a prompt."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.text.syntax import RULES, Piece, parse


def pieces(prompt: str, rule: str) -> list[tuple[str, float]]:
    """Of a prompt of one section, with weights rounded to what a person would write."""
    (section,) = parse(prompt, rule)
    return [(piece.text, round(piece.weight, 6)) for piece in section]


def letters(prompt: str, rule: str) -> list[tuple[str, float]]:
    """Every character that is not a space, with its weight."""
    return [
        (c, piece.weight)
        for section in parse(prompt, rule)
        for piece in section
        for c in piece.text
        if c != " "
    ]


# --- a1111 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("(a:1.3), [b]", [("a", 1.3), (", ", 1), ("b", 0.909091)]),
        ("((a)) [[b]] ([c])", [("a", 1.21), (" ", 1), ("b", 0.826446), (" c", 1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:.5)(b:+2)(c:-1.)(d:0)", [("a", 0.5), ("b", 2), ("c", -1), ("d", 0)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        # from the documentation of the original
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # what does not balance
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b", [("a ", 1), ("b", 0.909091)]),
        ("a) b] :1.2) c", [("a) b] :1.2) c", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)]),
        ("(a))", [("a", 1.1), (")", 1)]),
        # numbers that are none
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.3]", [("a:1.3", 0.909091)]),
        # escapes
        (r"\(literal\] \[x\) a\\b", [(r"(literal] [x) a\b", 1)]),
        (r"(\(a\):1.2)", [("(a)", 1.2)]),
        (r"a\b\c", [("abc", 1)]),
        ("\\", []),
    ],
)
def test_a1111(prompt, expected):
    assert pieces(prompt, "a1111") == [(text, pytest.approx(weight)) for text, weight in expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a,\n BREAK \n(b BREAK c:1.2) d", [["a,"], ["b"], ["c", " d"]]),
        ("BREAK a BREAK BREAK b BREAK", [[], ["a"], [], ["b"], []]),
        ("aBREAK BREAKb break _BREAK", [["aBREAK BREAKb break _BREAK"]]),
        ("(BREAK)", [[], []]),
    ],
)
def test_break_starts_a_section_and_takes_the_space_around_it(prompt, expected):
    assert [[piece.text for piece in section] for section in parse(prompt)] == expected


def test_a_bracket_s_weight_goes_on_after_a_break():
    assert parse("(a BREAK b:1.2)") == ((Piece("a", 1.2),), (Piece("b", 1.2),))


# --- comfy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(foo)(bar)", [("foobar", 1.1)]),
        ("(foo:2.0)", [("foo", 2)]),
        ("((foo))", [("foo", 1.21)]),
        ("((foo):1.1) ((foo:1.1))", [("foo", 1.21), (" ", 1), ("foo", 1.1)]),
        ("((foo:1.0):0.0)", [("foo", 1)]),
        (
            "foo ((((lol (cat:666) attack:100)))) baz",
            [("foo ", 1), ("lol ", 100), ("cat", 666), (" attack", 100), (" baz", 1)],
        ),
        (
            "foo ((((lol (cat:666) attack):100))) baz",
            [("foo ", 1), ("lol ", 110), ("cat", 666), (" attack", 110), (" baz", 1)],
        ),
        ("(a:1e-1) (b: 2 )", [("a", 0.1), (" ", 1), ("b", 2)]),
        ("(:1.3)", [(":1.3", 1.1)]),
        ("[a] BREAK", [("[a] BREAK", 1)]),
        (r"\(a\) (\)b:2) \x", [("(a) ", 1), (")b", 2), (r" \x", 1)]),
        ("(a (b:2)", [("(a ", 1), ("b", 2)]),
        ("a:1.2) (b)", [("a:1.2) ", 1), ("b", 1.1)]),
        ("(a:nan) (b:inf)", [("a:nan", 1.1), (" ", 1), ("b:inf", 1.1)]),
    ],
)
def test_comfy(prompt, expected):
    assert pieces(prompt, "comfy") == [(text, pytest.approx(weight)) for text, weight in expected]


# --- compel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a tall++ man-", [("a ", 1), ("tall", 1.21), (" ", 1), ("man", 0.9)]),
        ("(a b)1.3 (c)++, (d)-", [("a b", 1.3), (" ", 1), ("c", 1.21), (", ", 1), ("d", 0.9)]),
        ("(e).5 (f)", [("e", 0.5), (" f", 1)]),
        ("((a)++ b-)2", [("a", 2.42), (" ", 2), ("b", 1.8)]),
        ("half-open, C++-like", [("half-open, C++-like", 1)]),
        ("semi-real--", [("semi-real", 0.81)]),
        ("(a) + b - -- c", [("a + b - -- c", 1)]),
        ("(a)3d (b)2", [("a3d ", 1), ("b", 2)]),
        (r"\(a\)++ C\+\+ \+", [("(a)", 1.21), (" C++ +", 1)]),
        ("(a b) c+)", [("a b ", 1), ("c", 1.1), (")", 1)]),
        ("((a)+", [("(", 1), ("a", 1.1)]),
        ("[a] BREAK (b:1.2)", [("[a] BREAK b:1.2", 1)]),
        ('say "hi"', [('say "hi"', 1)]),
    ],
)  # fmt: skip
def test_compel(prompt, expected):
    assert pieces(prompt, "compel") == [(text, pytest.approx(weight)) for text, weight in expected]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ('("a", "b").blend(1, 0.5)', r"\.blend\(\)"),
        ('("a", "b").and()', r"\.and\(\)"),
        ("a cat.swap(dog) here", r"\.swap\(\)"),
        ("(a b).attend(1.2)", r"\.attend\(\).*\(phrase\)1\.3"),
        ("a withLora(style, 0.5)", r"withLora\(\)"),
    ],
)
def test_compel_s_methods_are_refused_by_name(prompt, name):
    with pytest.raises(InputError, match=name) as caught:
        parse(prompt, "compel")
    assert caught.value.argument == "prompt"
    assert parse(prompt, "none") == ((Piece(prompt),),)


# --- trees of brackets, written and read back --------------------------------------------------------------------

WORDS = st.text("abcé ,.!-", min_size=1, max_size=6)
NUMBERS = st.integers(-30, 30).map(lambda n: n / 10)


def trees(leaf, kinds):
    """Nested lists: a leaf, or (kind, number, children)."""
    branch = lambda inner: st.tuples(kinds, NUMBERS, st.lists(inner, min_size=1, max_size=3))  # noqa: E731
    return st.lists(st.recursive(leaf, branch, max_leaves=8), max_size=4)


def same(found, expected):
    assert [c for c, _ in found] == [c for c, _ in expected]
    assert [w for _, w in found] == pytest.approx([w for _, w in expected])


@given(trees(WORDS | st.sampled_from("()[]\\"), st.sampled_from(["(", "[", ":"])))
def test_a1111_reads_back_any_tree(tree):
    def write(nodes, weight):
        for node in nodes:
            if isinstance(node, str):
                yield ("\\" + node if node in "()[]\\" else node), [(c, weight) for c in node if c != " "]
                continue
            kind, number, children = node
            factor = {"(": 1.1, "[": 1 / 1.1, ":": number}[kind]
            yield "[" if kind == "[" else "(", []
            yield from write(children, weight * factor)
            yield {"(": ")", "[": "]", ":": f":{number})"}[kind], []

    written = list(write(tree, 1.0))
    same(letters("".join(text for text, _ in written), "a1111"), [c for _, chars in written for c in chars])


@given(trees(WORDS | st.sampled_from("()[]"), st.sampled_from(["(", ":"])))
def test_comfy_reads_back_any_tree(tree):
    def write(nodes, weight):
        for node in nodes:
            if isinstance(node, str):
                yield ("\\" + node if node in "()" else node), [(c, weight) for c in node if c != " "]
                continue
            kind, number, children = node
            yield "(", []
            yield from write(children, weight * 1.1 if kind == "(" else number)
            yield ")" if kind == "(" else f":{number})", []

    written = list(write(tree, 1.0))
    same(letters("".join(text for text, _ in written), "comfy"), [c for _, chars in written for c in chars])


@given(
    trees(st.from_regex(r"[abcé]([abcé-]*[abcé])?", fullmatch=True), st.sampled_from(["+", "-", "1.3", ""]))
)
def test_compel_reads_back_any_tree(tree):
    def write(nodes, weight):
        for node in nodes:
            if isinstance(node, str):
                signs = {0: "", 1: "++", 2: "-"}[len(node) % 3]
                factor = {0: 1.0, 1: 1.21, 2: 0.9}[len(node) % 3]
                yield f"{node}{signs} ", [(c, weight * factor) for c in node]
                continue
            kind, _, children = node
            yield "(", []
            yield from write(children, weight * {"+": 1.1, "-": 0.9, "1.3": 1.3, "": 1.0}[kind])
            yield f"){kind} ", []

    written = list(write(tree, 1.0))
    same(letters("".join(text for text, _ in written), "compel"), [c for _, chars in written for c in chars])


# --- any text ----------------------------------------------------------------------------------------------------

HARD = st.text(st.sampled_from("()[]\\:+-.1 aB\n\"',é👩\0") | st.characters(), max_size=60)


@given(HARD | st.lists(st.sampled_from(["(", ")", "[", "]", ":1.2)", "BREAK", " ", "a", "\\"])).map("".join))
def test_any_text_parses_and_nothing_is_made_up(prompt):
    for rule in RULES:
        if rule == "compel" and ("(" in prompt and "." in prompt):
            continue  # methods, which are refused
        sections = parse(prompt, rule)
        assert sections
        text = "".join(piece.text for section in sections for piece in section)
        rest = iter(prompt)
        assert all(c in rest for c in text), "pieces are what stands in the prompt, in its order"
        for section in sections:
            assert all(piece.text for piece in section)
            assert all(a.weight != b.weight for a, b in pairwise(section))


@given(st.text())
def test_without_a_rule_brackets_are_text(prompt):
    assert "".join(piece.text for section in parse(prompt, "none") for piece in section) == prompt
    assert len(parse(prompt, "none")) == 1


@given(st.text(st.characters(exclude_characters='()[]\\:+-"')))
def test_text_without_marks_means_itself_under_every_rule(prompt):
    if "BREAK" not in prompt:
        for rule in RULES:
            assert parse(prompt, rule) == parse(prompt, "none")


@pytest.mark.parametrize("rule", RULES)
def test_deep_nesting_needs_no_deep_stack(rule):
    (section,) = parse("(" * 16_000 + "a" + ")" * 16_000, rule)
    assert [piece.text for piece in section] == ["a"] or rule == "none"
    assert parse("(a" * 8_000, rule) and parse(")" * 32_000, rule) and parse("+" * 32_000, rule)
    assert rule in ("compel", "none") or math.isinf(section[0].weight)
    assert parse("a" + "+" * 32_000, rule)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match='"webui" are unknown; known are a1111, comfy, compel, none'
    ) as caught:
        parse("a", "webui")
    assert caught.value.argument == "prompt_rules"
