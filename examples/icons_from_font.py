"""Make a folder of captioned pictures from a colour emoji font on this machine.

    python examples/icons_from_font.py --out icons
    python examples/icons_from_font.py --font NotoColorEmoji.ttf --out icons

One 128×128 picture on white for each emoji that is a single code point (`1f34e.png`), and its Unicode name in
lower case beside it (`1f34e.txt`, "red apple"). Tested with the bitmap font Noto Color Emoji; other fonts work
where Pillow can draw them in colour. The pictures stay under the font's licence: for Noto, the SIL Open Font
License.
"""

import argparse
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sfumato.errors import DataError, InputError, SfumatoError
from sfumato.storage import atomic_directory

SIDE = 128  # pixels
SIZES = (
    109,
    136,
    160,
    128,
)  # pixels an em; a bitmap font has a strike at few sizes: 109 for Noto, 160 for Apple
RANGES = ((0x2190, 0x32FF), (0x1F000, 0x1FAFF))  # code points that are pictures; letters and digits lie below
PARTS = (  # code points that only mean something beside another one
    (0x1F1E6, 0x1F1FF),  # halves of flags
    (0x1F3FB, 0x1F3FF),  # skin tones
)
PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu: fonts-noto-color-emoji
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch: noto-fonts-emoji
    "/usr/share/fonts/google-noto-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",  # Alpine: font-noto-emoji
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/.fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
HOW = "install one (Debian and Ubuntu: apt install fonts-noto-color-emoji) or name one with --font"


def find_font() -> Path:
    """The first emoji font at a place where systems keep one."""
    for place in PLACES:
        path = Path(place).expanduser()
        if path.is_file():
            return path
    raise DataError(f"no emoji font was found on this machine; {HOW}")


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at a size it has. Raises `DataError` for a file that is no font."""
    if not path.is_file():
        raise InputError(f"there is no font file {str(path)!r}; {HOW}", argument="font")
    for size in SIZES:
        try:
            return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            problem = error  # a bitmap font without this size, or no font at all
    raise DataError(f"{path} cannot be read as a font of {SIZES} pixels: {problem}")


def glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """What the font draws for a character, in its own colours and cropped to its cell; None where that is nothing."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    cell = Image.new("RGBA", (right - left, bottom - top), (255, 255, 255, 0))
    ImageDraw.Draw(cell).text((-left, -top), character, "black", font, embedded_color=True)
    return cell if cell.getbbox() else None


def colored(picture: Image.Image) -> bool:
    """Whether a visible pixel is not gray."""
    seen = Image.new("RGB", picture.size)
    seen.paste(picture, mask=picture.getchannel("A"))
    return seen.convert("HSV").getchannel("S").getextrema()[1] > 32


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as large as fits, in the middle of a white square."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(fitted, ((SIDE - width) // 2, (SIDE - height) // 2), fitted)
    return square


def icons(font: ImageFont.FreeTypeFont) -> Iterator[tuple[int, str, Image.Image]]:
    """(code point, caption, picture) of every emoji of the font."""
    missing = glyph(font, "\U0010ffff")  # no character has this number: the font's box for what it lacks
    for first, last in RANGES:
        for point in range(first, last + 1):
            name = unicodedata.name(chr(point), "")
            if not name or any(low <= point <= high for low, high in PARTS):
                continue
            drawn = glyph(font, chr(point))
            if drawn is not None and (missing is None or drawn.tobytes() != missing.tobytes()):
                yield point, name.lower(), drawn


def main(path: Path | None, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; name a new one", argument="out")
    path = path or find_font()
    font = open_font(path)
    count, colors = 0, False
    with atomic_directory(out) as staging:
        for point, caption, drawn in icons(font):
            on_white(drawn).save(staging / f"{point:05x}.png", optimize=True)
            (staging / f"{point:05x}.txt").write_text(caption + "\n", encoding="utf-8")
            count, colors = count + 1, colors or colored(drawn)
        if not colors:
            raise DataError(f"{path} draws no emoji in colour that Pillow can read; {HOW}")
    print(f"{out}: {count} pictures from {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a captioned folder from an emoji font.")
    parser.add_argument(
        "--font", type=Path, metavar="FILE", help="an emoji font; found by itself if it can be"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("icons"), help="a new or empty folder"
    )
    given = parser.parse_args()
    try:
        main(given.font, given.out)
    except SfumatoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
