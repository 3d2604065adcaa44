"""Files that are either whole or absent: atomic writes, safetensors only, content hashes.

Every output goes to a temporary neighbour first, is flushed to the disk, and takes its name by one rename, so that
a crash at any moment leaves the old file or the new one and never a piece of either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

from sfumato.errors import CheckpointError

SHARD_BYTES = 16 * 2**20
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own bound on a header
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # what they begin with
PICKLED = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}  # what checkpoints are called that can run code
_PICKLE_ADVICE = (
    "a pickled checkpoint, which can run code when opened; use the .safetensors file its author offers, "
    "or convert it on a machine you can lose"
)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder, and makes a rename durable by itself
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on an exception it is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(target, target.suffix[:8])
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty staging directory; on success it replaces `path` whole, on an exception it is removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _neighbour(target)
    staging.mkdir()
    try:
        yield staging
        for member in staging.rglob("*"):
            if member.is_file():
                with open(member, "rb+") as stream:
                    os.fsync(stream.fileno())
        _sync_directory(staging)
        replaced = None
        if target.exists():
            replaced = _neighbour(target, mark="old.")
            replaced.mkdir()
            os.replace(target, replaced / "old")
        try:
            os.replace(staging, target)
        except OSError:
            if replaced:
                os.replace(replaced / "old", target)
                replaced.rmdir()
            raise
        _sync_directory(target.parent)
        if replaced:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _neighbour(target: Path, suffix: str = "", mark: str = "") -> Path:
    """A hidden name beside `target` that nobody has. What is made there gets the permissions the user's umask gives."""
    return target.with_name(f".{target.name[:32]}.{mark}{secrets.token_hex(8)}{suffix}")


def cache_folder(name: str) -> Path:
    """Where what can be made again is kept for this user: `sfumato/NAME` in $XDG_CACHE_HOME, or else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / name


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, limit: int | None = None, strict: bool = False) -> dict:
    """Read a JSON object; a missing or broken file is a `CheckpointError` that names it.

    limit: of its bytes. strict: as `strict_json`, which refuses keys that stand twice and numbers that are none.
    """
    try:
        if limit is not None and os.stat(path).st_size > limit:
            raise CheckpointError(f"{path} exceeds {limit:,} bytes, which no description of a model does")
        text = Path(path).read_text(encoding="utf-8")
        value = strict_json(text) if strict else json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is expected")
    return value


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, atomically. Tensors are made contiguous and moved to the CPU.

    `OSError` when the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error


def load_tensors(path: str | os.PathLike[str], device: str = "cpu") -> dict:
    """Read one safetensors file; anything else, or a damaged one, is a `CheckpointError` that says what was found."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with open_safetensors(path) as stream:
        length = header_length(stream, path)
        text = stream.read(length)
    try:
        strict_json(text.decode())  # the library takes the last of two tensors of one name
        return load_file(path, device=device)
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a safetensors file before any parser sees it, and say how to convert a pickled one."""
    with open_safetensors(path) as stream:
        header_length(stream, path)


def strict_json(text: str) -> Any:
    """Parse JSON; `ValueError` or `RecursionError` for what is none, and for what readers take differently: a key that
    stands twice, NaN and infinities.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)


def shown(name: str) -> str:
    """A name as an error or a table shows it: as it is when it is short and printable, else escaped and cut."""
    if len(name) <= 120 and name.isprintable():
        return name
    return ascii(name if len(name) <= 120 else name[:100] + "…")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in its JSON")
    return table


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} stands in its JSON, which has no such number")


def open_safetensors(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; `CheckpointError` when it is absent, no file, forbidden, or pickled by its name."""
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
        if path.suffix.lower() in PICKLED:
            raise CheckpointError(f"{path} is {_PICKLE_ADVICE}")
        return open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def header_length(stream: BinaryIO, path: str | os.PathLike[str]) -> int:
    """Bytes of the JSON header of an open safetensors file, from its first nine bytes; leaves the stream after eight.

    `CheckpointError` when they cannot be the start of one, and a sentence on what to do when they start a pickle.
    """
    start = stream.read(9)
    stream.seek(8)
    return length_in(start, os.fstat(stream.fileno()).st_size - 8, path)


def length_in(start: bytes, room: int, path: str | os.PathLike[str]) -> int:
    """The same, of the nine bytes themselves. room: bytes of the file after the first eight, or what they may be."""
    length = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and length <= min(HEADER_LIMIT, room):
        return length
    # A length of 640 bytes begins like a pickle, one of 19,280 like an archive: only what is no header is told apart.
    if start[:2] in PICKLES:
        raise CheckpointError(f"{path} is {_PICKLE_ADVICE}")
    if start[8:] == b"{" and room < length <= HEADER_LIMIT:
        raise CheckpointError(f"{path} is cut short in its header of {length:,} bytes; fetch it again")
    raise CheckpointError(
        f"{path} is not a safetensors file: it does not begin with a header's length and '{{'"
    )


def save_sharded(
    directory: Path,
    name: str,
    tensors: Mapping,
    metadata: Mapping[str, str] | None = None,
    limit: int = SHARD_BYTES,
) -> list[str]:
    """Write tensors as `name.safetensors`, or as `name-00001-of-00003.safetensors` … when they exceed `limit` bytes.

    Each file stays within `limit` unless a single tensor is larger. Returns the file names, in order.
    """
    shards: list[dict] = [{}]
    room = limit
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() + len(key) + 128
        if shards[-1] and size > room:
            shards.append({})
            room = limit
        shards[-1][key] = tensor
        room -= size
    names = (
        [f"{name}.safetensors"]
        if len(shards) == 1
        else [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        save_tensors(directory / file, shard, metadata)
    return names


def load_sharded(directory: Path, files: list[str], hashes: Mapping[str, str] | None = None) -> dict:
    """Read the named files of `directory` into one dict.

    Names that leave the folder, repeated keys and wrong hashes are refused.
    """
    tensors: dict = {}
    for file in files:
        path = shard_path(directory, file)
        if hashes and file in hashes:
            check_hash(path, hashes[file])
        shard = load_tensors(path)
        repeated = tensors.keys() & shard.keys()
        if repeated:
            raise CheckpointError(f"{path} repeats the tensor {sorted(repeated)[0]!r} of another shard")
        tensors.update(shard)
    return tensors


def shard_path(directory: Path, file: Any) -> Path:
    """Where the shard that an index names `file` lies; `CheckpointError` when that is not directly in `directory`."""
    plain = isinstance(file, str) and "\0" not in file and file not in {"", ".", ".."}
    if not plain or not PurePosixPath(file).name == PureWindowsPath(file).name == file:
        raise CheckpointError(f"{directory} names the shard {file!r}, which lies outside the folder")
    return directory / file


def file_hash(path: str | os.PathLike[str], told: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, as hex. `told` hears how many bytes each step has read, for a progress bar."""
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            if told:
                told(count)
    return digest.hexdigest()


def short_hash(path: str | os.PathLike[str]) -> str:
    """Eight digits by which communities know a large file at once ("AutoV1"), "" of a small one: of the SHA-256 of
    64 KiB that follow the first MiB (A1111, `model_hash`). Two files may have the same.
    """
    with open(path, "rb") as stream:
        stream.seek(2**20)
        part = stream.read(2**16)
    return hashlib.sha256(part).hexdigest()[:8] if part else ""


def data_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a safetensors file's bytes after its header, as hex: what other programs know the small files beside a
    checkpoint by, since notes in the header do not change it (sd-scripts, `addnet_hash_safetensors`; "AutoV3")."""
    with open_safetensors(path) as stream:
        stream.seek(header_length(stream, path), os.SEEK_CUR)
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
        return digest.hexdigest()


def check_hash(path: Path, wanted: str) -> None:
    """`CheckpointError` unless the file is there and has this SHA-256."""
    try:
        found = file_hash(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if found != wanted:
        raise CheckpointError(f"{path} does not match the hash given for it; fetch it again")


def tensors_hash(tensors: Mapping) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors in name order: equal exactly when the weights are."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
