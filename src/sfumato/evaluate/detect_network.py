"""The learned detector: a small fully convolutional network that marks objects, their centres and their attributes.

At every cell of a quarter-resolution grid it says whether an object is there, whether it is an object's centre
(a heat map whose peaks are the detections; CenterNet, Zhou et al. 2019), how far the centre of its own object
lies, where that object stands on the floor, and the object's four attributes. Cells vote: each object's
attributes are the mean of the answers of all cells that point to its peak, so a few blurred cells do not decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import CheckpointError
from sfumato.evaluate.detect import SIDE, Detection, check_pixels
from sfumato.scenes.graph import COLORS, MATERIALS, SHAPES, SIZES
from sfumato.storage import load_tensors

STRIDE = 4
GRID = SIDE // STRIDE
WORDS = {"shape": SHAPES, "color": COLORS, "material": MATERIALS, "size": SIZES}
HEADS = {
    "object": 1,
    "heat": 1,
    "offset": 2,
    "floor": 2,
    **{name: len(words) for name, words in WORDS.items()},
}
REACH = 8.0  # cells per unit of the offset head
SPAN = 3.0  # world units per unit of the floor head
UNUSED = "num_batches_tracked"  # the one kind of buffer that is not stored
MAX_OBJECTS = 10  # detections per picture; scenes hold at most five


@dataclass(frozen=True)
class DetectorConfig:
    """widths: channels at strides 4, 8 and 16; threshold: heat a peak needs to be an object."""

    widths: tuple[int, int, int] = (48, 80, 112)
    threshold: float = 0.35


class Block(nn.Module):
    """Two 3×3 convolutions with batch normalisation and a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def _down(inside: int, outside: int, stride: int = 2) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


class DetectorNetwork(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] to a dict of maps (B, C, 32, 32), and picture features (B, D)."""

    def __init__(self, config: DetectorConfig = DetectorConfig()):
        super().__init__()
        self.config = config
        w4, w8, w16 = config.widths
        self.stage4 = nn.Sequential(
            _down(48, w4, stride=1), Block(w4), Block(w4)
        )  # 4×4 pixels are 48 channels
        self.stage8 = nn.Sequential(_down(w4, w8), Block(w8), Block(w8))
        self.stage16 = nn.Sequential(_down(w8, w16), Block(w16))
        self.context = nn.Linear(w16, w16)  # the whole picture, told to every cell
        self.lateral8 = nn.Conv2d(w16, w8, 1)
        self.lateral4 = nn.Conv2d(w8, w4, 1)
        self.mix = _down(w4, 64, stride=1)
        self.heads = nn.Conv2d(64, sum(HEADS.values()), 1)
        nn.init.zeros_(self.heads.bias)
        with torch.no_grad():
            self.heads.bias[1] = -3.0  # few cells are centres
        self.register_buffer("feature_mean", torch.zeros(64 + w8 + w16))
        self.register_buffer("feature_std", torch.ones(64 + w8 + w16))

    def trunk(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x4 = self.stage4(F.pixel_unshuffle(pixels, STRIDE))  # (B, w4, 32, 32)
        x8 = self.stage8(x4)  # (B, w8, 16, 16)
        x16 = self.stage16(x8)  # (B, w16, 8, 8)
        x16 = x16 + self.context(x16.mean((2, 3)))[:, :, None, None]
        x8 = F.relu(x8 + F.interpolate(self.lateral8(x16), scale_factor=2.0, mode="bilinear"))
        x4 = F.relu(x4 + F.interpolate(self.lateral4(x8), scale_factor=2.0, mode="bilinear"))
        x = self.mix(x4)  # (B, 64, 32, 32)
        return x, torch.cat([level.float().mean((2, 3)) for level in (x, x8, x16)], dim=1)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps = self.heads(self.trunk(pixels)[0]).float()
        return dict(zip(HEADS, maps.split(list(HEADS.values()), dim=1), strict=True))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, D), each dimension with mean 0 and variance 1 over real scenes."""
        return (self.trunk(pixels)[1] - self.feature_mean) / self.feature_std


class NetworkDetector:
    """The trained network as a `Detector`."""

    name = "network"

    def __init__(self, network: DetectorNetwork, device: torch.device | str = "cpu", batch: int = 32):
        self.network = network.to(device).eval()
        self.device, self.batch = torch.device(device), batch

    @torch.no_grad()
    def detect(self, pixels: Tensor) -> list[list[Detection]]:
        found: list[list[Detection]] = []
        for part in fit(check_pixels(pixels)).split(self.batch):
            maps = self.network(part.to(self.device))
            found += decode({k: v.cpu() for k, v in maps.items()}, self.network.config.threshold)
        return found

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """(B, D) float32 on the CPU: what the distribution distances compare."""
        parts = fit(check_pixels(pixels)).split(self.batch)
        return torch.cat([self.network.features(part.to(self.device)).cpu() for part in parts])


def fit(pixels: Tensor) -> Tensor:
    """Resize (B, 3, H, W) to the side the detectors read; enlarging is bicubic, shrinking averages areas."""
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels
    larger = pixels.shape[-1] > SIDE
    return F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=larger).clamp(-1, 1)


def decode(maps: dict[str, Tensor], threshold: float) -> list[list[Detection]]:
    """Peaks of the heat map, each with the votes of the cells that point to it."""
    heat = maps["heat"].sigmoid()
    peaks = (heat == F.max_pool2d(heat, 3, stride=1, padding=1)) & (heat > threshold)
    inside = maps["object"].sigmoid()[:, 0]  # (B, 32, 32)
    ys, xs = torch.meshgrid(torch.arange(GRID) + 0.5, torch.arange(GRID) + 0.5, indexing="ij")
    target = torch.stack([xs, ys]) + maps["offset"] * REACH  # (B, 2, 32, 32) where each cell sees its centre
    answers = torch.cat([maps[name].log_softmax(1) for name in WORDS], dim=1)
    found = []
    for b in range(len(heat)):
        rows, columns = peaks[b, 0].nonzero(as_tuple=True)
        order = heat[b, 0, rows, columns].argsort(descending=True)[:MAX_OBJECTS]
        rows, columns = rows[order], columns[order]
        centres = torch.stack([columns, rows], dim=1) + 0.5  # (K, 2)
        detections = []
        if len(rows):
            gap = (target[b].flatten(1).T[:, None] - centres).square().sum(2)  # (cells, K)
            owner = gap.argmin(1).masked_fill((inside[b].flatten() < 0.5) | (gap.amin(1) > 9.0), -1)
            owner[rows * GRID + columns] = torch.arange(len(rows))  # a peak votes for itself
            for k in range(len(rows)):
                cells = (owner == k).nonzero()[:, 0]
                detections.append(_read(maps, answers, b, cells, float(heat[b, 0, rows[k], columns[k]])))
        found.append(detections)
    return found


def _read(maps: dict[str, Tensor], answers: Tensor, b: int, cells: Tensor, confidence: float) -> Detection:
    rows, columns = cells // GRID, cells % GRID
    votes = answers[b].flatten(1)[:, cells].mean(1).split([len(words) for words in WORDS.values()])
    words = {name: choices[int(v.argmax())] for (name, choices), v in zip(WORDS.items(), votes, strict=True)}
    right, away = (maps["floor"][b].flatten(1)[:, cells].mean(1) * SPAN).tolist()
    x, y = (float(i.float().mean() + 0.5) / GRID for i in (columns, rows))
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    edges = (box[0] / GRID, box[1] / GRID, box[2] / GRID, box[3] / GRID)
    return Detection(**words, x=x, y=y, right=right, away=away, box=edges, confidence=confidence)


def weights_folder() -> Path:
    return Path(str(files("sfumato.evaluate") / "weights"))


def load_detector(device: torch.device | str = "cpu", folder: Path | None = None) -> NetworkDetector:
    """The detector that ships in the package, or one trained into `folder`."""
    path = (folder or weights_folder()) / "detector.safetensors"
    network = DetectorNetwork()
    tensors = {name: tensor.float() for name, tensor in load_tensors(path).items()}
    wanted = {
        name: tensor.shape for name, tensor in network.state_dict().items() if not name.endswith(UNUSED)
    }
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        odd = sorted(wanted.keys() ^ tensors.keys()) or sorted(
            n for n in wanted if tensors[n].shape != wanted[n]
        )
        raise CheckpointError(f"{path} does not fit the detector; the first difference is at {odd[0]!r}")
    network.load_state_dict(tensors, strict=False)
    return NetworkDetector(network, device)
