"""LoRAs in the making: factors that are trained, beside layers that are not.

The network stays as it is. A hook on each chosen layer adds to its output what its factors make of its input, so that
taking the hooks off leaves the base, to the bit.

Sources: LoRA (Hu et al. 2021, 2106.09685, sec. 4.1), of convolutions as LyCORIS (2309.14859, sec. 3.1) has it: a kernel
of the layer's size to r channels, then 1×1. DoRA (Liu et al. 2024, 2402.09353, eq. 5; the norm has no gradient, eq.
11).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfumato.adapters.delta import Decomposed, LowRank
from sfumato.adapters.names import Share
from sfumato.adapters.write import kohya
from sfumato.errors import InputError

ATTENTION = re.compile(  # projections of attentions, as the networks here call them
    r"(^|\.)(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|qkv|attn\.out|[qkv]_proj|out_proj)$"
)
INIT_SLOPE = math.sqrt(5)  # of `kaiming_uniform_`, with which PEFT and kohya begin `down` too


def layers_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of everything in a network that a LoRA can be beside: products and plain convolutions."""
    for path, module in network.named_modules():
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
            yield path, module


def chosen(layers: Mapping[str, nn.Module], targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Of `layers`, path to layer, those that get factors.

    targets: "attention", the projections of all attentions; "all"; or patterns of paths in which * is anything, such as
    "unet.*.attn2.to_k". `InputError` for a pattern that nothing answers to.
    """
    if targets == "all":
        return dict(layers)
    if targets == "attention":
        return {path: layer for path, layer in layers.items() if ATTENTION.search(path)}
    patterns = [targets] if isinstance(targets, str) else list(targets)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {path: layer for path, layer in layers.items() if fnmatchcase(path, pattern)}
        if not hits:
            near = difflib.get_close_matches(pattern, layers, 1, 0.0)
            raise InputError(
                f"no layer answers to the target {pattern!r}; give attention, all, or patterns such as "
                f"{near[0] if near else 'unet.*.to_q'!r}",
                argument="lora.targets",
            )
        found |= hits
    return {path: layer for path, layer in layers.items() if path in found}


class Factors(nn.Module):
    """What is trained beside one layer, in float32: `down` (r, I, …), `up` (O, r, …), and of DoRA `magnitude` (O,).

    `up` begins at zero, so that the network begins as the base.
    """

    def __init__(
        self, layer: nn.Module, rank: int, alpha: float, dora: bool, generator: torch.Generator | None = None
    ):
        super().__init__()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        outputs, inputs, *kernel = weight.shape
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(rank, inputs, *kernel))
        self.up = nn.Parameter(torch.zeros(outputs, rank, *[1] * len(kernel)))
        nn.init.kaiming_uniform_(self.down, a=INIT_SLOPE, generator=generator)
        self.magnitude = nn.Parameter(_row_norms(weight.detach().float()).cpu()) if dora else None

    def forward(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The layer's answer `out` to x, with what the factors add."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            inner = functional.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            added = functional.conv2d(inner * self.scale, up)
        else:
            added = functional.linear(functional.linear(x, down) * self.scale, up)
        if self.magnitude is None:
            return out + added.to(out.dtype)
        # what the magnitude adds, not what it multiplies by: near 1 short types are coarse
        more = (self.magnitude / self._norms(layer) - 1).to(out.dtype)
        bias = layer.bias
        if isinstance(layer, nn.Conv2d):
            more, bias = more[:, None, None], None if bias is None else bias[:, None, None]
        moved = out + added.to(out.dtype)
        return moved + more * (moved if bias is None else moved - bias.to(out.dtype))

    @torch.no_grad()
    def _norms(self, layer: nn.Module) -> Tensor:
        """(O,): the norm of each row of W + ΔW."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        change = (self.up.flatten(1) @ self.down.flatten(1)).mul_(self.scale)
        return _row_norms(change.view(weight.shape) + weight).clamp(min=torch.finfo(torch.float32).tiny)

    def delta(self) -> LowRank | Decomposed:
        """ΔW as a file of it is read."""
        plain = LowRank(self.up.detach(), self.down.detach(), self.scale)
        return plain if self.magnitude is None else Decomposed(plain, self.magnitude.detach(), outputs=True)


class TrainedLora(nn.Module):
    """The factors of one LoRA, acting on layers of networks that it does not own.

    layers: path to layer. seeds: path to the generator that draws where its factors begin. The state is that of the
    factors alone. `weight` is that at which they act, 1 in training.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        rank: int,
        alpha: float,
        *,
        dora: bool = False,
        seeds: Callable[[str], torch.Generator] | None = None,
    ):
        super().__init__()
        if not layers:
            raise InputError("a LoRA needs at least one layer to be beside", argument="lora.targets")
        self.acting = True
        self.factors = nn.ModuleDict()
        self._hooks = []
        for path, layer in layers.items():
            own = Factors(layer, rank, alpha, dora, seeds(path) if seeds else None)
            self.factors[path.replace(".", "/")] = own  # a module's name may hold no dot
            self._hooks.append(layer.register_forward_hook(self._hook(own)))

    def _hook(self, own: Factors) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            return own(layer, inputs[0], out) if self.acting else out

        return hook

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        """call(*args), whose networks the factors act on. What trains in several processes sees the pass begin here."""
        return call(*args)

    def named_factors(self) -> Iterator[tuple[str, Factors]]:
        """(path of the layer, its factors)."""
        for name, own in self.factors.items():
            assert isinstance(own, Factors)
            yield name.replace("/", "."), own

    @contextmanager
    def aside(self) -> Iterator[None]:
        """While inside, the networks are the base's."""
        before, self.acting = self.acting, False
        try:
            yield
        finally:
            self.acting = before

    def detach(self) -> None:
        """Take the hooks off for good."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def check_spelled(shares: Iterable[Share], dora: bool) -> None:
    """`InputError` if `written` could not write factors of layers that a file calls so.

    A magnitude is that of a whole layer: of one that is several here, all of them must have factors.
    """
    groups = _grouped((None, share) for share in shares)
    for name, members in groups.items():
        rows = sum(len(share.rows) for _, share in members)
        if dora and rows < members[0][1].of:
            raise InputError(
                f"{name} is {members[0][1].of} layers here, of which {len(members)} would be trained: DoRA needs all "
                "of them in this layout; choose them all, or the layout diffusers",
                argument="lora.layout",
            )


def written(factors: Iterable[tuple[Factors, Share]], layout: str) -> dict[str, Tensor]:
    """The tensors of factors as a file has them, each with what the layout calls its layer.

    diffusers: PEFT's names, with the scale in `up`: loaders differ in what they take for alpha, and need none so.
    kohya: with alpha beside; layers that are fused there stand in one, whose rank is the sum of theirs.
    """
    tensors: dict[str, Tensor] = {}
    for name, members in _grouped(factors).items():
        up, down, scale, magnitude = _fused(members)
        if layout == "kohya":
            tensors |= kohya(name, up, down, scale * len(down))
            if magnitude is not None:
                tensors[f"{name}.dora_scale"] = magnitude.view(-1, *[1] * (up.ndim - 1))
            continue
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * scale}
        if magnitude is not None:
            shape = (-1,) if up.ndim == 2 else (1, -1, *[1] * (up.ndim - 2))
            tensors[f"{name}.lora_magnitude_vector"] = magnitude.view(shape)
    return tensors


def _grouped(members: Iterable[tuple[Any, Share]]) -> dict[str, list[tuple[Any, Share]]]:
    """By the module of the file that they are of."""
    groups: dict[str, list[tuple[Any, Share]]] = {}
    for own, share in members:
        groups.setdefault(share.module, []).append((own, share))
    return groups


def _fused(members: Sequence[tuple[Factors, Share]]) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """(up, down, scale, magnitude) of one module that these are rows of: their ranks side by side."""
    first, share = members[0]
    if len(members) == 1 and share.of == 1:
        magnitude = first.magnitude
        return (
            first.up.detach(),
            first.down.detach(),
            first.scale,
            None if magnitude is None else magnitude.detach(),
        )
    height = len(first.up) // len(share.rows)  # of one of the equal parts
    down = torch.cat([own.down.detach() for own, _ in members])
    up = down.new_zeros(share.of * height, len(down), *first.up.shape[2:])
    magnitude = None if first.magnitude is None else down.new_zeros(share.of * height)
    column = 0
    for own, share in members:
        columns = slice(column, column + len(own.down))
        column = columns.stop
        for number, row in enumerate(share.rows):
            there, here = (slice(k * height, (k + 1) * height) for k in (row, number))
            up[there, columns] = own.up.detach()[here] * (own.scale / first.scale)
            if magnitude is not None and own.magnitude is not None:
                magnitude[there] = own.magnitude.detach()[here]
    return up, down, first.scale, magnitude


def _row_norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.float().flatten(1), dim=1)
