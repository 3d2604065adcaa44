"""What a ControlNet learns from: captioned pictures with a control picture each, of scenes or of two folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato.data.buckets import fit as cover
from sfumato.data.folder import FolderSource
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Size
from sfumato.errors import DataError, InputError
from sfumato.pictures import BLACK, decode, read_file

BATCH = 32  # scenes rendered at a time
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class Scenes:
    """Scenes of one world, each rendered once, with a control picture of `kind` that is exact."""

    def __init__(self, source: SceneSource, kind: str, on_progress: Callable[[int, int], None]):
        from sfumato.scenes import render
        from sfumato.scenes.controls import control_pictures

        self.source = source
        pictures, controls = [], []
        with torch.no_grad():
            for start in range(0, len(source), BATCH):
                indices = range(start, min(start + BATCH, len(source)))
                made = render([source.scene(i) for i in indices], size=source.size)
                pictures.append(made.rgb[:, :, 0].mul(255).round().to(torch.uint8))
                controls.append(control_pictures(made, kind))
                on_progress(indices.stop, len(source))
        self._pictures, self._controls = torch.cat(pictures), torch.cat(controls)

    def buckets(self) -> dict[Size, list[int]]:
        return self.source.buckets()

    def caption(self, index: int, epoch: int) -> str:
        return self.source.caption(index, epoch)

    def both(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures and control pictures, both (B, 3, H, W) uint8."""
        return self._pictures[list(indices)], self._controls[list(indices)]


class Folder:
    """Captioned pictures of a folder; in another, control pictures with the same names, cropped in the same way."""

    def __init__(self, source: FolderSource, controls: Path):
        self.source = source
        if not controls.is_dir():
            raise InputError(
                f"there is no folder of control pictures {str(controls)!r}; name one as control.pictures",
                argument="control.pictures",
            )
        self._files: list[Path] = []
        for index in range(len(source)):
            stem = Path(source.name(index)).stem
            found = next(
                (controls / f"{stem}{end}" for end in ENDINGS if (controls / f"{stem}{end}").is_file()), None
            )
            if found is None:
                raise DataError(f"{controls} holds no control picture {stem}.png for {source.name(index)}")
            self._files.append(found)

    def buckets(self) -> dict[Size, list[int]]:
        return self.source.buckets()

    def caption(self, index: int, epoch: int) -> str:
        return self.source.caption(index, epoch)

    def both(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures and control pictures, both (B, 3, H, W) uint8, of one bucket."""
        pictures = torch.from_numpy(np.ascontiguousarray(self.source.pixels(indices))).permute(0, 3, 1, 2)
        size = (pictures.shape[-2], pictures.shape[-1])
        controls = []
        for index in indices:
            file = self._files[index]
            picture = cover(decode(read_file(file, "control"), str(file), BLACK), size)
            controls.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        return pictures, torch.stack(controls)


Pairs = Scenes | Folder
