"""Clips of scenes four ways: as they are, in a mirror, and both run backwards.

A mirror image is another picture, and is encoded for itself; a clip run backwards has the same frames. So the frames
are one source, and the clips that are made of them another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from sfumato.data.scenes import SceneSource
from sfumato.data.source import Size
from sfumato.data.store import address
from sfumato.scenes import Scene, split_of
from sfumato.scenes.turned import backwards, mirrored


class MirroredFrames:
    """Frames of the clips of `scenes`: 2k is clip k as it is, and 2k + 1 its mirror image."""

    def __init__(self, scenes: SceneSource):
        self.scenes, self.frames = scenes, scenes.frames

    def __len__(self) -> int:
        return 2 * len(self.scenes)

    def buckets(self) -> dict[Size, list[int]]:
        return {(self.scenes.size, self.scenes.size): list(range(len(self)))}

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, T, H, W, 3); a clip that is asked for both ways is rendered once."""
        wanted = sorted({index // 2 for index in indices})
        rows = dict(zip(wanted, self.scenes.pixels(wanted), strict=True))
        return np.stack([rows[i // 2][:, :, ::-1] if i % 2 else rows[i // 2] for i in indices])

    def caption(self, index: int, epoch: int = 0, frames: int | None = None) -> str:
        return self.scenes.words_for(self.scene(index), frames, index, epoch)[0]

    def scene(self, index: int) -> Scene:
        scene: Scene = self.scenes.scene(index // 2)
        return mirrored(scene) if index % 2 else scene

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        return None

    def digest(self, index: int) -> str:
        own = self.scenes.digest(index // 2)
        return address({"mirrored": own}) if index % 2 else own

    def name(self, index: int) -> str:
        return self.scenes.name(index // 2) + (", mirrored" if index % 2 else "")


class TurnedClips:
    """Clips of `MirroredFrames`, those run backwards among them, but for what is of another split when turned so.

    rows[k]: the index among the frames, and whether clip k runs backwards.
    """

    def __init__(self, base: MirroredFrames):
        self.base, self.frames = base, base.frames
        ways = [(index, back) for index in range(len(base)) for back in (False, True)]
        self.rows = [way for way in ways if split_of(self._turned(*way)) == base.scenes.split]

    def __len__(self) -> int:
        return len(self.rows)

    def scene(self, index: int) -> Scene:
        """The scene that clip `index` shows, from its own first frame on."""
        return self._turned(*self.rows[index])

    def caption(self, index: int, epoch: int = 0, frames: int | None = None) -> str:
        """frames: of its first ones alone."""
        return self.base.scenes.words_for(self.scene(index), frames, "turned", index, epoch)[0]

    def buckets(self) -> dict[Size, list[int]]:
        size = self.base.scenes.size
        return {(size, size): list(range(len(self)))}

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, T, H, W, 3)."""
        rows = self.base.pixels([self.rows[k][0] for k in indices])
        return np.stack([row[::-1] if self.rows[k][1] else row for k, row in zip(indices, rows, strict=True)])

    def labels(self, indices: Sequence[int], factor: int) -> Tensor | None:
        return None

    def digest(self, index: int) -> str:
        at, back = self.rows[index]
        own = self.base.digest(at)
        return address({"backwards": own}) if back else own

    def name(self, index: int) -> str:
        at, back = self.rows[index]
        return self.base.name(at) + (", backwards" if back else "")

    def stills(self) -> list[int]:
        """Clips whose first frame, as a picture, is of the same split."""
        split = self.base.scenes.split
        return [k for k in range(len(self)) if split_of(replace(self.scene(k), frames=1)) == split]

    def _turned(self, index: int, back: bool) -> Scene:
        scene = self.base.scene(index)
        return backwards(scene) if back else scene
