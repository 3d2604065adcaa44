"""What a detector says about a picture, and how two detections are related.

Two detectors share this vocabulary and nothing else: `detect_network` (a small trained network) and `detect_analytic`
(colour, silhouette and geometry, nothing learned by gradient). A score that both give is hardly an artefact of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sfumato.errors import InputError
from sfumato.scenes.graph import DEPTH_MARGIN, SIDE_MARGIN

SIDE = 128  # pixels; pictures of other sizes are resized to this before they are read
READ_MARGIN = 0.5  # share of the margin by which a relation is stated that a detection must show


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    x, y: centre of its visible part, 0..1 right and down. right, away: its place on the floor in world units
    along the viewer's axes, from a point that is the same for all objects of one picture. box: left, top,
    right, bottom, 0..1. confidence: 0..1.
    """

    shape: str
    color: str
    material: str
    size: str
    x: float
    y: float
    right: float
    away: float
    box: tuple[float, float, float, float]
    confidence: float


class Detector(Protocol):
    """Anything that reads pictures (B, 3, H, W) in [-1, 1]; one list of detections for each, most confident first."""

    name: str

    def detect(self, pixels: Tensor) -> list[list[Detection]]: ...


def relation_holds(relation: str, subject: Detection, other: Detection) -> bool:
    """Whether the subject stands in the relation to the other, by the scenes' own definition on the floor.

    Scenes state a relation only beyond a margin; half of it is asked here, so that an error in reading a
    position decides neither way.
    """
    right, away = subject.right - other.right, subject.away - other.away
    gaps = {"left of": -right, "right of": right, "in front of": -away, "behind": away}
    if relation not in gaps:
        raise InputError(
            f"relation {relation!r} is unknown; use one of {', '.join(gaps)}", argument="relation"
        )
    margin = SIDE_MARGIN if relation in ("left of", "right of") else DEPTH_MARGIN
    return gaps[relation] >= READ_MARGIN * margin


def check_pixels(pixels: Tensor) -> Tensor:
    """Pictures as float32 (B, 3, H, W) in [-1, 1]; a frame axis of length one is dropped. Raises `InputError`
    for other shapes."""
    if pixels.ndim == 5 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InputError(f"pixels must be (B, 3, H, W), not {tuple(pixels.shape)}", argument="pixels")
    return pixels.detach().float().clamp(-1, 1)
