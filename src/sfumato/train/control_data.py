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
from sfumato.errors import DataError
from sfumato.pictures import BLACK, decode, read_file, upright_size

BATCH = 32  # scenes rendered at a time
STRETCH = 1.1  # by which a control picture may be of another shape: annotators round sides to multiples of 64
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
    """Captioned pictures of a folder; in another, control pictures with the same names, cropped in the same way.

    They lie in the same folders there, or all in one where no two names are alike. `DataError` for one that is missing,
    unsound or of another shape.
    """

    def __init__(self, source: FolderSource, controls: Path):
        self.source = source
        self._files: list[Path] = []
        whose: dict[Path, str] = {}
        for index in range(len(source)):
            name = Path(source.name(index)).with_suffix("")
            likely = (controls / f"{stem}{end}" for stem in (name, name.name) for end in ENDINGS)
            if (found := next((file for file in likely if file.is_file()), None)) is None:
                raise DataError(f"{controls} holds no control picture {name}.png for {source.name(index)}")
            if (other := whose.setdefault(found, source.name(index))) != source.name(index):
                raise DataError(
                    f"{found} would be the control picture of {other} and of {source.name(index)}; put control "
                    "pictures into folders as the pictures are"
                )
            self._files.append(found)
        for file, index in {file: index for index, file in enumerate(self._files)}.items():  # each once
            self._check_shape(file, index)

    def _check_shape(self, file: Path, index: int) -> None:
        across, down = upright_size(read_file(file, "control"), str(file))
        height, width = self.source.extent(index)
        if not 1 / STRETCH < (across * height) / (down * width) < STRETCH:
            raise DataError(
                f"{file} is {across}x{down} and its picture {self.source.name(index)} {width}x{height}; the same "
                "shape is right"
            )

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
            control = decode(read_file(file, "control"), str(file), BLACK)
            controls.append(torch.from_numpy(np.array(cover(control, size))).permute(2, 0, 1))
        return pictures, torch.stack(controls)


Pairs = Scenes | Folder
