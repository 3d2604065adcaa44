"""An autoencoder as an optical instrument: a picture goes in and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.floating]  # (H, W, 3), display values in [0, 1]
BATCH_PIXELS = 2**18  # of pictures that go through together
TILE, MARGIN = 1024, 128  # pixels; larger pictures go in tiles, whose margins are thrown away


@dataclass(frozen=True)
class Instrument:
    """name: as the user calls the model. factor: pixels per side of a latent cell. channels: of a cell.

    through: pixels (B, 3, H, W) in [-1, 1] → the same shape; H and W are multiples of `factor`. digest: SHA-256 of the
    weights. precision: what they are computed in. folder: of the model, where a chart may lie beside it. whole: takes
    large pictures in bounded memory by itself.
    """

    name: str
    factor: int
    channels: int
    through: Callable[[Tensor], Tensor]
    digest: str
    device: torch.device
    precision: str = "float32"
    folder: Path | None = None
    whole: bool = False

    @torch.inference_mode()
    def picture(self, picture: Picture) -> Picture:
        """One picture (H, W, 3) of any size through the instrument: what does not fill a cell is filled with the edge
        and cut off again. Values in [0, 1]."""
        height, width = picture.shape[:2]
        x = _pixels([picture]).to(self.device)
        x = F.pad(x, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        y = self.through(x) if self.whole or max(x.shape[-2:]) <= TILE else self._tiled(x)
        return _pictures(y)[0][:height, :width]

    @torch.inference_mode()
    def pictures(
        self, pictures: list[Picture], on_progress: Callable[[int], None] | None = None
    ) -> list[Picture]:
        """Pictures of one size, whose sides are multiples of the factor, through the instrument in small batches.

        on_progress hears how many are done."""
        size = max(1, BATCH_PIXELS // (pictures[0].shape[0] * pictures[0].shape[1])) if pictures else 1
        done: list[Picture] = []
        for start in range(0, len(pictures), size):
            done += _pictures(self.through(_pixels(pictures[start : start + size]).to(self.device)))
            if on_progress is not None:
                on_progress(len(done))
        return done

    def _tiled(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for top, bottom, above, below in _spans(x.shape[-2]):
            for left, right, before, behind in _spans(x.shape[-1]):
                part = self.through(x[..., above:below, before:behind])
                y[..., top:bottom, left:right] = part[
                    ..., top - above : bottom - above, left - before : right - before
                ]
        return y


def open_instrument(
    model: str | Path,
    device: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    vae: str | Path | None = None,
) -> Instrument:
    """The autoencoder of a model, or one alone, in the precision that pictures are drawn in unless said otherwise.

    Errors of `families.autoencoders.open_autoencoder`. Nothing else of the model is opened.
    """
    from sfumato.families.autoencoders import open_autoencoder
    from sfumato.runtime import drawing_dtype, pick_device

    place = pick_device(device)
    found = open_autoencoder(model, place, dtype or drawing_dtype(place), vae=vae)

    def through(x: Tensor) -> Tensor:
        return found.roundtrip(x[:, :, None])[:, :, 0]

    name = str(model) if vae is None else f"{model} with {vae}"
    return Instrument(
        name,
        found.factor,
        found.channels,
        through,
        found.digest,
        place,
        str(found.dtype).removeprefix("torch."),
        found.folder,
        found.whole,
    )


def _spans(length: int) -> Iterator[tuple[int, int, int, int]]:
    """(start, end) of tiles, and (start, end) of what is computed for each; all multiples of 32."""
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        yield start, end, max(start - MARGIN, 0), min(end + MARGIN, length)


def _pixels(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2) * 2 - 1


def _pictures(x: Tensor) -> list[Picture]:
    values = ((x.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    return list(values)
