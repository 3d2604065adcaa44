"""What runs a Stable Diffusion's U-Net, and in which numbers: every choice answers as the plain network."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sfumato.cli import parse
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.openers import check_engine, denoiser
from sfumato.nn.quantized import QuantizedConv2d, can_quantize
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.runtime import fast_dtype

CPU = torch.device("cpu")
CONFIG = UNetConfig(channels=(32, 64), depths=(1, 0), heads=(2, 2), context=24)
FAST = fast_dtype(CPU)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return UNet(CONFIG).state_dict()


def answer(network) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return network(torch.randn(2, 4, 16, 8), torch.tensor(400.0), torch.randn(2, 7, 24))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def plain(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    network = UNet(CONFIG)
    network.load_state_dict(tensors)
    return answer(network.double())


@pytest.mark.skipif(not can_quantize(torch.empty(0, dtype=FAST)), reason="this CPU has no eight-bit products")
def test_int8(tensors):
    check_engine("torch", CPU, torch.int8)
    network = denoiser(CONFIG, tensors, "w", CPU, torch.int8)
    assert any(isinstance(layer, QuantizedConv2d) for layer in network.modules())
    assert network.dtype == FAST and 1e-3 < distance(answer(network), plain(tensors)) < 5e-2


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra openvino is not installed"
)
def test_openvino(tensors, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    network = denoiser(CONFIG, tensors, "w", CPU, torch.float32, "openvino")
    assert network.dtype == torch.float32 and network.config == CONFIG
    assert distance(answer(network), plain(tensors)) < 1e-5
    assert len(list((tmp_path / "sfumato" / "openvino").iterdir())) == 1
    broken = tensors | {"conv_in.bias": torch.full_like(tensors["conv_in.bias"], torch.nan)}
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        answer(denoiser(CONFIG, broken, "w", CPU, torch.float32, "openvino"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(InputError, match=r"int8 of the engine openvino needs NNCF; pip install"):
        check_engine("openvino", CPU, torch.int8)


def test_what_this_machine_cannot_do_is_said_before_weights_are_read():
    with pytest.raises(InputError, match="engine must be torch, openvino or openvino:GPU, not 'onnx'"):
        check_engine("onnx", CPU, torch.float32)
    with pytest.raises(InputError, match="int8 needs a CPU with AVX512-VNNI or AMX"):
        check_engine("torch", torch.device("meta"), torch.int8)


def test_int8_is_a_name_of_drawing_alone():
    assert parse.dtype("int8", parse.DRAWN) == torch.int8
    with pytest.raises(InputError, match="dtype must be one of fp32, fp16, bf16, not 'int8'"):
        parse.dtype("int8")
