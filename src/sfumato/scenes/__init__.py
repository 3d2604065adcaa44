"""A procedural world with exact truth: scenes, a batched renderer, captions, splits."""

from sfumato.scenes.captions import ObjectClaim, RelationClaim, Statement, describe, holds, phrase
from sfumato.scenes.graph import COLORS, MATERIALS, RELATIONS, SHAPES, SIZES, Object, Scene, scene_hash
from sfumato.scenes.labels import cell_labels
from sfumato.scenes.render import Render, render
from sfumato.scenes.sample import sample_scene
from sfumato.scenes.splits import SPLITS, split_of

__all__ = [
    "COLORS",
    "MATERIALS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Object",
    "ObjectClaim",
    "RelationClaim",
    "Render",
    "Scene",
    "Statement",
    "cell_labels",
    "describe",
    "holds",
    "phrase",
    "render",
    "sample_scene",
    "scene_hash",
    "split_of",
]
