"""Finding out how a folder of captioned pictures is laid out, and what in it cannot be used.

Layouts, told apart by what is there and not by a flag: `metadata.jsonl` (Hugging Face imagefolder), kohya's
`<repeats>_<name>` folders under the folder that is passed, pictures with a `.txt` or `.caption` file beside
each, class folders (the folder's name is the caption), and WebDataset tar archives. Files are read, never
run; nothing outside the folder is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sfumato.checks import MAX_PROMPT
from sfumato.data.source import Problem
from sfumato.errors import DataError
from sfumato.pictures import describe, sniff

SIDECARS = (".txt", ".caption")  # the first that exists counts
PICTURE_NAMES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".heic",
    ".avif",
    ".psd",
    ".jfif",
}
PASSED_OVER = {
    ".txt",
    ".caption",
    ".json",
    ".jsonl",
    ".csv",
    ".md",
    ".npy",
    ".npz",
    ".safetensors",
    ".parquet",
    ".toml",
}
MAX_CAPTION_BYTES = 4 * MAX_PROMPT
MAX_ROW_BYTES = 16 * MAX_CAPTION_BYTES  # of a line of metadata.jsonl, with room for fields that are not ours
MAX_METADATA_BYTES = 4 * 2**30
KOHYA = re.compile(r"(\d{1,6})_(.+)")
SPLITS = {"train", "test", "validation", "valid", "val"}


@dataclass(frozen=True)
class Entry:
    """One picture with its caption; `length` −1 means the whole file, else a stretch of an archive."""

    name: str
    file: Path
    caption: str
    repeats: int = 1
    offset: int = 0
    length: int = -1

    def read(self) -> bytes:
        """The picture's bytes. Raises `DataError` when they can no longer be read."""
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                return stream.read(self.length)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}") from None


@dataclass
class Found:
    """Entries in name order, members set aside, and folders passed over, each with the reason."""

    layout: str
    entries: list[Entry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passed_over: list[Problem] = field(default_factory=list)


def discover(path: str | os.PathLike[str], captions: bool = True) -> Found:
    """The pictures and captions under `path`. Raises `DataError` when none is usable, or it is unsafe.

    captions: they are needed; without, every picture under a folder counts, whatever lies beside it.
    """
    root = Path(path)
    if not root.exists():
        raise DataError(f"{root} does not exist; give a folder of captioned pictures", argument="path")
    if root.is_file():
        if root.name.endswith(".tar"):
            return _archives([root], root.parent)
        raise DataError(f"{root} is a file; give a folder of captioned pictures, or a .tar", argument="path")
    if captions and not (root / "metadata.jsonl").is_file():
        root = _training_split(root)
    if captions and (root / "metadata.jsonl").is_file():
        return _from_metadata(root)
    folders = _walk(root)
    tars = [f for files in folders.values() for f in files if f.suffix == ".tar"]
    kohya = [d for d in sorted(folders) if d.parent == root and KOHYA.fullmatch(d.name)]
    found = Found("")
    pictures = {folder: _pictures(root, files, found) for folder, files in folders.items()}
    pictures = {folder: files for folder, files in pictures.items() if files}
    if tars and not pictures:
        return _archives(sorted(tars), root)
    if not pictures:
        raise DataError(_nothing(root, folders, found), argument="path")
    if not captions:
        found.layout = "pictures"
        found.entries = [Entry(_name(root, p), p, "") for files in pictures.values() for p in files]
    elif kohya and root not in pictures and any(k in pictures for k in kohya):
        _from_kohya(root, pictures, found)
    elif any(_sidecar(p) for files in pictures.values() for p in files):
        _from_sidecars(root, pictures, found)
    elif root not in pictures:
        found.layout = "class folders"
        for folder, files in pictures.items():
            found.entries += [Entry(_name(root, p), p, folder.name) for p in files]
    else:
        raise DataError(_no_captions(root, pictures), argument="path")
    found.entries.sort(key=lambda e: e.name)
    if not found.entries:
        raise DataError(
            f"{root} ({found.layout}) has no usable picture: {listed(found.problems)}", argument="path"
        )
    return found


def listed(problems: list[Problem], most: int = 10) -> str:
    """The first problems in one line, and how many more there are."""
    rest = f"; and {len(problems) - most:,} more" if len(problems) > most else ""
    return "; ".join(str(p) for p in problems[:most]) + rest


def check_caption(data: bytes, name: str) -> str:
    """A caption's text from its bytes, on one line. Raises `DataError` when empty, too long or not UTF-8."""
    if len(data) > MAX_CAPTION_BYTES:
        raise DataError(f"the caption {name} has {len(data):,} bytes; at most {MAX_CAPTION_BYTES:,} are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the caption {name} is not UTF-8 (byte {error.start})") from None
    return _one_line(text, name)


def _one_line(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"the caption {name} is {type(text).__name__}, not text")
    line = " ".join(text.split())
    if not line:
        raise DataError(f"the caption {name} is empty")
    if "\0" in line:
        raise DataError(f"the caption {name} holds a NUL character")
    if len(line) > MAX_PROMPT:
        raise DataError(f"the caption {name} has {len(line):,} characters; at most {MAX_PROMPT:,} are used")
    if any(0xD800 <= ord(c) <= 0xDFFF for c in line):
        raise DataError(f"the caption {name} holds half of a surrogate pair")
    return line


def inside(root: Path, relative: object) -> Path:
    """`root / relative` if that stays inside `root`, links followed. Raises `DataError` otherwise."""
    if not isinstance(relative, str) or not relative or "\0" in relative:
        raise DataError(f"{relative!r} is not a file name")
    pure = PurePosixPath(relative.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or re.match(r"[A-Za-z]:", relative):
        raise DataError(f"{relative!r} leaves the folder; only files inside it are read")
    target = root / pure
    if not target.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{relative!r} is a link that leaves the folder; put the file itself there")
    return target


def _walk(root: Path) -> dict[Path, list[Path]]:
    """Folder → its files, both in name order; hidden ones and links to folders are not entered."""
    folders: dict[Path, list[Path]] = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if not d.startswith(".") and d != "__MACOSX")
        folders[Path(folder)] = [Path(folder) / f for f in sorted(files) if not f.startswith(".")]
    return folders


def _training_split(root: Path) -> Path:
    """`root/train` where `root` holds nothing but split folders, so that test pictures are not trained on."""
    names = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    loose = any(p.suffix.lower() in PICTURE_NAMES for p in root.iterdir() if p.is_file())
    return root / "train" if "train" in names and names <= SPLITS and not loose else root


def _pictures(root: Path, files: Iterable[Path], found: Found) -> list[Path]:
    """Those of `files` that are pictures by content; what only claims to be one is set aside."""
    pictures = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in PASSED_OVER:
            continue
        try:
            inside(root, _name(root, path))
            if not path.is_file():
                raise DataError("is not a regular file" if path.exists() else "is a link to nothing")
            with open(path, "rb") as stream:
                start = stream.read(64)
        except (DataError, OSError) as error:
            reason = str(error) if isinstance(error, DataError) else f"cannot be read ({error.strerror})"
            found.problems.append(Problem(_name(root, path), reason))
            continue
        if sniff(start):
            pictures.append(path)
        elif suffix in PICTURE_NAMES:
            found.problems.append(
                Problem(_name(root, path), f"is {describe(start)}; PNG, JPEG and WebP are read")
            )
    return pictures


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _sidecar(picture: Path) -> Path | None:
    return next((s for s in (picture.with_suffix(e) for e in SIDECARS) if os.path.lexists(s)), None)


def _read_sidecar(root: Path, sidecar: Path) -> str:
    name = _name(root, sidecar)
    inside(root, name)
    if not sidecar.is_file():
        raise DataError(f"the caption {name} is not a regular file")
    try:
        with open(sidecar, "rb") as stream:
            return check_caption(stream.read(MAX_CAPTION_BYTES + 1), name)
    except OSError as error:
        raise DataError(f"the caption {name} cannot be read ({error.strerror})") from None


def _captioned(
    root: Path, files: list[Path], found: Found, repeats: int = 1, fallback: str | None = None
) -> None:
    """Pair the pictures of one folder with their sidecars; set aside those without or with a shared one."""
    same = defaultdict(list)
    for picture in files:
        same[picture.stem].append(picture)
    for picture in files:
        name = _name(root, picture)
        twins = [p.name for p in same[picture.stem] if p != picture]
        sidecar = _sidecar(picture)
        try:
            if sidecar is None and fallback is None:
                wanted = " or ".join(picture.with_suffix(e).name for e in SIDECARS)
                raise DataError(f"has no caption ({wanted} beside it)")
            if sidecar is not None and twins:
                raise DataError(
                    f"shares its caption {sidecar.name} with {', '.join(twins)}; rename one of them"
                )
            caption = _read_sidecar(root, sidecar) if sidecar is not None else fallback
            found.entries.append(Entry(name, picture, str(caption), repeats))
        except DataError as error:
            found.problems.append(Problem(name, str(error)))


def _from_sidecars(root: Path, pictures: dict[Path, list[Path]], found: Found) -> None:
    found.layout = "plain folder with caption files"
    for folder, files in pictures.items():
        if any(_sidecar(p) for p in files):
            _captioned(root, files, found)
        else:
            reason = f"{len(files):,} pictures, none with a caption file"
            found.passed_over.append(Problem(_name(root, folder) + "/", reason))


def _from_kohya(root: Path, pictures: dict[Path, list[Path]], found: Found) -> None:
    found.layout = "kohya folders"
    for folder, files in pictures.items():
        match = KOHYA.fullmatch(folder.name) if folder.parent == root else None
        if match is None or int(match[1]) == 0:
            reason = f"{len(files):,} pictures; its name is not <repeats>_<name> with at least 1 repeat"
            found.passed_over.append(Problem(_name(root, folder) + "/", reason))
        else:
            _captioned(root, files, found, int(match[1]), match[2])


def _from_metadata(root: Path) -> Found:
    found = Found("metadata.jsonl")
    seen: dict[Path, int] = {}
    for number, line in enumerate(_metadata_lines(root), 1):
        if not line.strip():
            continue
        where = f"metadata.jsonl line {number}"
        try:
            if len(line) > MAX_ROW_BYTES:
                raise DataError(f"is longer than {MAX_ROW_BYTES:,} bytes")
            row = _json_object(line)
            if "file_name" not in row:
                raise DataError("has no file_name")
            picture = inside(root, row["file_name"])
            where = str(row["file_name"])
            if "text" not in row:
                raise DataError(f"has no text in line {number} of metadata.jsonl")
            caption = _one_line(row["text"], f"in line {number} of metadata.jsonl")
            if not picture.is_file():
                raise DataError(f"is named in line {number} of metadata.jsonl but is not there")
            if picture in seen:
                raise DataError(f"is named twice in metadata.jsonl, in lines {seen[picture]} and {number}")
            seen[picture] = number
            with open(picture, "rb") as stream:
                start = stream.read(64)
            if not sniff(start):
                raise DataError(f"is {describe(start)}; PNG, JPEG and WebP are read")
            found.entries.append(Entry(_name(root, picture), picture, caption))
        except DataError as error:
            found.problems.append(Problem(where, str(error)))
        except OSError as error:
            found.problems.append(Problem(where, f"cannot be read ({error.strerror})"))
    if not found.entries:
        raise DataError(
            f"{root / 'metadata.jsonl'} names no usable picture; each line has to be an object "
            "with file_name and text" + (f": {listed(found.problems)}" if found.problems else "")
        )
    found.entries.sort(key=lambda e: e.name)
    return found


def _metadata_lines(root: Path) -> Iterator[bytes]:
    """The lines of metadata.jsonl one by one, each cut to `MAX_ROW_BYTES` + 1. Raises `DataError` when it is a link
    that leaves the folder, too large, or cannot be read.
    """
    path = inside(root, "metadata.jsonl")
    try:
        with open(path, "rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) > MAX_METADATA_BYTES:
                raise DataError(
                    f"{path} has {size:,} bytes; at most {MAX_METADATA_BYTES:,} are read, split it"
                )
            if stream.read(3) != b"\xef\xbb\xbf":  # UTF-8's byte-order mark
                stream.seek(0)
            while line := stream.readline(MAX_ROW_BYTES + 1):
                rest = line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                    rest = stream.readline(MAX_ROW_BYTES + 1)
                yield line
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None


def _json_object(line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("is not JSON") from None
    if not isinstance(row, dict):
        raise DataError("is not a JSON object")
    return row


def _archives(tars: list[Path], root: Path) -> Found:
    from sfumato.data.archive import read_archive

    found = Found("WebDataset archives")
    for tar in tars:
        inside(root, _name(root, tar))
        entries, problems = read_archive(tar)
        found.entries += entries
        found.problems += problems
    if not found.entries:
        said = f": {listed(found.problems)}" if found.problems else ""
        raise DataError(f"{root} has no usable picture in {len(tars)} .tar{said}", argument="path")
    return found


def _suffixes(paths: Iterable[Path]) -> str:
    counts = Counter(p.suffix.lower() or "(no extension)" for p in paths)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))


def _nothing(root: Path, folders: dict[Path, list[Path]], found: Found) -> str:
    files = [f for members in folders.values() for f in members]
    has = _suffixes(files) or "no files"
    why = f" ({listed(found.problems)})" if found.problems else ""
    return f"{root} has no usable picture: looked for PNG, JPEG or WebP in it and below, found {has}{why}"


def _no_captions(root: Path, pictures: dict[Path, list[Path]]) -> str:
    has = _suffixes(p for files in pictures.values() for p in files)
    return (
        f"{root} has {has} but no captions: looked for a .txt or .caption beside each picture, "
        "a metadata.jsonl with file_name and text, folders named <repeats>_<name>, or one folder per class"
    )
