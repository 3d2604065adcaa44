"""The MMDiT against diffusers' SD3Transformer2DModel: the same random weights, the same answers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel

from helpers import spread
from sfumato.checkpoint.fill import fill_layers
from sfumato.families.sd3.folder import transformer_config
from sfumato.families.sd3.shapes import SYSTEMS
from sfumato.nn.mmdit import MMDiT, MMDiTConfig

BOUND, THEIRS = 1e-5, "diffusers SD3Transformer2DModel"
PLAIN = MMDiTConfig(channels=16, layers=3, heads=3, head_width=16, context=40, pooled=24, positions=12)
CASES = {
    "plain": PLAIN,
    "norms of queries and keys": replace(PLAIN, qk_norm=True),
    "MMDiT-X": replace(PLAIN, qk_norm=True, dual=(0, 1), layers=4),
    "a second attention in the last block": replace(PLAIN, dual=(2,)),
}


def theirs_of(config: MMDiTConfig, seed: int = 0) -> SD3Transformer2DModel:
    """diffusers' network; what it begins as zeros or ones, such as gains, is drawn too."""
    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        sample_size=config.positions, patch_size=config.patch, in_channels=config.channels,
        out_channels=config.channels, num_layers=config.layers, attention_head_dim=config.head_width,
        num_attention_heads=config.heads, joint_attention_dim=config.context, caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled, pos_embed_max_size=config.positions,
        dual_attention_layers=config.dual, qk_norm="rms_norm" if config.qk_norm else None,
    )  # fmt: skip
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.data.normal_(std=0.1).add_("norm_" in name and name.endswith("weight"))
    return network.eval()


def ours_of(config: MMDiTConfig, theirs: torch.nn.Module) -> MMDiT:
    with torch.device("meta"):
        network = MMDiT(config)
    network.load_state_dict(theirs.state_dict(), assign=True)  # strict: the names are the same
    return network.eval()


def inputs_of(config: MMDiTConfig, height: int, width: int, batch: int = 2, tokens: int = 11):
    torch.manual_seed(1)
    x = torch.randn(batch, config.channels, height, width)
    return (
        x,
        torch.linspace(900, 30, batch),
        torch.randn(batch, tokens, config.context),
        torch.randn(batch, config.pooled),
    )


def answers(config, height, width, skip=(), theirs=None, **sizes):
    theirs = theirs or theirs_of(config)
    x, time, context, vector = inputs_of(config, height, width, **sizes)
    with torch.no_grad():
        mine = ours_of(config, theirs)(x, time, context, vector, skip_layers=skip)
        other = theirs(x, context, vector, time, skip_layers=list(skip), return_dict=False)[0]
    return mine, other


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(24, 24), (10, 16), (14, 6)])
def test_it_answers_as_the_reference(agrees, case, size):
    """At the table's full size, and where a part of it is taken, with an even and an odd rest."""
    mine, other = answers(CASES[case], *size)
    agrees("MMDiT", f"{case}, {size[1]}×{size[0]} cells", mine, other, BOUND, THEIRS)


@pytest.mark.parametrize("skip", [(1,), (0, 2), (3,)])
def test_layers_left_out(agrees, skip):
    mine, other = answers(CASES["MMDiT-X"], 12, 16, skip)
    agrees("MMDiT, layers left out", f"without {skip}", mine, other, BOUND, THEIRS)


@pytest.mark.parametrize("case", CASES)
def test_tokens_that_are_alike_may_be_told_as_one(agrees, case):
    config = CASES[case]
    theirs = theirs_of(config)
    x, time, context, vector = inputs_of(config, 12, 16)
    counts = torch.ones(2, 11)
    counts[:, -1] = 256
    with torch.no_grad():
        mine = ours_of(config, theirs)(x, time, context, vector, counts)
        other = theirs(x, spread(context, counts[0]), vector, time, return_dict=False)[0]
    agrees("MMDiT, 256 tokens alike, told as one", case, mine, other, BOUND, THEIRS)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd3-medium", "sd3.5-medium"])
def test_of_published_size(agrees, kind):
    mine, other = answers(SYSTEMS[kind].transformer, 32, 24, batch=1, tokens=154)
    agrees("MMDiT", f"{kind}, 192×256 pixels", mine, other, BOUND, THEIRS)


class Drawn(Mapping[str, torch.Tensor]):
    """Random weights of a network, each made when it is asked for and always the same."""

    def __init__(self, network: torch.nn.Module):
        self.shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) > 1:
            return weight.mul_(shape[1:].numel() ** -0.5)
        return weight.mul_(0.1).add_("norm_" in name and name.endswith("weight"))

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_as_called(network: torch.nn.Module, weights: Drawn) -> None:
    """Have each module on the meta device take its tensors when it is called, and let them go afterwards."""

    def taking(path: str, held: dict[str, torch.Tensor]):
        def take(module, given):
            for name in held:
                weight = weights[f"{path}.{name}"]
                setattr(
                    module, name, torch.nn.Parameter(weight, False) if name in module._parameters else weight
                )

        return take

    def letting_go(held: dict[str, torch.Tensor]):
        def let_go(module, given, answer):
            for name, empty in held.items():
                setattr(module, name, empty)

        return let_go

    for path, module in network.named_modules():
        held = {
            n: t for n, t in (module._parameters | module._buffers).items() if f"{path}.{n}" in weights.shapes
        }
        if held:
            module.register_forward_pre_hook(taking(path, held))
            module.register_forward_hook(letting_go(held))


@pytest.mark.full
@torch.no_grad()
def test_the_large_one_at_its_full_depth(agrees):
    """In float32, layer by layer: 32 GB of weights that are never together in memory."""
    config = SYSTEMS["sd3.5-large"].transformer
    with torch.device("meta"):
        ours, theirs = (
            MMDiT(config).eval(),
            SD3Transformer2DModel.from_config(transformer_config(config, 128)).eval(),
        )
    weights = Drawn(ours)
    fill_layers(ours, weights, "random weights", torch.float32, "cpu", keep=0)
    x, time, context, vector = inputs_of(config, 32, 24, batch=1, tokens=154)
    mine = ours(x, time, context, vector)
    read_as_called(theirs, weights)
    other = theirs(x, context, vector, time).sample
    agrees("MMDiT", "sd3.5-large, 192×256 pixels", mine, other, BOUND, THEIRS)
