"""A fresh ControlNet beside a frozen Stable Diffusion 3, as training wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sfumato.families.published import training
from sfumato.families.sd3.controls import read_picture
from sfumato.nn.mmdit_control import MMDiTControl
from sfumato.types import Conditioning

if TYPE_CHECKING:
    from sfumato.families.sd3.system import System


class ControlTrainee(training.ControlTrainee):
    """The network reads latents of control pictures, which are encoded once. blocks: of the transformer it copies."""

    encodes = True

    def __init__(self, system: System, blocks: int):
        transformer = training.frozen(system, "a ControlNet")
        super().__init__(system, transformer, MMDiTControl.of(transformer, blocks))

    def hint(self, pixels: Tensor) -> Tensor:
        """Control pictures (B, 3, H, W) in [0, 1] → their latents (B, 16, H/8, W/8)."""
        return read_picture(self.system, self.network.config, pixels, None)

    def adds(
        self, network: MMDiTControl, x: Tensor, time: Tensor, cond: Conditioning, hints: Tensor
    ) -> tuple[Tensor, ...]:
        """What it adds at a step."""
        return network(x[:, :, 0], time, cond.tokens, cond.vector, cond.mask, hint=hints)

    def answer(self, x: Tensor, time: Tensor, cond: Conditioning, control: tuple[Tensor, ...]) -> Tensor:
        """What the transformer answers with that."""
        told = (cond.tokens, cond.vector, cond.mask)
        return self.base(x[:, :, 0], time, *told, control=control)[:, :, None]
