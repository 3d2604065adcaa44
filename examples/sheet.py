"""Draw several prompts with the packaged model and lay the pictures out on one sheet.

    python examples/sheet.py out.png

This is `make demo`, and a first look at the Python API.
"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import sfumato
from sfumato.storage import atomic_file

PROMPTS = [
    "a red metal sphere behind a small blue cube",
    "a large green rubber cylinder",
    "two yellow spheres",
    "a purple cube to the left of a cyan sphere",
    "a small gray metal cube in front of a large brown cylinder",
    "three red cubes",
]
EACH = 3  # pictures per prompt
GAP = 8  # pixels between pictures
CAPTION = 44  # pixels for the prompt above each row


def sheet(rows: list[tuple[str, tuple[Image.Image, ...]]]) -> Image.Image:
    """One row per prompt: its words, and its pictures below them."""
    width, height = rows[0][1][0].size
    columns = len(rows[0][1])
    page = Image.new(
        "RGB", (GAP + columns * (width + GAP), GAP + len(rows) * (CAPTION + height + GAP)), "white"
    )
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(14)
    letters = max(10, page.width // 8)
    for r, (prompt, pictures) in enumerate(rows):
        top = GAP + r * (CAPTION + height + GAP)
        words = textwrap.fill(prompt, letters)
        tall = pen.multiline_textbbox((0, 0), words, font)[3]
        pen.multiline_text((GAP, top + CAPTION - tall - GAP // 2), words, "black", font)
        for c, picture in enumerate(pictures):
            page.paste(picture, (GAP + c * (width + GAP), top + CAPTION))
    return page


def main(path: Path) -> None:
    model = sfumato.load()
    rows = []
    for number, prompt in enumerate(PROMPTS):
        result = model.generate(sfumato.Request(prompt, count=EACH, seed=100 * number))
        rows.append((prompt, result.images))
        print(f"{number + 1}/{len(PROMPTS)} {prompt}: {result.recipe['seconds']} s for {EACH}")
    with atomic_file(path) as temporary:
        sheet(rows).save(temporary, format="PNG")
    print(f"look at {path.resolve()}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "pocket-sheet.png"))
    except sfumato.SfumatoError as error:
        sys.exit(f"error: {error}")
