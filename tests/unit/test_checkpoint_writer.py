"""Weights written tensor by tensor: what the safetensors library reads back is what was given."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sfumato.checkpoint.writer import NAMES, write_tensors
from sfumato.errors import CheckpointError, InputError

KINDS = sorted(NAMES.keys() - {torch.float8_e8m0fnu, torch.complex64}, key=str)  # the first has no zero


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@st.composite
def tensors(draw):
    """A few tensors of any type and shape, empty ones and single numbers among them."""
    found = {}
    for n in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        kind = draw(st.sampled_from(KINDS))
        count = math.prod(shape)
        raw = torch.tensor(
            draw(st.lists(st.integers(0, 16), min_size=count, max_size=count)), dtype=torch.int64
        )
        found[draw(st.sampled_from(["a", "ä.weight", 'q"uote'])) + str(n)] = raw.reshape(shape).to(kind)
    return found


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors())
def test_the_library_reads_what_was_written(tmp_path, weights):
    path = tmp_path / "w.safetensors"
    size = write_tensors(path, weights, metadata={"made by": "a test"})
    read = load_file(path)
    assert read.keys() == weights.keys()
    for name, tensor in weights.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor))
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "a test"}


def test_every_tensor_begins_at_a_multiple_of_its_size(tmp_path):
    weights = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(1, dtype=torch.float64),
        "c": torch.zeros(3, dtype=torch.float16),
        "d": torch.zeros(1, dtype=torch.float32),
    }
    path = tmp_path / "w.safetensors"
    write_tensors(path, weights)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in weights.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_tensors_that_are_not_contiguous_are_written_as_they_read(tmp_path):
    x = torch.arange(24.0).view(2, 3, 4)
    weights = {"turned": x.transpose(0, 2), "part": x[:, 1:2], "one": x[0, 0, 3]}
    write_tensors(tmp_path / "w.safetensors", weights)
    read = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_numbers_take_the_type_asked_for_and_counts_keep_theirs(tmp_path):
    weights = {
        "single": torch.tensor([1.0, 1e-3, 3.14159]),
        "half": torch.tensor([2.5], dtype=torch.float16),
        "eighth": torch.tensor([1.5]).to(torch.float8_e4m3fn),
        "ids": torch.arange(3),
    }
    write_tensors(tmp_path / "w.safetensors", weights, dtype=torch.bfloat16)
    read = load_file(tmp_path / "w.safetensors")
    assert read["ids"].dtype == torch.int64
    for name in ("single", "half", "eighth"):
        assert torch.equal(read[name], weights[name].to(torch.bfloat16))


def test_a_number_that_the_type_cannot_hold_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    weights = {"fine": torch.ones(2), "net.loud": torch.tensor([1.0, -7e4])}
    with pytest.raises(
        CheckpointError, match=r"'net\.loud' holds numbers beyond the range of F16; use bfloat16"
    ):
        write_tensors(path, weights, dtype=torch.float16)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    write_tensors(path, weights, dtype=torch.bfloat16)
    assert load_file(path)["net.loud"][1] == torch.tensor(-7e4).to(torch.bfloat16)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_named(tmp_path, number):
    with pytest.raises(CheckpointError, match=r"tensor 'b' holds NaN or infinite"):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1), "b": torch.tensor([1.0, number])})
    assert list(tmp_path.iterdir()) == []


def test_types_the_format_lacks_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'c' is of type torch\.complex128"):
        write_tensors(tmp_path / "w.safetensors", {"c": torch.zeros(1, dtype=torch.complex128)})


class Announced(Mapping):
    """Tensors made when they are read, so that the test can see how many live at once."""

    def __init__(self, names, shape):
        self.names, self.shape, self.asked = names, shape, []

    def __getitem__(self, name):
        self.asked.append(name)
        return torch.full(self.shape, float(self.names.index(name)))

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    def info(self, name):
        return torch.float32, (4, 4)


def test_each_tensor_is_read_once_and_told_of(tmp_path):
    weights, told = Announced(["b", "a", "c"], (4, 4)), []
    write_tensors(tmp_path / "w.safetensors", weights, on_tensor=told.append)
    assert weights.asked == told == ["a", "b", "c"]
    assert {name: tensor[0, 0].item() for name, tensor in load_file(tmp_path / "w.safetensors").items()} == {
        "a": 1.0,
        "b": 0.0,
        "c": 2.0,
    }


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"'a' is \(4, 3\), but was announced as \(4, 4\)"):
        write_tensors(tmp_path / "w.safetensors", Announced(["a"], (4, 3)))
    assert list(tmp_path.iterdir()) == []


def test_whoever_is_told_may_stop_the_writing(tmp_path):
    def stop(name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, on_tensor=stop)
    assert list(tmp_path.iterdir()) == []
