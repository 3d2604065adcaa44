"""What memory a preflight of a picture takes, told before it begins."""

from __future__ import annotations

import math

import torch

from sfumato.errors import InputError
from sfumato.memory import available, resident

BYTES = 220  # for each pixel, at the worst moment: its planes, sums and spectrum, in double precision
ALWAYS = 300 * 2**20  # a tile within the autoencoder
STEP = 16  # pixels, to which what would fit is rounded


def needed(width: int, height: int) -> int:
    """Bytes that a preflight of so many pixels takes beside what the process holds, at most."""
    return BYTES * width * height + ALWAYS


def check_room(width: int, height: int) -> None:
    """`InputError`, in one line with what would fit, where that is more than the machine has free."""
    free = available(torch.device("cpu")) - resident()
    asked = needed(width, height)
    if asked <= free:
        return
    share = math.sqrt(max(free - ALWAYS, 0) / BYTES / (width * height))
    fitting = [int(side * share) // STEP * STEP for side in (width, height)]
    fits = f"; {fitting[0]}x{fitting[1]} would fit" if min(fitting) >= STEP else ""
    raise InputError(
        f"a preflight at {width}x{height} takes {asked / 1e9:.1f} GB of memory, of which "
        f"{max(free, 0) / 1e9:.1f} GB are free{fits}",
        argument="size",
    )
