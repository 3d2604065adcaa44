"""A clip to a file, with notes in the container's metadata.

mp4 is H.264 and webm VP9, both in 4:2:0, BT.709, limited range, and tagged so, at a quality at which the eye sees no
difference; sides must be even. WebP is lossless. GIF has 256 colours of each frame and a hundredth of a second as its
unit of time. A folder of PNG is exact, and its names sort in the order of frames.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.errors import InputError
from sfumato.storage import atomic_directory, atomic_file
from sfumato.types import MAX_CLIP_PIXELS, Clip
from sfumato.video import xmp
from sfumato.video.formats import FOLDER, format_of, pyav

QUALITY: dict[str, tuple[str, dict[str, str]]] = {  # codec and its options
    "mp4": ("libx264", {"crf": "16", "preset": "medium"}),
    "webm": ("libvpx-vp9", {"crf": "20", "b:v": "0", "row-mt": "1", "deadline": "good", "cpu-used": "3"}),
}
CONTAINER = {
    "mp4": {"movflags": "use_metadata_tags+faststart"},
    "webm": {},
}  # any name of a note; index in front
# kinds that Pillow writes, given all frames, and the bytes of a pixel that it holds until then; 13 in a WebP of noise
AT_ONCE = {"gif": 3, "webp": 8}
BT709 = 1  # of H.273's tables of primaries, transfer and matrix
LIMITED = 1  # FFmpeg's number of the range 16 to 235
LONGEST = 65_535  # milliseconds or hundredths of a frame's time that GIF and WebP can say
# writes one frame of a folder, by its number
SavePicture = Callable[[Image.Image, Path, int], None]


def staged(path: str | os.PathLike[str]) -> AbstractContextManager[Path]:
    """Where to write what is to appear at `path` as a whole or not at all: a file, or a folder of that name."""
    return atomic_directory(path) if format_of(path) == FOLDER else atomic_file(path)


def check_clip(clip: Clip, kind: str) -> None:
    """`InputError` for a clip that no file of this kind can hold."""
    if not clip.frames:
        raise InputError("a clip needs at least one frame", argument="frames")
    if len({frame.size for frame in clip.frames}) > 1:
        raise InputError("the frames of a clip must have one size", argument="frames")
    check_shape(kind, len(clip.frames), clip.size)


def check_shape(kind: str, frames: int, size: tuple[int, int], argument: str = "output") -> None:
    """`InputError`, naming `argument`, for so many frames of (width, height) that no file of this kind can hold; told
    before drawing.
    """
    width, height = size
    if kind in QUALITY and (width % 2 or height % 2):
        raise InputError(
            f"{kind} needs even sides, not {width}x{height}; write .webp, .gif or a folder", argument=argument
        )
    if kind in AT_ONCE and frames * width * height > MAX_CLIP_PIXELS:
        raise InputError(
            f"{kind} is written with all frames in memory, and {frames:,} of {width}x{height} are too many for it; "
            "write mp4 or webm",
            argument=argument,
        )


def held(kind: str, frames: int, size: tuple[int, int]) -> int:
    """Bytes that writing so many frames of (width, height) holds, beside the frames themselves."""
    return AT_ONCE.get(kind, 0) * frames * size[0] * size[1]


def write_clip(
    clip: Clip,
    place: Path,
    kind: str,
    notes: Mapping[str, str],
    *,
    save_picture: SavePicture | None = None,
    **metadata: Any,
) -> None:
    """Write the clip to `place`, as it stands, in a format of `formats.WRITTEN`.

    Frames are taken one after the other, and one is held at a time, but for the kinds `AT_ONCE`.

    notes: names and texts for the container's metadata; of a GIF they become its comment, one a line. metadata: `xmp`
    of a WebP, a GIF or an mp4, and `exif` of a WebP. save_picture: writes each frame of a folder; plain PNG by default.
    """
    check_clip(clip, kind)
    frames = (frame.convert("RGB") for frame in clip.frames)
    if kind in QUALITY:
        _encode(frames, clip.size, clip.fps, place, kind, notes)
    elif kind == FOLDER:
        digits = max(4, len(str(len(clip.frames) - 1)))
        for number, frame in enumerate(frames):
            file = place / f"{number:0{digits}}.png"
            frame.save(file, format="PNG") if save_picture is None else save_picture(frame, file, number)
    elif kind == "gif":
        _save_gif(frames, durations(clip.fps, len(clip.frames), 100), place, notes)
    else:
        first, *more = frames
        times = durations(clip.fps, len(clip.frames), 1000)
        first.save(
            place,
            format="WEBP",
            save_all=True,
            append_images=more,
            duration=times,
            loop=0,
            lossless=True,
            **metadata,
        )
    if kind in xmp.WRITERS and "xmp" in metadata:
        xmp.WRITERS[kind](place, metadata["xmp"])


def durations(fps: float, count: int, unit: int) -> list[int]:
    """How long each frame is shown, in 1/unit of a second, rounded so that no error adds up over the clip."""
    ends = [round(k * unit / fps) for k in range(count + 1)]
    return [min(max(b - a, 1), LONGEST) for a, b in pairwise(ends)]


def _save_gif(frames: Iterable[Image.Image], times: list[int], place: Path, notes: Mapping[str, str]) -> None:
    """Each frame with its own 256 colours. times: of each, in hundredths of a second."""
    first, *more = [frame.quantize(256, method=Image.Quantize.MEDIANCUT) for frame in frames]
    comment = "\n".join(notes.values()).encode("utf-8")
    first.save(
        place,
        format="GIF",
        save_all=True,
        append_images=more,
        duration=[10 * time for time in times],
        loop=0,
        comment=comment,
        optimize=False,
        disposal=1,
    )


def _encode(
    frames: Iterable[Image.Image],
    size: tuple[int, int],
    fps: float,
    place: Path,
    kind: str,
    notes: Mapping[str, str],
) -> None:
    """By FFmpeg, which is handed one frame after the other."""
    av = pyav("output")
    codec, options = QUALITY[kind]
    with av.open(str(place), "w", format=kind, options=CONTAINER[kind]) as container:
        for name, text in notes.items():
            container.metadata[name] = text
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = size
        stream.pix_fmt, stream.options = "yuv420p", dict(options)
        context = stream.codec_context
        context.color_range = LIMITED
        context.colorspace = context.color_primaries = context.color_trc = BT709
        for frame in frames:
            picture = av.VideoFrame.from_image(frame).reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation="LANCZOS"
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def remove(path: Path) -> None:
    """Take away what `staged` has put there, a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
