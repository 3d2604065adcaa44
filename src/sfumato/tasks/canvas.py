"""The picture a request begins with, in pixels: brought to size, extended, cropped to its mask, and put back together.

`settle` decides what a request leaves open and refuses what does not fit together. `canvas` makes what the model draws
on, and `Canvas.finish` the picture that is returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from sfumato.data.buckets import fit as cover
from sfumato.errors import InputError
from sfumato.pictures import binary, flatten
from sfumato.types import Clip, Inpaint, Request

STRENGTH = 0.75  # of image-to-image, when the request leaves it open
Size = tuple[int, int]  # (width, height) in pixels
Box = tuple[int, int, int, int]  # (left, top, right, bottom) in pixels


@dataclass(frozen=True)
class Canvas:
    """What a model draws on, and how its answer becomes the picture.

    picture: RGB, of the size that is drawn. mask: mode L of 0 and 255, of the same size, white where to paint; None
    to paint everywhere. original: RGB, the picture to paste into; `box`: the part of it that `picture` shows.
    weight: (H, W) float32 of the box: the drawn part's share of each pixel, exactly 0 outside the mask. Without it the
    drawn part replaces the box.
    """

    picture: Image.Image
    mask: Image.Image | None
    original: Image.Image
    box: Box
    weight: np.ndarray | None

    def finish(self, drawn: Image.Image) -> Image.Image:
        """The returned picture, of the original's size, from a drawn one of the size of `picture`."""
        if self.weight is None and self.box == (0, 0, *self.original.size):
            return drawn
        left, top, right, bottom = self.box
        if drawn.size != (right - left, bottom - top):
            drawn = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        if self.weight is not None:
            drawn = mixed(self.original.crop(self.box), drawn, self.weight)
        whole = self.original.copy()
        whole.paste(drawn, (left, top))
        return whole


def settle(request: Request, multiple: int, size: Size) -> Request:
    """The request with all that its picture decides: upright RGB, a mask of black and white, `size`, `strength`,
    `inpaint`. Doing it twice changes nothing.

    multiple: of pixels, that the sides drawn must be; size: the model's own. Raises `InputError` for sizes that do not
    agree, naming them, and for a mask without white.
    """
    if request.clip is not None:
        request = _settle_clip(request, request.clip)
    if request.image is None:
        return request
    image = flatten(request.image, "image")
    if request.moves:
        return _settle_first(request, image, size)
    mask = None if request.mask is None else binary(request.mask, "mask")
    paints = mask is not None or request.outpaint is not None
    inpaint = (request.inpaint or Inpaint()) if paints else None
    if mask is not None:
        if mask.size != image.size:
            raise InputError(
                f"mask is {by(mask.size)} and image {by(image.size)}; they must be of one size",
                argument="mask",
            )
        if mask.getextrema() == (0, 0):
            raise InputError(
                "mask is black everywhere, so nothing would be painted; white is what is painted",
                argument="mask",
            )
    if inpaint is not None and inpaint.padding is not None:
        wanted = request.size or size
    else:
        wanted = _wanted_size(request, image.size, multiple)
    strength = request.strength
    if strength is None:
        strength = 1.0 if paints else STRENGTH
    return replace(request, image=image, mask=mask, inpaint=inpaint, size=wanted, strength=strength)


def _settle_clip(request: Request, clip: Clip) -> Request:
    """What a clip to begin with leaves open: as many frames as it has, their rate, its first picture, the strength."""
    frames = len(clip.frames) if request.frames is None else request.frames
    if frames > len(clip.frames):
        raise InputError(
            f"frames asks for {frames}, and the clip to begin with has {len(clip.frames)}", argument="frames"
        )
    upright = tuple(flatten(frame, "clip") for frame in clip.frames[:frames])
    return replace(
        request,
        clip=Clip(upright, clip.fps),
        frames=frames,
        fps=clip.fps if request.fps is None else request.fps,
        image=upright[0] if request.image is None else request.image,
        strength=STRENGTH if request.strength is None else request.strength,
    )


def _settle_first(request: Request, image: Image.Image, size: Size) -> Request:
    """The same of a clip, whose first picture it is: brought to the clip's size rather than the reverse."""
    for name in ("strength", "mask", "outpaint", "inpaint"):
        if getattr(request, name) is not None and (name != "strength" or request.clip is None):
            what = "goes with a `clip` to begin with" if name == "strength" else "is for pictures"
            raise InputError(f"{name} {what}; a clip begins with its image as it is", argument=name)
    upright = (image.height > image.width) == (size[1] > size[0]) or image.height == image.width
    wanted = request.size or (size if upright else size[::-1])
    return replace(request, image=image, size=wanted, fit=request.fit or "cover")


def first_picture(request: Request) -> Image.Image:
    """The picture of a settled request for a clip, at its size."""
    assert request.image is not None
    return _at_size(request, request.image)


def beginning(request: Request) -> list[Image.Image]:
    """The frames that a settled request for a clip begins with, at its size."""
    assert request.clip is not None
    return [_at_size(request, frame) for frame in request.clip.frames]


def _at_size(request: Request, picture: Image.Image) -> Image.Image:
    assert request.size is not None and request.fit is not None
    return picture if picture.size == request.size else fitted(picture, request.size, request.fit)


def _wanted_size(request: Request, given: Size, multiple: int) -> Size:
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    area = (given[0] + left + right, given[1] + top + bottom)
    what = f"image is {by(given)}"
    if request.outpaint:
        what += f" and with outpaint {by(area)}"
    legal = nearest_size(area, multiple)
    if request.size is None:
        if area != legal and request.fit is None:
            raise InputError(
                f"{what}, not a multiple of {multiple} pixels; the nearest legal size is {by(legal)}: give "
                "`fit` as cover, contain or stretch to bring it there",
                argument="image",
            )
        wanted = legal
    else:
        wanted = request.size
        if area != wanted and request.fit is None:
            raise InputError(
                f"{what}, but `size` asks for {by(wanted)}; give `fit` as cover, contain or stretch, or "
                "leave out `size`",
                argument="size",
            )
    if wanted[0] <= left + right or wanted[1] <= top + bottom:
        raise InputError(
            f"size {by(wanted)} leaves no room for the picture between the borders of `outpaint`",
            argument="size",
        )
    return wanted


def canvas(request: Request) -> Canvas | None:
    """What to draw on for a settled request; None when it begins with no picture.

    Raises `InputError` for a mask of which `fit` leaves nothing.
    """
    if request.image is None:
        return None
    assert request.size is not None
    if request.inpaint is not None and request.inpaint.padding is not None:
        return _surroundings(request, request.inpaint)
    left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
    inner = (request.size[0] - left - right, request.size[1] - top - bottom)
    picture, mask = request.image, request.mask
    if picture.size != inner:
        assert request.fit is not None
        picture = fitted(picture, inner, request.fit)
        if mask is not None:
            mask = binary(fitted(mask, inner, request.fit, fill=0))
    if request.outpaint is not None:
        picture = extended(picture, request.outpaint)
        mask = extended(mask or Image.new("L", inner), request.outpaint, fill=255)
    if mask is not None and mask.getbbox() is None:
        raise InputError(
            f"mask has no white left when fit to {by(inner)}; draw it larger, or choose another `fit`",
            argument="mask",
        )
    weight = None
    if request.inpaint is not None and request.inpaint.paste:
        assert mask is not None
        weight = feather(mask, request.inpaint.blur)
    return Canvas(picture, mask, picture, (0, 0, *picture.size), weight)


def _surroundings(request: Request, inpaint: Inpaint) -> Canvas:
    """The canvas that shows the mask and `padding` pixels around it, at the request's size."""
    assert request.image is not None and request.mask is not None
    assert request.size is not None and inpaint.padding is not None
    box = around(request.mask, inpaint.padding, request.size)
    picture = request.image.resize(request.size, Image.Resampling.LANCZOS, box=box)
    mask = painted(request.mask.crop(box), request.size)
    weight = None
    if inpaint.paste:
        left, top, right, bottom = box
        weight = feather(request.mask, inpaint.blur)[top:bottom, left:right]
    return Canvas(picture, mask, request.image, box, weight)


def in_image(request: Request, drawn_on: Canvas, box: Box) -> Box:
    """Where a box of the canvas of a settled request lies in the picture that it begins with, as far as it does."""
    assert request.image is not None
    image, size = request.image.size, drawn_on.picture.size
    if request.inpaint is not None and request.inpaint.padding is not None:
        left, top, right, bottom = drawn_on.box
        scales, start = ((right - left) / size[0], (bottom - top) / size[1]), (float(left), float(top))
    else:
        left, top, right, bottom = request.outpaint or (0, 0, 0, 0)
        inner = (size[0] - left - right, size[1] - top - bottom)
        scales = (image[0] / inner[0], image[1] / inner[1])
        if request.fit in ("cover", "contain"):
            scales = ((min if request.fit == "cover" else max)(scales),) * 2
        start = (
            (image[0] - inner[0] * scales[0]) / 2 - left * scales[0],
            (image[1] - inner[1] * scales[1]) / 2 - top * scales[1],
        )
    x0, y0, x1, y1 = (
        min(max(round(start[k % 2] + at * scales[k % 2]), 0), image[k % 2]) for k, at in enumerate(box)
    )
    return x0, y0, x1, y1


def around(mask: Image.Image, padding: int, size: Size) -> Box:
    """The box of the mask's white with `padding` pixels around, widened to the shape of `size` as far as the picture
    reaches."""
    found = mask.getbbox()
    assert found is not None
    left, top = max(0, found[0] - padding), max(0, found[1] - padding)
    right, bottom = min(mask.width, found[2] + padding), min(mask.height, found[3] + padding)
    width, height = right - left, bottom - top
    width, height = (
        min(mask.width, max(width, math.ceil(height * size[0] / size[1]))),
        min(mask.height, max(height, math.ceil(width * size[1] / size[0]))),
    )
    left = min(max(0, (left + right - width) // 2), mask.width - width)
    top = min(max(0, (top + bottom - height) // 2), mask.height - height)
    return left, top, left + width, top + height


def painted(mask: Image.Image, size: Size) -> Image.Image:
    """The mask at another size, in which whatever covers a white pixel is white: no thin line vanishes."""
    array = np.asarray(mask)
    for axis, side in enumerate((size[1], size[0])):
        starts = np.arange(side) * array.shape[axis] // side
        array = np.maximum.reduceat(array, starts, axis=axis)
    return Image.fromarray(array)


def fitted(picture: Image.Image, size: Size, how: str, fill: int | None = None) -> Image.Image:
    """The picture at `size` by Lanczos: cover crops what is too long, contain fills what is missing with the picture's
    edge (or with `fill`), stretch changes its shape."""
    if how == "cover":
        return cover(picture, (size[1], size[0]))
    if how == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(1, min(a, round(b * scale))) for a, b in zip(size, picture.size, strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    return extended(small, (left, top, size[0] - width - left, size[1] - height - top), fill)


def extended(picture: Image.Image, sides: tuple[int, int, int, int], fill: int | None = None) -> Image.Image:
    """The picture with pixels added at the (left, top, right, bottom): its edge repeated, or `fill`."""
    left, top, right, bottom = sides
    array = np.asarray(picture)
    added = ((top, bottom), (left, right), *[(0, 0)] * (array.ndim - 2))
    if fill is None:
        return Image.fromarray(np.pad(array, added, mode="edge"))
    return Image.fromarray(np.pad(array, added, constant_values=fill))


def feather(mask: Image.Image, blur: int) -> np.ndarray:
    """(H, W) shares in [0, 1]: 0 outside the mask, rising to 1 over `blur` pixels inwards from its edge.

    Where the mask is nowhere that deep, 1 is reached at its deepest. The picture's own border is no edge.
    """
    depth = np.zeros((mask.height, mask.width), np.uint16)
    inner, layers = mask, 0
    while layers <= blur and inner.getbbox() is not None:
        depth += np.asarray(inner) > 0
        inner, layers = inner.filter(ImageFilter.MinFilter(3)), layers + 1
    return depth.astype(np.float32) / max(1, layers)


def mixed(below: Image.Image, above: Image.Image, weight: np.ndarray) -> Image.Image:
    """below + weight · (above − below), rounded: exactly `below` where the weight is 0 and `above` where it is 1."""
    a, b = (np.asarray(picture).astype(np.float32) for picture in (below, above))
    return Image.fromarray(np.round(a + weight[..., None] * (b - a)).astype(np.uint8))


def nearest_size(size: Size, multiple: int) -> Size:
    """The size whose sides are positive multiples, each the nearest."""
    return max(1, round(size[0] / multiple)) * multiple, max(1, round(size[1] / multiple)) * multiple


def by(size: Size) -> str:
    """640x480."""
    return f"{size[0]}x{size[1]}"
