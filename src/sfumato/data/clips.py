"""A person's own clips as a `Source` that moves: video files with captions, brought to one size and length."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from sfumato.data.buckets import fit
from sfumato.data.discover import check_caption
from sfumato.data.source import Problem, Size
from sfumato.errors import DataError, InputError, SfumatoError
from sfumato.video.read import read_clip

ENDINGS = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp")
HANDFUL = 5  # this many bad clips never stop a run
RULES = "clip 1"  # changes when the same bytes would become other pixels


class ClipFolder:
    """Clips of a folder, each with a caption in a .txt of the same name; one without a caption is set aside.

    size: side in pixels of the square that every frame is scaled to cover and cropped to. frames: of each clip; of a
    longer one the first, a shorter one is set aside. allow: the fraction that may be set aside (a handful always may)
    before it is a `DataError`.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: int, frames: int, *, multiple: int = 1, allow: float = 0.05
    ):
        self.path, self.size, self.frames = Path(path), size, frames
        if size % multiple:
            raise InputError(f"size {size} is not a multiple of {multiple}", argument="data.size")
        if not self.path.is_dir():
            raise DataError(f"there is no folder of clips {str(path)!r}", argument="path")
        self._files: list[Path] = []
        self._captions: list[str] = []
        self._digests: list[str] = []
        problems = []
        found = sorted(f for f in self.path.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
        for file in found:
            try:
                caption = self._checked(file)
            except SfumatoError as error:
                problems.append(Problem(str(file), str(error)))
                continue
            self._files.append(file)
            self._captions.append(caption)
            self._digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
        self.problems = tuple(problems)
        if len(problems) > max(HANDFUL, allow * len(found)) or not self._files:
            first = f"; the first, {problems[0]}" if problems else ""
            raise DataError(
                f"{path}: {len(problems)} of {len(found)} clips cannot be used{first}"
                if found
                else f"{path} holds no clips ({', '.join(ENDINGS)})",
                argument="path",
            )

    def __len__(self) -> int:
        return len(self._files)

    def buckets(self) -> dict[Size, list[int]]:
        return {(self.size, self.size): list(range(len(self)))}

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, T, H, W, 3)."""
        return np.stack([self._clip(self._files[i]) for i in indices])

    def caption(self, index: int, epoch: int = 0, frames: int | None = None) -> str:
        """The same for all of the clip and for its beginning."""
        return self._captions[index]

    def stills(self) -> list[int]:
        """All: a caption of a clip is one of its first frame."""
        return list(range(len(self)))

    def digest(self, index: int) -> str:
        return hashlib.sha256(
            f"{RULES} {self.size} {self.frames} {self._digests[index]}".encode()
        ).hexdigest()

    def name(self, index: int) -> str:
        return str(self._files[index])

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        """A folder knows nothing but captions."""
        return None

    def _checked(self, file: Path) -> str:
        """The caption of a clip that can be read and is long enough."""
        text = file.with_suffix(".txt")
        if not text.is_file():
            raise DataError(f"has no caption {text.name}")
        caption = check_caption(text.read_bytes(), text.name)
        self._clip(file)
        return caption

    def _clip(self, file: Path) -> np.ndarray:
        """(T, H, W, 3) uint8 of its first frames."""
        pictures = read_clip(file, frames=self.frames).frames
        if len(pictures) < self.frames:
            raise DataError(f"has {len(pictures)} frames; {self.frames} are needed")
        side = (self.size, self.size)
        return np.stack([np.asarray(fit(p.convert("RGB"), side)) for p in pictures])
