"""Pictures, clips and LoRAs on disk, by names that nobody can guess. Who may see one, the ledger knows."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sfumato.errors import InputError
from sfumato.storage import atomic_directory, atomic_file

SUFFIX = {"png": "png", "jpeg": "jpg", "webp": "webp", "mp4": "mp4", "webm": "webm", "gif": "gif"}
MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}  # of pictures that are drawn
CLIPS = {"mp4": "video/mp4", "webm": "video/webm", "webp": "image/webp", "gif": "image/gif"}
LORA = "lora"  # the format of a LoRA, a .safetensors file
UPLOADS = {**MEDIA, **CLIPS, "avi": "video/x-msvideo", LORA: "application/octet-stream"}
_ID = re.compile(r"(job|file)_[0-9a-f]{32}")


def new_id(kind: str) -> str:
    """A fresh id, `job_…` or `file_…`, of 128 random bits."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_id(text: object, kind: str) -> bool:
    """Whether this is an id of that kind: all that may become part of a path."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None and text.startswith(kind)


class Store:
    """A folder with `uploads/`, `outputs/` and, of these, `thumbs/`, each file written whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            for part in (self._uploads, self._outputs, self._thumbs):
                part.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
        except OSError as error:
            raise InputError(
                f"the folder {str(folder)!r} cannot be used: {error.strerror}", argument="data"
            ) from None

    @property
    def _uploads(self) -> Path:
        return self.folder / "uploads"

    @property
    def _outputs(self) -> Path:
        return self.folder / "outputs"

    @property
    def _thumbs(self) -> Path:
        return self.folder / "thumbs"

    def put(self, upload: str, data: bytes) -> None:
        """Keep an upload. `OSError` when the disk refuses."""
        with atomic_file(self._checked(self._uploads, upload, "file")) as temporary:
            temporary.write_bytes(data)

    @contextmanager
    def arriving(self, upload: str) -> Iterator[Path]:
        """Where to write an upload, which is kept when this is left, and gone where that is by an exception."""
        with atomic_file(self._checked(self._uploads, upload, "file")) as temporary:
            yield temporary

    def upload(self, upload: str) -> Path | None:
        """Where an upload lies; None if it is not there any more."""
        path = self._checked(self._uploads, upload, "file").absolute()
        return path if path.is_file() else None

    def get(self, upload: str) -> bytes | None:
        """An upload; None if it is not there any more."""
        try:
            return self._checked(self._uploads, upload, "file").read_bytes()
        except FileNotFoundError:
            return None

    def drop(self, upload: str) -> None:
        self._checked(self._uploads, upload, "file").unlink(missing_ok=True)

    def put_outputs(self, job: str, pictures: Sequence[bytes]) -> None:
        """Keep a job's pictures, all or none, in place of what an earlier try of it may have left."""
        with atomic_directory(self._checked(self._outputs, job, "job")) as staging:
            for number, data in enumerate(pictures):
                (staging / str(number)).write_bytes(data)

    def output(self, job: str, number: int) -> Path | None:
        """Where a job's picture lies; None if it is not there any more."""
        path = self._checked(self._outputs, job, "job") / str(int(number))
        return path if path.is_file() else None

    def thumb(self, job: str, number: int, make: Callable[[bytes], bytes]) -> Path | None:
        """A small picture of an output, made when it is first asked for; None if the output is not there any more.

        What `make` raises, and `OSError` when the disk refuses.
        """
        path = self._checked(self._thumbs, job, "job") / str(int(number))
        if path.is_file():
            return path
        output = self.output(job, number)
        if output is None:
            return None
        small = make(output.read_bytes())
        with atomic_file(path) as temporary:
            temporary.write_bytes(small)
        return path

    def sweep(self, seconds: float, needed: Collection[str] = ()) -> int:
        """Remove files older than that, but uploads that are needed, and what an interrupted write left; returns how
        many."""
        before, swept = time.time() - seconds, 0
        for path in (*self._outputs.iterdir(), *self._thumbs.iterdir(), *self._uploads.iterdir()):
            staged = path.name.startswith(".")
            if path.name not in needed and path.stat().st_mtime < (time.time() - 3600 if staged else before):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                swept += 1
        return swept

    @staticmethod
    def _checked(folder: Path, name: str, kind: str) -> Path:
        if not is_id(name, kind):
            raise InputError(f"{name[:40]!r} is no id of a {kind}", argument="id")
        return folder / name
