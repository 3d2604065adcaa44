"""Draw clips with the packaged model and lay the frames of each out in a row.

python examples/clips_sheet.py clips.png
"""

import sys
from pathlib import Path

from PIL import Image

import sfumato
from sfumato.storage import atomic_file

PROMPTS = [
    "a red ball rolls to the left past a blue cube",
    "a large green metal cylinder slides right quickly",
    "a yellow sphere bounces up and down",
    "a small purple cone moves closer",
]
FRAMES = 9  # of a clip


def sheet(rows: list[tuple[Image.Image, ...]]) -> Image.Image:
    """Rows of pictures of one size."""
    width, height = rows[0][0].size
    page = Image.new("RGB", (len(rows[0]) * width, len(rows) * height))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            page.paste(picture, (c * width, r * height))
    return page


def main(path: Path) -> None:
    model = sfumato.load()
    rows = []
    for number, prompt in enumerate(PROMPTS, 1):
        clip = model.generate(sfumato.Request(prompt, frames=FRAMES, seed=number)).clips[0]
        rows.append(tuple(clip.frames))
        print(f"{number}/{len(PROMPTS)} {prompt}")
    with atomic_file(path) as temporary:
        sheet(rows).save(temporary, format="PNG")
    print(f"look at {path.resolve()}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "clips.png"))
    except sfumato.SfumatoError as error:
        sys.exit(f"error: {error}")
