"""The words of captions, with how often each is said beside its synonyms."""

from __future__ import annotations

NOUNS = {
    "sphere": (("sphere", 6), ("ball", 4)),
    "cube": (("cube", 7), ("block", 2), ("box", 1)),
    "cylinder": (("cylinder", 9), ("can", 1)),
    "cone": (("cone", 1),),
    "torus": (("torus", 5), ("ring", 3), ("donut", 2)),
    "capsule": (("capsule", 7), ("pill", 3)),
    None: (("object", 6), ("thing", 4)),
}
PLURALS = {"torus": "toruses", "box": "boxes"}
COLOR_WORDS: dict[str | None, tuple[tuple[str, int], ...]] = {
    "gray": (("gray", 7), ("grey", 3)),
    "purple": (("purple", 8), ("violet", 2)),
}
MATERIAL_WORDS = {
    "metal": (("metal", 6), ("shiny", 2), ("metallic", 2)),
    "rubber": (("rubber", 6), ("matte", 4)),
}
SIZE_WORDS = {"small": (("small", 7), ("little", 1), ("tiny", 2)), "large": (("large", 6), ("big", 4))}
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
RELATION_WORDS = {
    "left of": (("left of", 4), ("to the left of", 6)),
    "right of": (("right of", 4), ("to the right of", 6)),
    "in front of": (("in front of", 1),),
    "behind": (("behind", 1),),
}
POSSESSIVE = {
    "left of": "to its left",
    "right of": "to its right",
    "in front of": "in front of it",
    "behind": "behind it",
}
VERBS: dict[str | None, tuple[str, str]] = {  # in a sentence, and beside a noun
    "rolls": ("rolls", "rolling"),
    "slides": ("slides", "sliding"),
    "bounces": ("bounces", "bouncing"),
    "circles": ("circles", "circling"),
    None: ("moves", "moving"),
}
MOTION_WORDS = {  # after the verb
    "left": (("left", 6), ("to the left", 4)),
    "right": (("right", 6), ("to the right", 4)),
    "toward": (("closer", 7), ("toward the viewer", 3)),
    "away": (("away", 1),),
    "around": (("in a circle", 1),),
    "up": (("up and down", 1),),
}
PASSING = {"past": "past", "around": "around"}  # of what moves, by what rests
STANDING = (("stands still", 7), ("rests", 3))
CAMERA_WORDS = {
    "left": (("moves to the left", 6), ("turns to the left", 4)),
    "right": (("moves to the right", 6), ("turns to the right", 4)),
    "closer": (("moves closer", 6), ("comes nearer", 4)),
    "back": (("moves back", 6), ("backs away", 4)),
}
SPEED_WORDS = {"slow": (("slowly", 1),), "fast": (("quickly", 5), ("fast", 5))}
ENDINGS = (("and other things", 3), ("and more", 2), ("among other things", 2))
