"""What a training step keeps of its forward pass, and how to keep less: blocks computed a second time where memory is
short (Chen et al. 2016, 1604.06174).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHOICES = ("auto", "on", "off")
SHARE = 0.6  # of the memory that is free, up to which "auto" keeps everything


@contextmanager
def computed_twice(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While inside, these blocks keep only their inputs, and are computed again when gradients pass."""
    changed = list(blocks)
    for block in changed:
        block.forward = functools.partial(_twice, block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def kept_bytes(call: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that the forward pass `call()` keeps for the backward one, beside `weights`. Nothing is computed: tensors
    have shapes and no numbers, so the call may ask for none.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    kept: dict[int, tuple[Tensor, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if isinstance(tensor, FakeTensor) and storage._cdata not in own:  # a real one is a weight
            kept[storage._cdata] = tensor, storage.nbytes()  # held, so that no other gets its number
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        held = [mode.from_tensor(weight) for weight in weights]  # those that the call is given too
        own = {weight.untyped_storage()._cdata for weight in held}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            call()
    return sum(size for _, size in kept.values())
