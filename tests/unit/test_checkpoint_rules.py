"""Key rules: invertible tensor for tensor, lazy, and strict about every name."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.checkpoint.rules import (
    Concat,
    Drop,
    KeyMap,
    Rename,
    Split,
    Squeeze,
    Transpose,
    Unsqueeze,
    expand,
    info,
    shapes,
    within,
)
from sfumato.errors import CheckpointError


def same(a: Mapping, b: Mapping) -> bool:
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def random_tensor(draw, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def tables(draw):
    """A map of rules of every kind in some order, and tensors of theirs that it fits."""
    rules, tensors = [], {}
    for n in range(draw(st.integers(1, 8))):
        a, b, parts = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
        several = tuple(f"many{n}.{i}" for i in range(parts))
        rule = draw(
            st.sampled_from(
                [
                    Rename(f"t{n}", f"o{n}"),
                    Transpose(f"t{n}", f"o{n}"),
                    Squeeze(f"t{n}", f"o{n}"),
                    Unsqueeze(f"t{n}", f"o{n}"),
                    Split(f"t{n}", several),
                    Concat(several, f"o{n}"),
                ]
            )
        )
        if isinstance(rule, Concat):
            dtype = random_tensor(draw, 1).dtype
            tensors |= {name: random_tensor(draw, a, b).to(dtype) for name in several}
        else:
            shape = {Squeeze: (a, b, 1, 1), Split: (a * parts, b)}.get(type(rule), (a, b))
            tensors[f"t{n}"] = random_tensor(draw, *shape)
        rules.append(rule)
    return KeyMap(tuple(rules)), tensors


@settings(deadline=None)
@given(tables())
def test_there_and_back_is_the_same_tensor_for_tensor(table):
    rules, theirs = table
    ours = rules.to_ours(theirs)
    assert same(rules.to_theirs(ours), theirs)
    assert same(rules.inverse.to_theirs(rules.inverse.to_ours(dict(ours))), dict(ours))
    assert all(info(ours, name) == (ours[name].dtype, tuple(ours[name].shape)) for name in ours)


def test_each_rule_does_what_it_says():
    x = torch.arange(6.0).view(3, 2)
    fits = KeyMap(
        (
            Rename("a", "renamed"),
            Transpose("b", "turned"),
            Squeeze("c", "linear"),
            Split("d", ("q", "k", "v")),
            Concat(("e", "f"), "joined"),
        )
    )
    theirs = {"a": x, "b": x, "c": x[:, :, None, None], "d": x, "e": x, "f": x + 6}
    ours = fits.to_ours(theirs)
    assert list(ours) == ["renamed", "turned", "linear", "q", "k", "v", "joined"]
    assert ours["renamed"] is x
    assert ours["turned"].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert ours["linear"].tolist() == x.tolist()
    assert [ours[name].tolist() for name in "qkv"] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert ours["joined"].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_linear_layer_passes_for_the_convolution_it_is():
    x = torch.arange(6.0).view(3, 2)
    fits = KeyMap((Squeeze("c", "linear"),))
    assert torch.equal(fits.to_ours({"c": x})["linear"], x)
    assert fits.to_theirs({"linear": x})["c"].shape == (3, 2, 1, 1)


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (Transpose("t", "o"), (2, 2, 2)),
        (Squeeze("t", "o"), (2, 2, 3, 3)),
        (Squeeze("t", "o"), (2,)),
        (Unsqueeze("t", "o"), (2,)),
        (Split("t", ("a", "b", "o")), (4, 2)),
        (Split("t", ("a", "b", "o")), ()),
    ],
)
def test_a_shape_that_a_rule_cannot_take_is_named(rule, shape):
    ours = KeyMap((rule,)).to_ours({"t": torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"tensor 't' cannot become 'o'"):
        ours["o"]
    with pytest.raises(CheckpointError, match=r"tensor 't' cannot become 'o'"):
        ours.info("o")


def test_parts_that_differ_are_not_joined():
    ours = KeyMap((Concat(("a", "b"), "o"),)).to_ours({"a": torch.zeros(2, 2), "b": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match="equal shapes"):
        ours["o"]


def test_nothing_is_left_out_without_a_rule():
    fits = KeyMap(
        (Rename("a", "x"), Rename("b", "y")), (Drop("ema.*", "averages"), Drop("step", "a counter"))
    )
    one = torch.zeros(1)
    whole = fits.to_ours({"a": one, "b": one, "ema.a.b": one, "step": one})
    assert whole.report.dropped == {"ema.a.b": "averages", "step": "a counter"}
    assert whole.report.matched == ("a", "b")
    with pytest.raises(CheckpointError, match=r"here\.st.*1 missing: b; 2 unexpected: c, stepping"):
        fits.to_ours({"a": one, "c": one, "stepping": one}, source="here.st")
    report = fits.match(["a", "ema", "xema.y"])
    assert (report.missing, report.unexpected, report.complete) == (("b",), ("ema", "xema.y"), False)


def test_an_error_shows_the_first_names_and_counts_the_rest():
    fits = KeyMap(expand([Rename("a{i}", "b{i}")], i=range(30)))
    with pytest.raises(CheckpointError, match=r"30 missing: a0, a1, .*, a9 and 20 more$"):
        fits.to_ours({})


def test_other_spellings_are_read_and_never_written():
    fits = KeyMap((Split("qkv", ("q", "k")),)).also(Rename("old.q", "q"), Rename("old.k", "k"))
    x = torch.arange(4.0)
    for theirs in ({"qkv": x}, {"old.q": x[:2], "old.k": x[2:]}):
        ours = fits.to_ours(theirs)
        assert ours["q"].tolist() == [0, 1] and ours["k"].tolist() == [2, 3]
        assert same(fits.to_theirs(ours), {"qkv": x})
    with pytest.raises(CheckpointError, match=r"1 given twice: q$"):
        fits.to_ours({"qkv": x, "old.q": x})
    with pytest.raises(CheckpointError, match=r"1 missing: qkv$"):
        fits.to_ours({"old.q": x})


def test_writing_needs_every_name_of_ours():
    fits = KeyMap((Split("qkv", ("q", "k")), Rename("a", "b")))
    with pytest.raises(CheckpointError, match=r"1 missing: k; 1 unexpected: c"):
        fits.to_theirs({"q": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)})


class Watched(Mapping):
    """A file's header: it knows types and shapes, and notes what is read."""

    def __init__(self, tensors):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __contains__(self, name):
        return name in self.tensors

    def info(self, name):
        return self.tensors[name].dtype, self.tensors[name].shape


def test_a_tensor_is_read_when_it_is_asked_for():
    file = Watched({"p.a": torch.zeros(6, 2), "p.b": torch.zeros(2, 5), "p.c": torch.zeros(1)})
    fits = KeyMap((Split("a", ("q", "k", "v")), Transpose("b", "t"), Rename("c", "c"))).within("p.", "net.")
    ours = fits.to_ours(file)
    back = fits.to_theirs(ours)
    part = ours.under("net.")
    assert list(part) == ["q", "k", "v", "t", "c"] and len(part) == 5 and "q" in part and "net.q" not in part
    assert shapes(part) == {"q": (2, 2), "k": (2, 2), "v": (2, 2), "t": (5, 2), "c": (1,)}
    assert shapes(back) == {"p.a": (6, 2), "p.b": (2, 5), "p.c": (1,)}
    assert file.read == []
    part["t"]
    assert file.read == ["p.b"]


def test_templates_are_expanded_into_a_finite_table():
    block = [Rename("n.{p}", "norm.{p}"), Split("qkv.weight", ("q.weight", "k.weight"))]
    rules = expand(within("blocks.{i}.", "layers.{i}.", block), i=range(2), p=("weight", "bias"))
    assert len(rules) == 6
    assert rules[-1] == Rename("blocks.1.n.bias", "layers.1.norm.bias")
    assert Split("blocks.0.qkv.weight", ("layers.0.q.weight", "layers.0.k.weight")) in rules
    with pytest.raises(ValueError, match="was not expanded"):
        KeyMap(tuple(block))
    with pytest.raises(ValueError, match="two rules read 'a'"):
        KeyMap((Rename("a", "b"), Rename("a", "c")))


def test_maps_of_parts_make_the_map_of_a_file():
    a = KeyMap((Rename("w", "weight"),), (Drop("loss.*", "loss"),))
    both = a.within("first.", "vae.") | a.within("second.", "unet.")
    assert both.theirs == ("first.w", "second.w") and both.ours == ("vae.weight", "unet.weight")
    assert both.match(["first.w", "second.w", "first.loss.x"]).complete
    assert both.match(["first.w", "second.w", "loss.x"]).unexpected == ("loss.x",)
