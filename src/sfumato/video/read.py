"""Reading a clip that nobody vouches for: mp4, mov, webm, mkv, avi, animated WebP or GIF, or a folder of pictures.

What a file is, is told by its first bytes, and it is given to that one demuxer as an open file, so that nothing it
names is ever followed. Frames come as upright 8-bit RGB. Clips have one rate here: where times between frames differ,
the file is refused with the command that makes them equal, and nothing is guessed. Sound is not read.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageSequence

from sfumato import pictures
from sfumato.errors import DataError, InputError, naming
from sfumato.pictures import shown
from sfumato.types import MAX_CLIP_PIXELS, MAX_FPS, MAX_FRAMES, Clip
from sfumato.video.formats import DEMUXERS, pyav, sniff

MAX_BYTES = 2**30
UNEVEN = (
    0.1  # share of a frame's time by which another's may differ, beside two ticks of the container's clock
)
SHORT = 0.05  # of the time that a file announces: what may be missing at its ends
STILL = 10.0  # frames per second of a GIF that says 0, as browsers show it
STILL_HEAD = 2**20  # bytes of a picture in which its header lies
BEGUN = ("clip", "init")  # arguments that a clip begins with
READ = "mp4, mov, webm, mkv, avi, animated WebP and GIF are read"
_PICTURE = re.compile(r".*\.(png|jpe?g|webp)", re.IGNORECASE)


def read_clip(
    path: str | os.PathLike[str],
    *,
    argument: str = "clip",
    frames: int | None = None,
    fps: float | None = None,
) -> Clip:
    """The clip in a file, or the pictures of a folder in the order of their names.

    frames: how many to read from the beginning; None is all, of which there may be `MAX_FRAMES`. fps: of a folder,
    which does not say it, and then it must be given. Raises `InputError`, or its kind `DataError`, in one sentence
    that names the argument and the file: for what is missing, empty, damaged, too large, of sound alone, of several
    rates, or no clip at all.
    """
    name = f"{argument} {shown(path)}"
    with naming(argument):
        if Path(path).is_dir():
            return _from_folder(Path(path), name, argument, frames, fps)
        with _opened(path, argument, name) as stream:
            return _read(stream, name, argument, frames, MAX_CLIP_PIXELS)


def decode_clip(
    data: bytes,
    name: str = "the clip",
    *,
    argument: str = "clip",
    frames: int | None = None,
    most: int = MAX_CLIP_PIXELS,
) -> Clip:
    """The clip that the bytes of a file hold, as `read_clip`. most: pixels of all frames that are read, together."""
    return _read(io.BytesIO(data), name, argument, frames, most)


def _read(stream: BinaryIO, name: str, argument: str, frames: int | None, most: int) -> Clip:
    start = stream.read(64)
    stream.seek(0)
    kind = sniff(start)
    if kind is None:
        if (still := pictures.sniff(start)) is not None:
            raise DataError(_of_still(stream.read(STILL_HEAD), still, name, argument))
        what = pictures.describe(start)
        what = "no clip" if what == pictures.UNKNOWN else what
        raise DataError(f"{name} is {what}; {READ}")
    if kind in DEMUXERS:
        read, rate = _decoded(stream, kind, name, argument, frames, most)
    else:
        read, rate = _animated(stream, name, frames, most)
    if not 0 < rate <= MAX_FPS:
        raise DataError(f"{name} says {rate:g} frames a second; at most {MAX_FPS:g} are read")
    return Clip(read, rate)


def _of_still(start: bytes, kind: str, name: str, argument: str) -> str:
    """What to say of a picture, perhaps a damaged one, that was given as a clip."""
    try:
        pictures.read_header(start, name)
    except DataError:
        return f"{name} is a {kind.upper()} picture, and a damaged one, where a clip is right; {READ}"
    as_image = "; a picture to begin with is given as `image`" if argument in BEGUN else ""
    return f"{name} is a {kind.upper()} picture, where a clip is right; {READ}{as_image}"


def notes(path: str | os.PathLike[str], argument: str = "clip") -> dict[str, str]:
    """What the container of a clip says of it, by names in lower case; of a GIF its comment, as `comment`, and of a
    folder what its first picture says. The texts are whatever a stranger wrote. Errors as `read_clip`.
    """
    name = f"{argument} {shown(path)}"
    if Path(path).is_dir():
        files = _pictures_in(Path(path), name)
        return pictures.texts(pictures.read_file(files[0], argument), name)
    with naming(argument), _opened(path, argument, name) as stream:
        start = stream.read(64)
        kind = sniff(start)
        if kind is None and pictures.sniff(start) is None:
            what = pictures.describe(start)
            what = "no picture or clip" if what == pictures.UNKNOWN else what
            raise DataError(f"{name} is {what}; PNG, JPEG, WebP, {READ}")
        stream.seek(0)
        if kind in DEMUXERS:
            av = pyav(argument)
            with _damage(name, av.error.FFmpegError), av.open(stream, format=_demuxer(kind)) as container:
                return {key.lower(): value for key, value in container.metadata.items()}
        if kind == "gif":
            with _damage(name, Exception), Image.open(stream, formats=["GIF"]) as picture:
                comment = picture.info.get("comment", b"")
                return {"comment": comment.decode("utf-8", "replace")} if comment else {}
        return pictures.texts(stream.read(pictures.MAX_BYTES), name)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], argument: str, name: str) -> Iterator[BinaryIO]:
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"{name} is neither a file nor a folder", argument=argument)
        if state.st_size > MAX_BYTES:
            raise InputError(
                f"{name} has {state.st_size:,} bytes; at most {MAX_BYTES:,} are read", argument=argument
            )
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise InputError(f"{name} does not exist", argument=argument) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise InputError(f"{name} cannot be read: {reason}", argument=argument) from None
    with stream:
        yield stream


@contextlib.contextmanager
def _damage(name: str, *errors: type[BaseException]) -> Iterator[None]:
    """Errors of a decoder as one line."""
    try:
        yield
    except InputError:
        raise
    except errors as error:  # FFmpeg's own lack of memory is a size that the file made up
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120]
        raise DataError(f"{name} is damaged or cut off: {reason or type(error).__name__}") from None


def _demuxer(kind: str) -> str:
    return DEMUXERS[kind].split(",")[0]


def _check_size(name: str, width: int, height: int, count: int, most: int = MAX_CLIP_PIXELS) -> None:
    """`DataError` for frames too large, alone or together."""
    if (
        width < 1
        or height < 1
        or width * height > pictures.MAX_PIXELS
        or max(width, height) > pictures.MAX_SIDE
    ):
        raise DataError(
            f"{name} has frames of {width}x{height} pixels; at most {pictures.MAX_PIXELS:,} are read"
        )
    if count * width * height > most:
        raise DataError(
            f"{name} holds more than {most:,} pixels in its frames together; read fewer frames, or make "
            "it smaller"
        )


def _too_many(name: str) -> DataError:
    return DataError(f"{name} has more than {MAX_FRAMES} frames; cut it, or read fewer")


def _decoded(
    stream: BinaryIO, kind: str, name: str, argument: str, most: int | None, pixels: int
) -> tuple[tuple[Image.Image, ...], float]:
    """By FFmpeg."""
    av = pyav(argument)
    read: list[Image.Image] = []
    times: list[float] = []
    with _damage(name, av.error.FFmpegError, ValueError), av.open(stream, format=_demuxer(kind)) as container:
        if not container.streams.video:
            if container.streams.audio:
                raise DataError(f"{name} has only sound; {READ}")
            raise DataError(f"{name} has no pictures: it is damaged or cut off, or no clip; {READ}")
        track = container.streams.video[0]
        track.thread_type = "AUTO"
        tick = float(track.time_base or 0)
        if track.codec_context is None:
            raise DataError(f"{name} is damaged, or coded in a way that is not known here")
        _check_size(name, track.width, track.height, 1, pixels)
        for frame in container.decode(track):
            if most is not None and len(read) == most:
                break
            if len(read) == MAX_FRAMES:
                raise _too_many(name)
            _check_size(name, frame.width, frame.height, len(read) + 1, pixels)
            if frame.pts is None:
                raise DataError(f"{name} does not say when its frames are shown; it is damaged")
            times.append(float(frame.pts * (frame.time_base or 0)))
            read.append(_turned(frame.to_image(), frame.rotation))
        guessed = float(track.average_rate or track.guessed_rate or 0)
        announced = float(track.duration * tick) if track.duration else 0.0
        if not announced and container.duration and not container.streams.audio:
            announced = container.duration / av.time_base
        if kind == "avi" and guessed:  # whose seconds are those of what is there
            announced = track.frames / guessed
    if not read:
        raise DataError(f"{name} has no frames that can be read: it is damaged or cut off")
    if len({picture.size for picture in read}) > 1:
        raise DataError(f"{name} has frames of several sizes")
    waits = [b - a for a, b in pairwise(times)] or [1 / guessed if guessed else 1.0]
    _check_even(name, waits, tick)
    seen = times[-1] - times[0] + waits[0]
    ends_early = most is None or len(read) < most
    if ends_early and seen < announced - max(SHORT * announced, 2 * waits[0]):
        raise DataError(f"{name} is cut off: {announced:.3g} seconds are announced, and {seen:.3g} are there")
    if len(read) == 1:
        return tuple(read), 1 / waits[0]
    # the container's own number where its clock agrees: times are rounded to ticks
    rate = (len(times) - 1) / (times[-1] - times[0])
    return tuple(read), guessed if guessed and abs(guessed - rate) < 0.02 * rate else rate


def _check_even(name: str, waits: Sequence[float], tick: float) -> None:
    """`DataError` unless frames follow each other at one rate. waits: seconds."""
    usual = sorted(waits)[len(waits) // 2]
    if usual <= 0 or any(abs(wait - usual) > max(1.01 * tick, UNEVEN * usual) for wait in waits):
        rates = sorted(1 / wait for wait in waits if wait > 0)
        between = f", from {rates[0]:.3g} to {rates[-1]:.3g} frames a second," if rates else ""
        raise DataError(
            f"{name} has a variable frame rate{between} and one rate is needed; make it even first, for example by "
            "ffmpeg -i FILE -fps_mode cfr -r 25 even.mp4"
        )


def _turned(picture: Image.Image, degrees: float) -> Image.Image:
    """Upright: phones note how they were held, anticlockwise."""
    turns = {
        90: Image.Transpose.ROTATE_90,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_270,
    }
    found = turns.get(int(degrees) % 360)
    return picture if found is None else picture.transpose(found)


def _animated(
    stream: BinaryIO, name: str, most: int | None, pixels: int
) -> tuple[tuple[Image.Image, ...], float]:
    """By Pillow: WebP and GIF. Transparency is laid on white."""
    read: list[Image.Image] = []
    waits: list[float] = []
    with _damage(name, Exception), Image.open(stream, formats=["WEBP", "GIF"]) as opened:
        _check_size(name, *opened.size, 1, pixels)
        for frame in ImageSequence.Iterator(opened):
            if most is not None and len(read) == most:
                break
            if len(read) == MAX_FRAMES:
                raise _too_many(name)
            _check_size(name, *frame.size, len(read) + 1, pixels)
            read.append(pictures.flatten(frame.copy(), name))
            waits.append(float(frame.info.get("duration") or 1000 / STILL) / 1000)
    if len(read) < 2:
        raise DataError(f"{name} is a picture that does not move; {READ}")
    tick = 0.001 if opened.format == "WEBP" else 0.01
    counted = waits[:-1] if len(waits) > 2 else waits  # the last one often waits longer
    _check_even(name, counted, tick)
    return tuple(read), len(counted) / sum(counted)


def _pictures_in(folder: Path, name: str) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if _PICTURE.fullmatch(file.name) and file.is_file())
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if not files:
        raise DataError(f"{name} holds no .png, .jpg or .webp pictures")
    return files


def _from_folder(folder: Path, name: str, argument: str, most: int | None, fps: float | None) -> Clip:
    files = _pictures_in(folder, name)[:most]
    if len(files) > MAX_FRAMES:
        raise _too_many(name)
    if fps is None:
        raise InputError(
            f"{name} is a folder, which does not say how fast it is shown; give `fps`", argument="fps"
        )
    read: list[Any] = []
    for file in files:
        picture = pictures.decode(pictures.read_file(file, argument), f"{argument} {shown(file)}")
        _check_size(name, *picture.size, len(read) + 1)
        if read and picture.size != read[0].size:
            raise DataError(f"{name} has pictures of several sizes: {file.name} differs from the first")
        read.append(picture)
    return Clip(tuple(read), fps)
