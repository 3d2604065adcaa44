"""Captioned pictures drawn by a model without a LoRA and with it, beside what they should show, and how far each is.

    python examples/lora_sheet.py runs/mine/lora.safetensors held-out sheet.png

Rows: the pictures, the model alone, the model with the LoRA. The distance is the mean absolute difference of all
values, in steps of 255, over `SEEDS` seeds; beside it that of the colour of the middle and of the corners.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

import sfumato
from sfumato.data.folder import FolderSource

SEEDS = 4


def distances(drawn: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    """(all, the middle's mean colour, the corners' mean colour) of two uint8 pictures (H, W, 3)."""
    side = len(wanted) // 8
    middle = slice(3 * side, 5 * side)
    corners = np.r_[0:side, -side:0]

    def apart(pick) -> float:
        return float(np.abs(pick(drawn).mean((0, 1)) - pick(wanted).mean((0, 1))).mean())

    whole = float(np.abs(drawn.astype(float) - wanted).mean())
    return whole, apart(lambda p: p[middle, middle]), apart(lambda p: p[corners][:, corners])


def main(lora: str, pictures: str, target: str) -> None:
    source = FolderSource(pictures, 128)
    wanted = source.pixels(range(len(source)))
    model = sfumato.load("pocket")
    rows = [[Image.fromarray(picture) for picture in wanted]]
    for name in ("without", "with"):
        if name == "with":
            model.attach(lora)
        drawn = [
            model.generate(sfumato.Request(source.caption(i), seed=0, count=SEEDS, size=(128, 128))).images
            for i in range(len(source))
        ]
        rows.append([images[0] for images in drawn])
        found = [
            distances(np.asarray(image), wanted[i]) for i, images in enumerate(drawn) for image in images
        ]
        whole, middle, corners = np.mean(found, axis=0)
        print(
            f"{name} the LoRA: {whole:.1f} of 255 apart; the middle {middle:.1f}, the corners {corners:.1f}"
        )
    sheet = Image.new("RGB", (128 * len(rows[0]), 128 * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (128 * x, 128 * y))
    sheet.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:4])
