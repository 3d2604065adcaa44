"""WebDataset tar archives, read as a table of byte ranges: nothing is unpacked, and no member can run.

Members of one basename (everything before the first dot of the file name) are one sample; a sample needs a
picture and a `.txt`, `.caption` or `.json` (its `text` or `caption`). Other member types are set aside
unopened.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

from sfumato.data.discover import MAX_CAPTION_BYTES, Entry, check_caption
from sfumato.data.source import Problem
from sfumato.errors import DataError
from sfumato.pictures import describe, sniff

PICTURES = ("png", "jpg", "jpeg", "webp")
CAPTIONS = ("txt", "caption", "json")
MAX_MEMBERS = 10_000_000
# what `tarfile` lets through where a header holds words for numbers, sizes of no file, or a header of a header of …
HOSTILE_HEADER = (ValueError, OverflowError, RecursionError, MemoryError)


def read_archive(path: Path) -> tuple[list[Entry], list[Problem]]:
    """Entries and set-aside members of one uncompressed tar, in archive order.

    Raises `DataError` when it is damaged or compressed, or holds a member that is absolute, climbs out with
    `..`, or is a link or a device: such an archive was not made by a data tool, and none of it is used.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    problems: list[Problem] = []
    foreign: Counter[str] = Counter()
    with open(path, "rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for count, member in enumerate(archive):
                    _check_member(path, member)
                    if count >= MAX_MEMBERS:
                        raise DataError(f"{path} has more than {MAX_MEMBERS:,} members; split it")
                    if not member.isfile():
                        continue
                    key, extension = _key(member.name)
                    if extension not in PICTURES + CAPTIONS:
                        foreign[extension] += 1
                    elif extension in samples.setdefault(key, {}):
                        problems.append(Problem(f"{path.name}:{member.name}", "appears twice in the archive"))
                    else:
                        samples[key][extension] = member
        except (tarfile.TarError, *HOSTILE_HEADER):
            raise DataError(f"{path} is damaged, cut short or compressed; a plain .tar is read") from None
        size = path.stat().st_size
        entries = []
        for key, members in samples.items():
            try:
                entries.append(_entry(path, stream, key, members, size))
            except DataError as error:
                problems.append(Problem(f"{path.name}:{key}", str(error)))
    for extension, count in sorted(foreign.items()):
        kinds = ", ".join(PICTURES + CAPTIONS)
        problems.append(
            Problem(f"{path.name}:*.{extension}", f"{count:,} members left unopened; only {kinds} are read")
        )
    return entries, problems


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    pure = PurePosixPath(member.name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{path} holds the member {member.name!r}, which leaves the archive; it is refused")
    if member.size < 0:  # the next header would stand before this one, for ever
        raise DataError(f"{path} holds the member {member.name!r} of {member.size} bytes; it is refused")
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise DataError(
            f"{path} holds the member {member.name!r}, which is a link or a device; it is refused"
        )


def _key(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _read(stream, member: tarfile.TarInfo, limit: int) -> bytes:
    stream.seek(member.offset_data)
    return stream.read(min(member.size, limit))


def _entry(path: Path, stream, key: str, members: dict[str, tarfile.TarInfo], size: int) -> Entry:
    found = [e for e in PICTURES if e in members]
    if not found:
        raise DataError("has no picture")
    if len(found) > 1:
        raise DataError(f"has {len(found)} pictures ({', '.join(found)}); one is expected")
    picture = members[found[0]]
    if picture.offset_data + picture.size > size:
        raise DataError("is cut short")
    start = _read(stream, picture, 64)
    if not sniff(start):
        raise DataError(f"is {describe(start)}; PNG, JPEG and WebP are read")
    kind = next((e for e in CAPTIONS if e in members), None)
    if kind is None:
        raise DataError("has no caption (.txt, .caption or .json)")
    text = _read(stream, members[kind], MAX_CAPTION_BYTES + 1)
    if kind == "json":
        text = _json_caption(text)
    caption = check_caption(text, f"{key}.{kind}")
    return Entry(f"{path.name}:{picture.name}", path, caption, 1, picture.offset_data, picture.size)


def _json_caption(text: bytes) -> bytes:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError("has a .json that is not JSON, or is longer than a caption may be") from None
    value = next((row[k] for k in ("text", "caption") if k in row), None) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise DataError("has a .json without text or caption")
    return value.encode("utf-8", "surrogatepass")
