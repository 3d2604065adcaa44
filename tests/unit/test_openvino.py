"""The U-Net by OpenVINO: the same answers, compiled once, and a clear line where it is absent."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import sys

import pytest
import torch

from sfumato.errors import InputError
from sfumato.nn.openvino import OpenVINONetwork, plugin
from sfumato.nn.unet import UNet, UNetConfig

installed = importlib.util.find_spec("openvino") is not None
needs_it = pytest.mark.skipif(not installed, reason="the extra openvino is not installed")

CONFIGS = {
    "sd1": UNetConfig(channels=(32, 64), depths=(1, 0), heads=(2, 2), context=24),
    "sdxl": UNetConfig(
        channels=(32, 64), depths=(0, 2), heads=(1, 2), context=24, linear=True, vector=20, time_cond=8
    ),
}


def inputs_of(config: UNetConfig, size: tuple[int, int] = (16, 24)) -> tuple[list[torch.Tensor], dict]:
    given = [torch.randn(2, 4, *size), torch.tensor(321.5), torch.randn(2, 9, config.context)]
    if config.vector:
        given.append(torch.randn(2, config.vector))
    return given, {"time_cond": torch.randn(2, config.time_cond)} if config.time_cond else {}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@needs_it
@torch.inference_mode()
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=str)
def test_it_answers_as_the_network(tmp_path, kind, dtype, bound):
    torch.manual_seed(0)
    config = CONFIGS[kind]
    with torch.inference_mode(False):
        network = UNet(config).eval()
    engine = OpenVINONetwork(config, lambda: copy.deepcopy(network), "w", dtype, cache=tmp_path)
    for size in ((16, 24), (8, 11)):
        given, named = inputs_of(config, size)
        answer = engine(*given, **named)
        assert answer.dtype == torch.float32
        assert distance(answer, network(*given, **named)) < bound
    first = engine(*given, **named)
    held = first.clone()
    engine(*(value + 1 for value in given), **named)
    assert torch.equal(first, held)


@needs_it
@torch.inference_mode()
def test_what_was_compiled_is_read_the_next_time(tmp_path):
    torch.manual_seed(0)
    config = CONFIGS["sd1"]
    with torch.inference_mode(False):
        networks = [UNet(config).eval() for _ in range(2)]
    asked = []

    def engine(weights: int) -> OpenVINONetwork:
        def network() -> UNet:
            asked.append(weights)
            return networks[weights]

        return OpenVINONetwork(config, network, str(weights), torch.float32, cache=tmp_path)

    given, _ = inputs_of(config)
    first = engine(0)(*given)
    assert torch.equal(engine(0)(*given), first) and asked == [0]
    assert distance(engine(1)(*given), networks[1](*given)) < 1e-5 and asked == [0, 1]
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and all(file.suffix == ".blob" for file in files)
    for file in files:
        file.write_bytes(b"damaged")
    assert distance(engine(0)(*given), first) < 1e-6 and asked == [0, 1, 0]


@needs_it
@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack's structure is Linux's")
@torch.inference_mode()
def test_whoever_has_it_compiled_keeps_its_stack_for_signals(tmp_path):
    """Or a signal after the network is gone, Ctrl+C among them, could end the process."""
    config = CONFIGS["sd1"]
    with torch.inference_mode(False):
        network = UNet(config).eval()
    given, named = inputs_of(config)
    before = stack_for_signals()
    for _ in ("compiled", "read"):
        engine = OpenVINONetwork(config, lambda: network, "w", torch.float32, cache=tmp_path)
        engine(*given, **named)
        assert stack_for_signals() == before


def stack_for_signals() -> bytes:
    """This thread's `stack_t`: where it lies, flags, and size."""
    found = ctypes.create_string_buffer(24)
    assert ctypes.CDLL(None).sigaltstack(None, found) == 0
    return found.raw[:12] + found.raw[16:]  # what lies between is padding


@needs_it
@torch.inference_mode()
def test_both_halves_of_guidance_begin_as_one(tmp_path):
    """Compiled for itself, with less to do; what differs in its halves is not taken for it."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        network = UNet(CONFIGS["sd1"]).eval()
    engine = OpenVINONetwork(network.config, lambda: network, "w", torch.float32, cache=tmp_path)
    (x, time, context), _ = inputs_of(network.config)
    for noisy in (torch.cat([x[:1], x[:1]]), x):
        assert distance(engine(noisy, time, context), network(noisy, time, context)) < 1e-5
    assert len(list(tmp_path.iterdir())) == 2


@needs_it
@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="NNCF is not installed")
@torch.inference_mode()
def test_eight_bits_are_near(tmp_path, capsys):
    """At the beginning and near the end, and nothing but the drawing is written to standard output."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        network = UNet(CONFIGS["sd1"]).eval()
    engine = OpenVINONetwork(network.config, lambda: network, "w", torch.int8, cache=tmp_path)
    (x, _, context), _ = inputs_of(network.config)
    for time in (999.0, 20.0):
        told = torch.tensor(time)
        assert 1e-3 < distance(engine(x, told, context), network(x, told, context)) < 0.1
    assert capsys.readouterr().out == ""


@needs_it
def test_a_device_that_is_not_there_is_named():
    assert plugin("openvino") == plugin("openvino:cpu") == "CPU"
    with pytest.raises(InputError, match=r"sees no device NPU7 here; it sees CPU"):
        plugin("openvino:NPU7")


@pytest.mark.skipif(installed, reason="the extra openvino is installed")
def test_without_the_extra_it_says_how_to_get_it():
    with pytest.raises(
        InputError, match=r"engine openvino is not installed; pip install 'sfumato\[openvino\]'"
    ):
        plugin("openvino")


@pytest.mark.parametrize("engine", ["", "onnx", "openvino2", "torch:GPU"])
def test_other_engines_are_refused(engine):
    with pytest.raises(InputError, match="engine must be torch, openvino or openvino:GPU"):
        plugin(engine)
