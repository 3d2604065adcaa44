"""All regions of a picture that may not survive, named: each place once, by the most telling name."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.regions.faces import faces
from sfumato.fidelity.regions.region import Region
from sfumato.fidelity.regions.shapes import marks, small_objects, text_lines, thin_lines
from sfumato.fidelity.regions.textures import fine_detail, patterns
from sfumato.fidelity.signal import opponent

MARGIN = 2  # pixels around a region that belong to it: its edges lie there


def find(picture: NDArray[np.floating]) -> list[Region]:
    """Regions of (H, W, 3) in [0, 1], from top to bottom; none overlaps another of its kind by half."""
    height, width = picture.shape[:2]
    planes = opponent(picture)
    layers = marks(planes)
    found = patterns(planes)
    found += faces(picture)
    found += text_lines(layers, found)
    found += thin_lines(layers, found)
    found += small_objects(layers, found, planes)
    found += fine_detail(planes, found)
    grown = [region.grown(MARGIN, width, height) for region in found]
    return sorted(grown, key=lambda region: (region.box[1], region.box[0]))
