"""An XMP packet put into a clip that is written already: GIF and mp4 (Adobe's XMP specification, part 3, 1.1.2, 1.2.7).

WebP takes it from its encoder, a folder's PNG say it each, and for WebM no place is defined.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from pathlib import Path

GIF_HEADER = 13  # bytes of signature and screen, before the table of colours
APPLICATION = b"\x21\xff\x0bXMP DataXMP"  # an extension, an application's, with a name of 11 bytes
# a reader that takes the packet's bytes for lengths of blocks lands somewhere here, and is led to the end
TRAILER = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"
MP4_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes


def into_gif(file: Path, packet: bytes) -> None:
    """As an extension before the first frame."""
    data = file.read_bytes()
    table = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    at = GIF_HEADER + table
    file.write_bytes(b"GIF89a" + data[6:at] + APPLICATION + packet + TRAILER + data[at:])


def into_mp4(file: Path, packet: bytes) -> None:
    """As the last box, so that no other one moves."""
    with file.open("ab") as stream:
        stream.write(struct.pack(">I", 8 + len(MP4_BOX) + len(packet)) + b"uuid" + MP4_BOX + packet)


WRITERS: dict[str, Callable[[Path, bytes], None]] = {"gif": into_gif, "mp4": into_mp4}  # by kind of file
