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
from collections.abc import Iterator, Mapping
from pathlib import Path

from sfumato.errors import CheckpointError

SHARD_BYTES = 16 * 2**20
HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own bound on a header


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


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as readable JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict:
    """Read a JSON object; a missing or broken file is a `CheckpointError` that names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
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

    check_safetensors(path)
    try:
        return load_file(path, device=device)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def check_safetensors(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a safetensors file before any parser sees it, and say how to convert a pickled one."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix in {".ckpt", ".bin", ".pt", ".pth"} or start[:2] in {b"PK", b"\x80\x02", b"\x80\x04"}:
        raise CheckpointError(
            f"{path} is a pickled checkpoint, which can run code when opened; "
            "convert it to safetensors on a machine you can lose"
        )
    length = int.from_bytes(start, "little") if len(start) == 8 else -1
    if not 0 < length <= min(HEADER_LIMIT, path.stat().st_size - 8):
        raise CheckpointError(
            f"{path} is not a safetensors file: its header length ({length} bytes) cannot be right"
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
        if not isinstance(file, str) or file in {"", ".", ".."} or Path(file).name != file:
            raise CheckpointError(f"{directory} names the shard {file!r}, which lies outside the folder")
        if hashes and file in hashes and file_hash(directory / file) != hashes[file]:
            raise CheckpointError(
                f"{directory / file} does not match the hash its index gives; fetch it again"
            )
        shard = load_tensors(directory / file)
        repeated = tensors.keys() & shard.keys()
        if repeated:
            raise CheckpointError(
                f"{directory / file} repeats the tensor {sorted(repeated)[0]!r} of another shard"
            )
        tensors.update(shard)
    return tensors


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_hash(tensors: Mapping) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors in name order: equal exactly when the weights are."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
