"""Pictures for ControlNets: brought to the size that is drawn, and edges made of plain ones.

Edges are OpenCV's work, imported when they are asked for. Depth and poses are made by networks that a model was given
(`tasks/annotators.py`), or are pictures that others made, as segments are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from sfumato import checks
from sfumato.errors import InputError, SfumatoError
from sfumato.pictures import BLACK, flatten
from sfumato.tasks.canvas import Box, Size, by, fitted, nearest_size
from sfumato.types import FITS, Control, Request

LOW, HIGH = (
    100,
    200,
)  # of brightness steps, between which Canny's edges must hang on a stronger one; A1111's defaults
SOFT_BLUR = 1.5  # pixels
NEAR = 0.25  # by which sides may differ from those of equal area, for a size of the exact shape
SOFT_TOP = 99.0  # percentile of the gradients that becomes white


def canny(picture: Image.Image) -> Image.Image:
    """White lines on black where brightness changes (Canny 1986), as the ControlNets of that name were trained with."""
    edges = _opencv().Canny(np.asarray(picture.convert("RGB")), LOW, HIGH)
    return Image.fromarray(edges).convert("RGB")


def soft_edges(picture: Image.Image) -> Image.Image:
    """The strength of the gradient in grey: edges with their weight, as HED draws them, though by no network."""
    cv = _opencv()
    grey = np.asarray(picture.convert("L")).astype(np.float32)
    smooth = cv.GaussianBlur(grey, (0, 0), SOFT_BLUR)
    across, down = cv.Scharr(smooth, cv.CV_32F, 1, 0), cv.Scharr(smooth, cv.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    top = max(float(np.percentile(strength, SOFT_TOP)), 1e-6)
    return Image.fromarray((np.clip(strength / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")


Prepare = Callable[[Image.Image], Image.Image]
PREPARE: dict[str, Prepare] = {"canny": canny, "softedge": soft_edges}
NO_NETWORKS: Mapping[str, Prepare] = {}


def prepare_named(name: str, annotators: Mapping[str, Prepare] = NO_NETWORKS) -> Prepare:
    """What makes control pictures by that name: of `annotators`, a model's own, or of `PREPARE`.

    An unknown one is an `InputError` that lists them.
    """
    found = annotators.get(name) or PREPARE.get(name)
    if found is None:
        raise InputError(
            f"prepare must be one of {', '.join((*PREPARE, *annotators))}, or left out for a picture that is ready, "
            f"not {checks.shown(name)}; a network that makes {name} is opened with the model, by "
            f"`annotators` {name}=FOLDER",
            argument="controls",
        )
    return found


def hint(
    control: Control,
    size: Size,
    fit: str | None,
    multiple: int,
    annotators: Mapping[str, Prepare] = NO_NETWORKS,
) -> Image.Image:
    """What the ControlNet is shown: RGB of the `size` that is drawn.

    A picture of that shape, to within a `multiple` of pixels, is scaled by Lanczos, as diffusers does; one of another
    shape is brought there by `fit`, or refused with the size that would be right.
    """
    picture = flatten(control.image, f"control {control.name}", BLACK)
    if picture.size != size:
        picture = fitted(picture, size, _how(control.name, picture.size, size, fit, multiple))
    return picture if control.prepare is None else prepare_named(control.prepare, annotators)(picture)


def check_hints(
    request: Request,
    multiple: int,
    original: Size | None,
    annotators: Mapping[str, Prepare] = NO_NETWORKS,
) -> None:
    """`InputError` for control pictures that `hint` would refuse. original: of a picture that is drawn in part."""
    assert request.size is not None
    for control in request.controls or ():
        if control.prepare is not None:
            prepare_named(control.prepare, annotators)
            if control.prepare not in annotators:
                _opencv()
        size = control.image.size
        _how(control.name, size, original or request.size, request.fit, multiple)


def cropped(request: Request, box: Box, original: Size, multiple: int) -> Request:
    """The request with the part of its control pictures that is drawn: a box of the original picture."""
    if not request.controls:
        return request
    plain = (replace(control, prepare=None) for control in request.controls)
    parts = [hint(control, original, request.fit, multiple).crop(box) for control in plain]
    controls = [replace(c, image=part) for c, part in zip(request.controls, parts, strict=True)]
    return replace(request, controls=tuple(controls), fit="stretch")


def _how(name: str, given: Size, size: Size, fit: str | None, multiple: int) -> str:
    """How a picture of one size comes to another: stretched where the shapes agree."""
    wide, high = size[1] * given[0] / given[1], size[0] * given[1] / given[0]
    if abs(wide - size[0]) < multiple or abs(high - size[1]) < multiple:
        return "stretch"
    if fit is not None:
        return fit
    right = _alike(given, size, multiple)
    raise InputError(
        f"control {name} is {by(given)}, of another shape than the {by(size)} that is drawn; give `size` "
        f"{by(right)}, or `fit` as {FITS[0]}, {FITS[1]} or {FITS[2]}",
        argument="controls",
    )


def _alike(given: Size, size: Size, multiple: int) -> Size:
    """The legal size of about the area of `size` and the shape of `given`: exactly, where one is near."""
    scale = (size[0] * size[1] / (given[0] * given[1])) ** 0.5
    step = multiple / math.gcd(*given)  # between legal sizes of that very shape, in times `given`
    exact = max(round(scale / step), 1) * step
    if abs(exact / scale - 1) <= NEAR:
        return round(given[0] * exact), round(given[1] * exact)
    return nearest_size((round(given[0] * scale), round(given[1] * scale)), multiple)


def _opencv() -> Any:
    try:
        import cv2
    except ImportError:
        raise SfumatoError(
            "edges of a picture need the package opencv-python-headless: pip install 'sfumato[control]'; or give a "
            "picture of edges that is ready"
        ) from None
    return cv2
