"""Which kinds of file hold clips: told by a name where one is written, by the first bytes where one is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from sfumato.errors import InputError

FOLDER = "folder"  # of PNG pictures; what a name without an ending is
WRITTEN = {".mp4": "mp4", ".webm": "webm", ".webp": "webp", ".gif": "gif", "": FOLDER}
ENDINGS = ".mp4, .webm, .webp, .gif, or no ending for a folder of .png"
BY_PYAV = ("mp4", "webm")
DEMUXERS = {
    "mp4": "mov,mp4,m4a,3gp,3g2,mj2",
    "webm": "matroska,webm",
    "avi": "avi",
}  # kinds read, in FFmpeg's names


def format_of(path: str | os.PathLike[str]) -> str:
    """The format that a clip is written in under this name. `InputError` for an ending that is none of them."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise InputError(f"output {str(path)[:200]!r} must end in {ENDINGS}", argument="output")
    return WRITTEN[suffix]


def sniff(start: bytes) -> str | None:
    """What a file that begins with `start` (12 bytes are enough) is: a key of `DEMUXERS`, webp, gif, or None."""
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mp4"
    if start.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm"
    if start[:4] == b"RIFF":
        return {b"WEBP": "webp", b"AVI ": "avi"}.get(start[8:12])
    return "gif" if start.startswith((b"GIF87a", b"GIF89a")) else None


def pyav(argument: str) -> ModuleType:
    """PyAV, which reads and writes mp4 and webm. `InputError`, naming `argument`, where it is not installed."""
    try:
        import av
    except ImportError:
        raise InputError(
            "mp4 and webm need PyAV: pip install av; .webp, .gif and folders of pictures do without",
            argument=argument,
        ) from None
    av.logging.set_level(
        None
    )  # errors are raised; what FFmpeg would print beside them is for its own command
    return av
