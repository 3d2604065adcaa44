"""Pictures that judge predictions: composed of what no chart shows, each with what was placed in it and where.

Words in other fonts and colours, scenes, icons of several shapes, patterns, line drawings and textures. A picture is a
function of its kind and its number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sfumato.fidelity.regions.region import Box
from sfumato.fidelity.words import OTHER_FONTS, font

Array = NDArray[np.floating]
SIDE = 256
Colour = tuple[int, int, int]
Chance = random.Random


@dataclass(frozen=True)
class Placed:
    """Something that stands in a picture. kind: "text", "pattern", "line" or "object"."""

    kind: str
    box: Box


@dataclass(frozen=True)
class HeldOut:
    """kind: of `KINDS`. picture: (SIDE, SIDE, 3) in [0, 1]."""

    kind: str
    picture: Array
    placed: tuple[Placed, ...]


def held_out(kind: str, number: int) -> HeldOut:
    """The picture of that kind and number."""
    image, placed = KINDS[kind](random.Random(f"{kind} {number}"))
    return HeldOut(kind, np.asarray(image.convert("RGB"), np.float64) / 255, tuple(placed))


def page(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Lines of words and figures, each in its own font, size and colour."""
    ground = _colour(chance)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen, placed, y = ImageDraw.Draw(image), [], 4
    while y < SIDE - 12:
        face = font(
            chance.choice(OTHER_FONTS), chance.choice((7, 8, 9, 11, 13, 15, 18, 22, 26, 30, 36, 44, 56))
        )
        text = _phrase(chance, int(220 / (face.size * 0.6)))
        x = chance.randrange(4, 24)
        box = tuple(int(v) for v in pen.textbbox((x, y), text, font=face))
        if box[3] > SIDE - 2:
            break
        pen.text((x, y), text, fill=_other(chance, ground), font=face)
        placed.append(Placed("text", (box[0], box[1], min(box[2], SIDE), box[3])))
        y = box[3] + chance.randrange(3, 20)
    return image, placed


def scenes(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Four scenes of the made world, of which no model has seen these."""
    from sfumato.scenes import render, sample_scene

    half = SIDE // 2
    made = render([sample_scene(chance.randrange(2**31), split="val") for _ in range(4)], size=half)
    rgb, which = made.rgb[:, :, 0].permute(0, 2, 3, 1).numpy(), made.instances[:, 0].numpy()
    whole = np.zeros((SIDE, SIDE, 3))
    placed = []
    for number in range(4):
        top, left = (v * half for v in divmod(number, 2))
        whole[top : top + half, left : left + half] = rgb[number]
        for label in range(1, int(which[number].max()) + 1):
            ys, xs = np.nonzero(which[number] == label)
            if len(ys):
                first, last = (left + int(xs.min()), top + int(ys.min())), (int(xs.max()), int(ys.max()))
                placed.append(Placed("object", (*first, left + last[0] + 1, top + last[1] + 1)))
    return Image.fromarray((whole * 255).round().astype(np.uint8)), placed


def icons(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Sixteen small drawings of a few shapes each, 6 to 56 pixels across."""
    ground = _colour(chance)
    image = Image.new("RGB", (SIDE, SIDE), ground)
    placed = []
    for number in range(16):
        size = chance.choice((6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56))
        row, column = divmod(number, 4)
        x, y = column * 64 + chance.randrange(0, 65 - size), row * 64 + chance.randrange(0, 65 - size)
        icon, alpha = _icon(chance, ground)
        icon, alpha = (each.resize((size, size), Image.Resampling.LANCZOS) for each in (icon, alpha))
        image.paste(icon, (x, y), alpha)
        placed.append(Placed("object", (x, y, x + size, y + size)))
    return image, placed


def patterns(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Four fields of stripes, dots, bricks, weaves or waves."""
    half = SIDE // 2
    whole, placed = np.zeros((SIDE, SIDE, 3)), []
    y, x = np.mgrid[:half, :half].astype(np.float64)
    for number in range(4):
        period, turn = math.exp(chance.uniform(math.log(3), math.log(36))), chance.uniform(0, math.pi)
        u = (x * math.cos(turn) + y * math.sin(turn)) / period
        v = (-x * math.sin(turn) + y * math.cos(turn)) / period
        fields = (
            0.5 + 0.5 * np.cos(2 * np.pi * u),
            (u % 1 < 0.5).astype(float),
            ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09).astype(float),
            (((u + 0.5 * (np.floor(v) % 2)) % 1 < 0.12) | (v % 1 < 0.2)).astype(float),
            0.25 * (2 + np.cos(2 * np.pi * u) + np.cos(2 * np.pi * v)),
        )
        field = chance.choice(fields)[..., None]
        first = _colour(chance)
        inks = np.array(first), np.array(_other(chance, first))
        top, left = (k * half for k in divmod(number, 2))
        whole[top : top + half, left : left + half] = field * inks[0] + (1 - field) * inks[1]
        placed.append(Placed("pattern", (left, top, left + half, top + half)))
    return Image.fromarray(whole.round().clip(0, 255).astype(np.uint8)), placed


def drawing(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Straight lines and curves, one to five pixels thick."""
    ground = _colour(chance)
    fine = 4
    image = Image.new("RGB", (SIDE * fine, SIDE * fine), ground)
    pen, placed = ImageDraw.Draw(image), []
    for number in range(6):
        thick, y = chance.choice((1, 1, 2, 2, 3, 5)), 20 + number * 42
        rise = chance.choice((0, 0, chance.randrange(-14, 15)))
        x0, x1 = chance.randrange(6, 60), chance.randrange(170, 250)
        ink = _other(chance, ground)
        if chance.random() < 0.3:
            steps = [x0 + (x1 - x0) * k / 40 for k in range(41)]
            points = [(s * fine, (y + 8 * math.sin((s - x0) / chance.choice((9, 14)))) * fine) for s in steps]
            top, bottom = y - 9, y + 9
        else:
            points = [(x0 * fine, y * fine), (x1 * fine, (y + rise) * fine)]
            top, bottom = min(y, y + rise) - thick, max(y, y + rise) + thick
        pen.line(points, fill=ink, width=thick * fine, joint="curve")
        placed.append(Placed("line", (x0, top, x1, bottom)))
    return image.resize((SIDE, SIDE), Image.Resampling.BOX), placed


def textures(chance: Chance) -> tuple[Image.Image, list[Placed]]:
    """Fields of irregular detail, from clouds to sand, with a line of words over them."""
    whole = np.zeros((SIDE, SIDE, 3))
    half = SIDE // 2
    for number in range(4):
        top, left = (k * half for k in divmod(number, 2))
        numbers = np.random.default_rng(chance.randrange(2**31))
        fy, fx = np.meshgrid(np.fft.fftfreq(half), np.fft.fftfreq(half), indexing="ij")
        falling = np.maximum(np.hypot(fx, fy), 1 / half) ** -chance.choice((0.3, 0.8, 1.2, 1.8))
        field = np.real(np.fft.ifft2(np.fft.fft2(numbers.standard_normal((half, half))) * falling))
        field = (np.tanh(field / field.std() * chance.choice((0.5, 1.0, 2.0))) + 1)[..., None] / 2
        first = _colour(chance)
        inks = np.array(first), np.array(_other(chance, first))
        whole[top : top + half, left : left + half] = field * inks[0] + (1 - field) * inks[1]
    image = Image.fromarray(whole.round().clip(0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(chance.choice((0, 0.5, 1))))
    face = font(chance.choice(OTHER_FONTS), chance.choice((14, 20, 28, 36)))
    text, pen = _phrase(chance, int(200 / (face.size * 0.6))), ImageDraw.Draw(image)
    box = tuple(int(v) for v in pen.textbbox((20, 100), text, font=face))
    pen.rectangle((box[0] - 6, box[1] - 4, box[2] + 6, box[3] + 4), fill=(245, 245, 240))
    pen.text((20, 100), text, fill=(20, 20, 30), font=face)
    return image, [Placed("text", (box[0], box[1], min(box[2], SIDE), box[3]))]


KINDS: dict[str, Callable[[Chance], tuple[Image.Image, list[Placed]]]] = {
    "page": page,
    "scenes": scenes,
    "icons": icons,
    "patterns": patterns,
    "drawing": drawing,
    "textures": textures,
}


def _colour(chance: Chance) -> Colour:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def _other(chance: Chance, than: Colour) -> Colour:
    """A colour whose brightness differs so that it can be seen."""
    weights = (0.299, 0.587, 0.114)
    while True:
        colour = _colour(chance)
        if abs(sum(w * (a - b) for w, a, b in zip(weights, colour, than, strict=True))) > 45:
            return colour


def _phrase(chance: Chance, letters: int) -> str:
    """Made-up words and figures, up to that many letters, at least three."""
    text = ""
    while len(text) < max(letters, 3):
        if chance.random() < 0.15:
            text += f"{chance.randrange(10, 2000)} "
        else:
            word = "".join(
                chance.choice(("bcdfghklmnprstvwz", "aeiou")[k % 2]) for k in range(chance.randrange(2, 8))
            )
            text += (word.title() if chance.random() < 0.3 else word) + " "
    return text[: max(letters, 3)].strip() or "abc"


def _icon(chance: Chance, ground: Colour) -> tuple[Image.Image, Image.Image]:
    """A drawing and what of it is there, each 128 pixels across."""
    icon, alpha = Image.new("RGB", (128, 128), ground), Image.new("L", (128, 128), 0)
    pens = ImageDraw.Draw(icon), ImageDraw.Draw(alpha)
    ink: Any = _other(chance, ground)
    for layer in range(chance.randrange(1, 5)):
        inset = 4 + layer * 14
        reach = 128 - 2 * inset
        x, y = (inset + (chance.randrange(0, 16) - 8 if layer else 0) for _ in range(2))
        box = (x, y, x + reach, y + chance.choice((reach, reach * 3 // 4)))
        form = chance.randrange(4)
        fills: tuple[Any, Any] = ink, 255
        for pen, fill in zip(pens, fills, strict=True):
            if form == 0:
                pen.ellipse(box, fill=fill)
            elif form == 1:
                pen.rounded_rectangle(box, radius=reach // 6, fill=fill)
            elif form == 2:
                pen.polygon([((box[0] + box[2]) // 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
            else:
                pen.pieslice(box, 30, 330, fill=fill)
        ink = _other(chance, ink)
    return icon, alpha
