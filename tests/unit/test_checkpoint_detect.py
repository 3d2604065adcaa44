"""What a file is: exactly one kind, a refusal by name, or the nearest kind and what differs."""

from __future__ import annotations

import pytest

from sfumato.checkpoint.detect import Signature, identify
from sfumato.errors import CheckpointError

CAT = Signature(
    "cat", "checkpoint", "original", {"head.weight": (4, 8), "tail.weight": (2, None)}, ("wings.*",)
)
BIG = Signature("cat-big", "checkpoint", "original", {"head.weight": (8, 8), "tail.weight": (2, None)})
BIRD = Signature("bird", "unet", "diffusers", {"head.weight": (4, 8), "wings.*.weight": None})
EEL = Signature("", "", "", {"*.fin": None}, refusal="an eel, not supported yet")
ALL = (CAT, BIG, BIRD, EEL)


def told(shapes, signatures=ALL) -> str:
    with pytest.raises(CheckpointError) as caught:
        identify(shapes, signatures, source="f.safetensors")
    return str(caught.value)


def test_exactly_one_kind_bears_the_marks():
    assert identify({"head.weight": (4, 8), "tail.weight": (2, 99), "more": (1,)}, ALL) is CAT
    assert identify({"head.weight": (8, 8), "tail.weight": (2, 1)}, ALL) is BIG
    assert identify({"head.weight": (4, 8), "wings.left.weight": ()}, ALL) is BIRD
    # wings make it no cat, though it has all that a cat must have
    assert identify({"head.weight": (4, 8), "tail.weight": (2, 1), "wings.left.weight": ()}, ALL) is BIRD


def test_what_cannot_be_used_is_refused_by_name_before_what_it_resembles():
    cat_with_fin = {"head.weight": (4, 8), "tail.weight": (2, 1), "back.fin": ()}
    assert told(cat_with_fin) == "f.safetensors cannot be used: this is an eel, not supported yet"


def test_marks_of_two_kinds_are_an_error():
    twin = Signature("twin", "checkpoint", "original", {"head.weight": (4, 8)})
    said = told({"head.weight": (4, 8), "tail.weight": (2, 1)}, (CAT, twin))
    assert said == (
        "f.safetensors bears the marks of cat (original names) and twin (original names); exactly one is right"
    )


def test_the_nearest_kind_and_what_differs_are_told():
    said = told({"head.weight": (4, 9), "tail.weight": (2, 1)}, (CAT, BIRD))
    assert said.endswith(
        "the nearest is cat (original names), but head.weight is (4, 9) where (4, 8) is right"
    )
    assert told({"tail.weight": (3, 3, 3)}).endswith(
        "the nearest is cat (original names), but head.weight is missing; "
        "tail.weight is (3, 3, 3) where (2, any) is right"
    )
    assert "none of its 1 tensors is one we look for; the first are unknown" in told({"unknown": (1,)})
    winged = {"head.weight": (4, 8), "tail.weight": (2, 1), "wings.left": ()}
    assert told(winged, (CAT,)).endswith("but wings.left does not belong there")


def test_names_of_a_hostile_file_are_shown_harmlessly():
    said = told({"\x1b[2J\n" + "x" * 10_000: (1,), "‮": (1,)})
    assert "\x1b" not in said and "\n" not in said and "‮" not in said and len(said) < 600
