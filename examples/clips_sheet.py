"""Draw clips with the packaged model and lay the frames of each out in a row.

python examples/clips_sheet.py clips.png
"""

import sys
from pathlib import Path

import sfumato
from sfumato.train.tasks import save_sheet

PROMPTS = [
    "a red ball rolls to the left past a blue cube",
    "a large green metal cylinder slides right quickly",
    "a yellow sphere bounces up and down",
    "a small purple cone moves closer",
]
FRAMES = 9  # of a clip


def main(path: Path) -> None:
    model = sfumato.load()
    rows = []
    for number, prompt in enumerate(PROMPTS, 1):
        clip = model.generate(sfumato.Request(prompt, frames=FRAMES, seed=number)).clips[0]
        rows.append(list(clip.frames))
        print(f"{number}/{len(PROMPTS)} {prompt}")
    save_sheet(rows, path)
    print(f"look at {path.resolve()}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "clips.png"))
    except sfumato.SfumatoError as error:
        sys.exit(f"error: {error}")
