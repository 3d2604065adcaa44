"""Faces, by the detector that OpenCV 4 brings; other versions bring none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.fidelity.regions.region import Region

CASCADE = "haarcascade_frontalface_default.xml"
MISSING = (
    "faces are not looked for: no detector is installed; `pip install 'opencv-python-headless<5'` brings one"
)


def cascade() -> str | None:
    """The file of the detector, where OpenCV has it and can read it."""
    if importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    file = Path(folder) / CASCADE
    return str(file) if hasattr(cv2, "CascadeClassifier") and file.is_file() else None


def faces(picture: NDArray[np.floating]) -> list[Region]:
    """Upright faces from the front, 20 pixels and more, in (H, W, 3) of [0, 1]; none where there is no detector."""
    file = cascade()
    if file is None:
        return []
    import cv2

    grey = (np.clip(picture, 0, 1).mean(-1) * 255).astype(np.uint8)
    detector = getattr(cv2, "CascadeClassifier")(file)  # noqa: B009  (OpenCV 5 has none)
    found = detector.detectMultiScale(grey, 1.1, 6, minSize=(20, 20))
    return [
        Region("face", (int(x), int(y), int(x + w), int(y + h)), float(max(w, h)), weight=float(w * h))
        for x, y, w, h in found
    ]
