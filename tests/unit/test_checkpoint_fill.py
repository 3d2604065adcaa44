"""A module is filled with exactly its tensors, without a copy where none is needed, or with none at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.checkpoint.cast import Room
from sfumato.checkpoint.fill import Streamed, fill, fill_layers
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.report import Report, compare
from sfumato.checkpoint.source import open_weights
from sfumato.errors import CheckpointError
from sfumato.nn.unet import Upsample


class Net(nn.Module):
    def __init__(self, width: int = 3, layers: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a `Net` needs, with changes; None takes a tensor away."""
    generator = torch.Generator().manual_seed(1)
    found = {name: torch.randn(t.shape, generator=generator) for name, t in Net().state_dict().items()}
    found |= {"steps": torch.tensor([5, 2**40])} | {name.replace("__", "."): t for name, t in changes.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def meta() -> Net:
    with torch.device("meta"):
        return Net()


def test_a_module_on_meta_gets_the_tensors_themselves():
    given, module = tensors(), meta()
    state = torch.get_rng_state()
    report = fill(module, given, "here")
    assert report == Report(tuple(sorted(given)))
    assert report.complete
    found = module.state_dict()
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() == tensor.data_ptr()  # no copy was made
    assert isinstance(module.layers[0].weight, nn.Parameter)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_are_cast_and_whole_numbers_are_not(dtype):
    given, module = tensors(), meta()
    fill(module, given, "here", dtype)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, given[name].to(dtype) if name != "steps" else given[name])
        assert tensor.dtype == (dtype if name != "steps" else torch.int64)


def test_without_a_type_each_keeps_its_own():
    module = meta()
    fill(module, tensors(mean=torch.ones(3).bfloat16()), "here")
    assert module.mean.dtype == torch.bfloat16
    assert module.layers[0].weight.dtype == torch.float32


def test_views_become_contiguous_and_a_filled_module_is_filled_anew():
    module = Net()
    matrix = torch.arange(9.0).view(3, 3)
    fill(module, tensors(layers__0__weight=matrix.T), "here")
    assert torch.equal(module.layers[0].weight, matrix.T)
    assert module.layers[0].weight.is_contiguous()


def test_mapped_weights_stay_the_file_s_pages(tmp_path):
    save_file(tensors(), tmp_path / "n.safetensors")
    module = meta()
    with open_weights(tmp_path / "n.safetensors") as weights:
        fill(module, weights, "here")
        for name, tensor in module.state_dict().items():
            assert tensor.data_ptr() == weights[name].data_ptr()
    assert all(torch.equal(t, tensors()[name]) for name, t in module.state_dict().items())


class Once(Mapping):
    """A mapping that computes its tensors, and minds being asked twice."""

    def __init__(self, values: dict[str, torch.Tensor]):
        self.values_, self.asked = values, []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.values_[name]

    def __iter__(self):
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def test_each_tensor_is_asked_for_once():
    lazy = Once(tensors())
    fill(meta(), lazy, "here")
    assert sorted(lazy.asked) == sorted(tensors())


def test_nothing_is_asked_for_when_names_differ():
    lazy = Once(tensors(extra=torch.ones(1)))
    with pytest.raises(CheckpointError):
        fill(meta(), lazy, "here")
    assert lazy.asked == []


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(given: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        fill(meta(), given, "x.safetensors", dtype)
    message = str(caught.value)
    assert message.startswith("x.safetensors") and "\n" not in message
    return message


def test_missing_and_unexpected_names_are_listed():
    message = refused(tensors(mean=None, layers__1__bias=None, zeta=torch.ones(1)))
    assert message.endswith("2 missing: layers.1.bias, mean; 1 unexpected: zeta")
    assert refused({}).startswith(
        "x.safetensors does not hold exactly the tensors expected: 6 missing: layers.0.bias, "
    )


def test_of_many_names_the_first_ten_are_listed():
    message = refused(tensors() | {f"more.{i:02d}": torch.ones(1) for i in range(15)})
    assert "15 unexpected: more.00, " in message
    assert "more.09 and 5 more" in message and "more.10" not in message


def test_hostile_names_are_escaped_and_cut():
    message = refused(tensors() | {"\x1b[2J" + "n" * 10**6: torch.ones(1)})
    assert message.isprintable() and len(message) < 300


def test_wrong_shapes_and_kinds_are_listed_together():
    message = refused(
        tensors(mean=torch.ones(4), steps=torch.ones(2), layers__0__bias=torch.ones(3, dtype=torch.int64))
    )
    assert "mean has shape (4,), expected (3,)" in message
    assert "steps holds torch.float32, expected torch.int64" in message
    assert "layers.0.bias holds torch.int64, expected floating-point numbers" in message


def test_of_many_problems_ten_are_told():
    with torch.device("meta"):
        module = Net(layers=12)
    given = {name: torch.zeros(7) for name in module.state_dict()}
    with pytest.raises(CheckpointError) as caught:
        fill(module, given, "here")
    assert str(caught.value).count(" has shape ") == 10
    assert str(caught.value).endswith("; and 16 more")


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_named_wherever_it_stands(dtype, value):
    assert finite(torch.zeros(0, dtype=dtype))
    for size in (1, 7, 40, 1000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.linspace(-3, 3, size).to(dtype)
            assert finite(tensor)
            tensor[place] = value
            assert not finite(tensor)
    bad = torch.ones(3, 3, dtype=dtype)
    bad[1, 2] = value
    assert refused(tensors(layers__1__weight=bad)).endswith(
        "layers.1.weight holds NaN or infinite values; the file is unusable"
    )
    assert "layers.1.weight holds NaN" in refused(tensors(layers__1__weight=bad), torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_whose_sum_is_none_are_numbers(dtype):
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(largest)
    assert finite(-largest)
    largest[500] = float("inf")
    largest[501] = float("-inf")
    assert not finite(largest)


def test_eight_bit_floats_are_looked_through_too():
    tensor = torch.linspace(-3, 3, 1000).to(torch.float8_e4m3fn)
    assert finite(tensor)
    tensor.view(torch.uint8)[999] = 0x7F  # its NaN
    assert not finite(tensor)
    module = meta()
    fill(module, tensors(mean=torch.ones(3).to(torch.float8_e5m2)), "here", torch.float32)
    assert torch.equal(module.mean, torch.ones(3))


def test_numbers_too_large_for_the_type_asked_for_are_named():
    message = refused(tensors(mean=torch.tensor([1.0, 70000.0, 2.0])), torch.float16)
    assert "mean holds numbers beyond the range of torch.float16; load it in bfloat16 or float32" in message


def test_tensors_that_stand_in_no_file_may_not_stay_empty():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("positions", torch.arange(4), persistent=False)

    with torch.device("meta"):
        module = WithPositions()
    with pytest.raises(ValueError, match="positions stand in no file"):
        fill(module, {"weight": torch.ones(2)}, "here")
    module = WithPositions()
    fill(module, {"weight": torch.zeros(2)}, "here")
    assert module.positions.tolist() == [0, 1, 2, 3]


def test_compare():
    report = compare(["b", "a", "c"], ["c", "d", "b"])
    assert report == Report(matched=("b", "c"), missing=("a",), unexpected=("d",))
    assert not report.complete
    with pytest.raises(CheckpointError, match=r"^w does not hold .* 1 missing: a; 1 unexpected: d$"):
        report.require("w")
    compare("ab", "ba").require("w")


# --- memory ------------------------------------------------------------------------------------------------------


MEASURED = """
import sys
from pathlib import Path
import torch
from torch import Tensor, nn
from sfumato.checkpoint.cast import Room
from sfumato.checkpoint.fill import fill
from sfumato.checkpoint.source import open_weights

def resident(which):
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which + ":")]
    return int(line.split()[1]) * 1024

path, count, side, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4], None)
with torch.device("meta"):
    module = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(count))
fill(nn.Linear(2, 2, bias=False), {"weight": torch.ones(2, 2)}, "warm", torch.bfloat16)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from here
with open_weights(path) as weights:
    fill(module, weights, "here", dtype)
print(resident("VmRSS") - before, resident("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", ["none", "bfloat16"])
def test_the_peak_is_the_weights_and_little_more(tmp_path, dtype):
    """Of the file's 256 MiB, as they are or halved by a cast, in a process of its own; 64 MiB are allowed."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    count, side = 32, 1448
    place = 4 * side * side
    header = {
        f"{i}.weight": {"dtype": "F32", "shape": [side, side], "data_offsets": [i * place, (i + 1) * place]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "n.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + count * place)  # all zeros, and nothing in this process's memory
    command = [sys.executable, "-c", MEASURED, str(path), str(count), str(side), dtype]
    held, peak = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    wanted = count * place if dtype == "none" else count * place // 2
    assert wanted * 0.9 < held
    assert peak < wanted + 90 * 2**20


class Grown(nn.Module):
    """Layers that have packed twins, one of which keeps tensors of the layer, and smaller ones after it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.leave = nn.Conv2d(4, 64, 3, padding=1), Upsample(64), nn.Conv2d(64, 32, 3)
        self.norm, self.out = nn.GroupNorm(2, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.norm(self.leave(self.up(self.enter(x), torch.Size(size))))
        return self.out(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(12, 16), (11, 15)], ids=["doubled", "odd"])
@torch.inference_mode()
def test_layers_keep_nothing_of_the_memory_that_they_share(stored, size):
    torch.manual_seed(0)
    weights = {name: tensor.to(stored) for name, tensor in Grown().state_dict().items()}
    with torch.device("meta"):
        plain, made = Grown(), Grown()
    fill(plain, weights, "weights", torch.float32)
    fill_layers(made, weights, "weights", torch.float32, pack=True)
    x = torch.randn(1, 4, 6, 8).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(made(x, size), plain(x, size), atol=1e-5, rtol=1e-5)
    addresses = {tensor.data_ptr() for tensor in weights.values()}
    assert not any(tensor.data_ptr() in addresses for tensor in made.state_dict().values())


@pytest.mark.parametrize("stream", [False, True])
def test_layers_that_are_cast_take_the_memory_of_one(stream, monkeypatch):
    made: list[int] = []
    plain = Room.cast

    def measured(room: Room, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out = plain(room, tensor, dtype)
        made.append(room._bytes.numel())
        return out

    monkeypatch.setattr(Room, "cast", measured)
    with torch.device("meta"):
        net = Net(64, layers=12)
    del net.steps, net.mean  # no layer's
    weights = {name: torch.randn(t.shape).half() for name, t in net.state_dict().items()}
    fill_layers(net, weights, "weights", torch.float32, pack=not stream, keep=0 if stream else None)
    assert len(made) == 24 and max(made) <= 2 * 4 * (64 * 64 + 64)


class Scaled(nn.Module):
    """A norm that PyTorch does not have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Placed(nn.Module):
    """A layer with the table that it looks places up in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 2)
        self.register_buffer("table", torch.zeros(1, 9, width))


def test_vectors_and_tables_are_never_read_anew():
    def network() -> nn.ModuleDict:
        parts = {"norm": nn.GroupNorm(2, 8), "scaled": Scaled(8), "placed": Placed(8), "silu": nn.SiLU()}
        return nn.ModuleDict({**parts, "line": nn.Linear(8, 8), "words": nn.Embedding(8, 8)})

    weights = network().state_dict()
    with torch.device("meta"):
        made = network()
    fill_layers(made, weights, "weights", keep=0)
    assert {name for name, layer in made.items() if isinstance(layer, Streamed)} == {"line", "words"}
