"""What is asked of every arm at every point: pictures of captions of unseen scenes, read and compared.

The same captions serve for both measures. The strict score says how often the picture shows exactly what its caption
states; the kernel distance how far the pictures as a whole lie from renders of other unseen scenes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.metrics import psnr, ssim
from sfumato.evaluate import statistics as stats
from sfumato.evaluate.ceiling import CHECK_SEED, pictures
from sfumato.evaluate.detect_network import load_detector
from sfumato.evaluate.report import Draws, draw, summarise
from sfumato.evaluate.tasks import Task
from sfumato.scenes import describe, sample_scene

BATCH = 32
STRIDE = 2  # every other scene is described, the others are what pictures are compared with


class Judge:
    """`count` unseen scenes described, and as many others. objects: fewest and most of them in a scene."""

    def __init__(self, count: int, size: int, objects: tuple[int, int]):
        scenes = [sample_scene(CHECK_SEED + i, split="val", objects=objects) for i in range(STRIDE * count)]
        self.tasks = [Task(*describe(s, i, "full")) for i, s in enumerate(scenes[::STRIDE])]
        self.renders = pictures(scenes[::STRIDE], size)
        self.detector = load_detector()
        self.reference = self.detector.features(pictures(scenes[1::STRIDE], size))

    def drawn(self, model: Draws, steps: int | None) -> dict[str, Any]:
        """The measures of what a model draws of the captions."""
        return self._read(draw(model, "study", self.tasks, 0, steps, None))

    def rendered(self) -> dict[str, Any]:
        """Those of the scenes themselves: the most that can be reached at this size."""
        return self._read(self.renders)

    @torch.no_grad()
    def rebuilt(self, autoencoder: Autoencoder) -> dict[str, Any]:
        """Those of the scenes after encoding and decoding, and PSNR (dB) and SSIM: an arm's ceiling."""
        device = next((p.device for p in autoencoder.parameters()), torch.device("cpu"))
        parts = [
            autoencoder.decode(autoencoder.encode(part[:, :, None].to(device)).mode())
            .float()
            .cpu()
            .clamp(-1, 1)
            for part in self.renders.split(BATCH)
        ]
        rebuilt, real = torch.cat(parts), self.renders[:, :, None]
        closeness = {"psnr": float(psnr(rebuilt, real).mean()), "ssim": float(ssim(rebuilt, real).mean())}
        return closeness | self._read(rebuilt[:, :, 0])

    def _read(self, shown: Tensor) -> dict[str, Any]:
        scores = summarise(self.detector.detect(shown), self.tasks)
        distance, _ = stats.kernel_distance(
            self.detector.features(shown), self.reference, subsets=1, size=len(shown)
        )
        shares = {name: interval.mean for name, interval in scores.items()}
        strict = scores["strict"]
        return {**shares, "strict_interval": [strict.low, strict.high], "kernel_distance": distance}
