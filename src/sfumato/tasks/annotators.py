"""Depth and poses of plain pictures for ControlNets, by networks that the user has.

A network is a folder as transformers writes one, with safetensors: DPT or Depth Anything for depth, VitPose for poses.
It is transformers' work, imported when a picture is made; nothing that a folder names is run. It is opened for a
picture and let go after it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.checkpoint.header import UNUSABLE, shown
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.layout import find_parts, read_plain
from sfumato.checkpoint.source import open_folder
from sfumato.errors import CheckpointError
from sfumato.memory import tracing
from sfumato.storage import tensors_hash
from sfumato.tasks.poses import pose_picture

STEM = "model"
HALF, CLIP_MEAN, CLIP_STD = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FARTHEST = 1e-6  # of a metric depth, below which it counts as this


@dataclass(frozen=True)
class Entrance:
    """How a network is shown a picture. sides: (height, width). whole: they keep their proportion. multiple: of what
    they are. resample: PIL's number. mean, std: of channels in [0, 1].
    """

    sides: tuple[int, int]
    whole: bool = False
    multiple: int = 1
    resample: int = 3
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which a picture of that size is brought: as transformers' DPTImageProcessor has it."""
        ways = self.sides[0] / height, self.sides[1] / width
        if self.whole:  # by the factor that changes the picture least
            ways = (min(ways, key=lambda way: abs(1 - way)),) * 2
        high, wide = (
            max(round(side * way / self.multiple), 1) * self.multiple
            for side, way in zip((height, width), ways, strict=True)
        )
        return wide, high

    def pixels(self, picture: Image.Image) -> Tensor:
        """(1, 3, h, w), normalised."""
        made = picture.convert("RGB").resize(self.size(*picture.size), Image.Resampling(self.resample))
        values = torch.from_numpy(np.array(made)).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.mean, self.std))
        return (values - mean) / std


ENTRANCES = {
    "dpt": Entrance((384, 384)),
    "depth_anything": Entrance((518, 518), True, 14, 3, CLIP_MEAN, CLIP_STD),
    "vitpose": Entrance((256, 192), False, 1, 2, CLIP_MEAN, CLIP_STD),
}
CLASSES = {  # model_type to transformers' class
    "dpt": "DPTForDepthEstimation",
    "depth_anything": "DepthAnythingForDepthEstimation",
    "vitpose": "VitPoseForPoseEstimation",
}


@dataclass(frozen=True)
class Annotator:
    """A network that makes control pictures of plain ones: call it with a picture. Threads may share it.

    digest: SHA-256 of its tensors. kind: model_type of its config.json.
    """

    folder: Path
    kind: str
    digest: str
    config: Mapping[str, Any] = field(repr=False)
    entrance: Entrance = field(repr=False)
    _made: dict[str, Image.Image] = field(default_factory=dict, init=False, repr=False, compare=False)
    _needs: dict[tuple[int, int], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """RGB of the picture's size. Depth is bright where near; a pose is drawn in OpenPose's colours on black."""
        picture = picture.convert("RGB")
        key = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        if key not in self._made:
            made = self._drawn(picture)
            self._made.clear()  # the last one is kept: passes of one drawing ask for it again
            self._made[key] = made
        return self._made[key].copy()

    def memory(self, size: tuple[int, int]) -> int:
        """Bytes that it takes on the CPU for a picture of that (width, height), its weights among them: told by running
        it on tensors without numbers.
        """
        import transformers

        width, height = self.entrance.size(*size)
        if (width, height) not in self._needs:
            values = {name: value for name, value in self.config.items() if name != "model_type"}
            config = transformers.AutoConfig.for_model(self.kind, **values)
            with tracing({}) as tracer:
                network = getattr(transformers, CLASSES[self.kind])(config).eval()
                weights, pixels = tracer.now, torch.empty(1, 3, height, width)
                _, beside = tracer.worst(lambda: network(pixels, **self._more()))
            self._needs[width, height] = weights + beside
        return self._needs[width, height]

    def _more(self) -> dict[str, Tensor]:
        """What the network is told beside the picture."""
        several = (self.config.get("backbone_config") or {}).get("num_experts", 1) > 1
        return {"dataset_index": torch.zeros(1, dtype=torch.long)} if several else {}  # of COCO's people

    @torch.inference_mode()
    def _drawn(self, picture: Image.Image) -> Image.Image:
        network, pixels = self._network(), self.entrance.pixels(picture)
        if self.kind == "vitpose":
            return pose_picture(network(pixels, **self._more()).heatmaps[0], picture.size)
        metric = self.config.get("depth_estimation_type") == "metric"
        return depth_picture(network(pixels).predicted_depth, picture.size, metric)

    def _network(self) -> Any:
        import transformers

        made, said = getattr(transformers, CLASSES[self.kind]).from_pretrained(
            self.folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        for what in ("missing_keys", "mismatched_keys"):
            if names := sorted(map(str, said[what])):
                raise CheckpointError(
                    f"{self.folder}: {len(names)} tensors of {CLASSES[self.kind]} are not there or of another shape: "
                    f"{', '.join(map(shown, names[:5]))}"
                )
        return made.eval()


def open_annotator(place: str | os.PathLike[str]) -> Annotator:
    """The network in a folder, looked at and not yet read into memory.

    `CheckpointError` when it is no folder of one, is of a kind that is not known here, holds pickles alone, asks for
    code or for another network, or has numbers that are none.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise CheckpointError(f"{place} is no folder of a network with config.json and model.safetensors")
    part = find_parts(folder).parts.get("model")
    kind = "" if part is None else str(part.config.get("model_type", ""))
    if part is None or kind not in CLASSES:
        known = "DPT and Depth Anything for depth, VitPose for poses"
        told = f"holds a {kind}, which makes no" if kind else "holds no network that makes"
        raise CheckpointError(f"{folder} {told} control pictures here; known are {known}")
    if part.config.get("backbone") or part.config.get("use_pretrained_backbone"):
        raise CheckpointError(
            f"{folder} names a backbone to be fetched from elsewhere; give a folder that holds all weights"
        )
    weights = open_folder(folder, STEM)
    for name in weights:
        tensor = weights[name]
        if tensor.is_floating_point() and not finite(tensor):
            raise CheckpointError(f"{folder}: {shown(name)} {UNUSABLE}")
    return Annotator(folder, kind, tensors_hash(weights), part.config, _entrance(folder, kind, part.config))


def depth_picture(depth: Tensor, size: tuple[int, int], metric: bool = False) -> Image.Image:
    """(1, h, w) to RGB of that (width, height): the least black and the greatest white, as DPT's users have it.

    metric: larger is farther, in which case its inverse is drawn, so that near is bright as ControlNets know it.
    """
    if metric:
        depth = 1 / depth.clamp(min=FARTHEST)
    width, height = size
    wide = torch.nn.functional.interpolate(depth[None].float(), (height, width), mode="bicubic")[0, 0]
    low, high = wide.aminmax()
    grey = (wide - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny) * 255
    return Image.fromarray(grey.to(torch.uint8).numpy()).convert("RGB")


def _entrance(folder: Path, kind: str, config: Mapping[str, Any]) -> Entrance:
    """What the folder's preprocessor_config.json says, over what its kind is known by."""
    usual = ENTRANCES[kind]
    if kind == "vitpose":
        sides = (config.get("backbone_config") or {}).get("image_size", usual.sides)
        usual = Entrance(tuple(sides), False, 1, 2, CLIP_MEAN, CLIP_STD)
    elif kind == "dpt" and isinstance(side := config.get("image_size"), int):
        usual = Entrance((side, side))
    file = folder / "preprocessor_config.json"
    said: Mapping[str, Any] = read_plain(file) if file.is_file() else {}
    try:
        size: Any = said.get("size", {})
        size = {"height": size, "width": size} if isinstance(size, int) else size
        sides = int(size.get("height", usual.sides[0])), int(size.get("width", usual.sides[1]))
        made = Entrance(
            usual.sides if kind == "vitpose" else sides,
            bool(said.get("keep_aspect_ratio", usual.whole)),
            int(said.get("ensure_multiple_of", usual.multiple)),
            int(said.get("resample", usual.resample)),
            tuple(map(float, said.get("image_mean", usual.mean))),
            tuple(map(float, said.get("image_std", usual.std))),
        )
        Image.Resampling(made.resample)
        if (
            len(made.mean) != 3
            or len(made.std) != 3
            or not all(made.std)
            or min(*made.sides, made.multiple) < 1
        ):
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{file} says nothing usable of size, mean, std and resample") from None
    return made
