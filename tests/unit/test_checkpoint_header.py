"""A header is read whole and right, or refused by name; nothing else of the file is touched."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hostile_weights import HOSTILE, entry, file_of
from sfumato.checkpoint.header import ITEM_BYTES, TENSOR_LIMIT, read_header, shown
from sfumato.errors import CheckpointError
from sfumato.storage import load_tensors


def test_it_says_what_the_library_wrote(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "half": torch.arange(6.0).half().view(2, 3),
        "brain": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "whole": torch.arange(7),
        "имя": torch.ones(1),
    }
    save_file(tensors, path, {"format": "pt", "ключ": "значение"})
    header = read_header(path)
    content = path.read_bytes()
    assert header.size == len(content)
    assert header.metadata == {"format": "pt", "ключ": "значение"}
    assert header.tensors.keys() == tensors.keys()
    assert {name: e.shape for name, e in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {n: header.tensors[n].dtype for n in ("half", "brain", "scalar", "eight", "whole")} == {
        "half": "F16", "brain": "BF16", "scalar": "F32", "eight": "F8_E4M3", "whole": "I64",
    }  # fmt: skip
    for name, tensor in tensors.items():
        place = header.tensors[name]
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert content[place.start : place.stop] == raw
        assert place.count == tensor.numel()
    assert [e.start for e in header.tensors.values()] == sorted(e.start for e in header.tensors.values())


def test_every_type_of_the_library_that_has_whole_bytes_is_known(tmp_path):
    for dtype, size in ITEM_BYTES.items():
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(file_of({"a": entry([3], 0, 3 * size, dtype)}, bytes(3 * size)))
        with safe_open(path, "pt") as file:
            assert file.get_slice("a").get_shape() == [3]
        assert read_header(path).tensors["a"].dtype == dtype


# --- the catalogue of hostile weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_by_name(tmp_path, case):
    content, said = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 600 and message.isprintable()


def test_many_tensors_are_read_and_too_many_are_refused(tmp_path):
    path = tmp_path / "many.safetensors"
    for count in (100_000, TENSOR_LIMIT + 1):
        path.write_bytes(file_of({f"t{i}": entry([0], 0, 0) for i in range(count)}))
        if count <= TENSOR_LIMIT:
            assert len(read_header(path).tensors) == count
        else:
            with pytest.raises(
                CheckpointError, match=r"lists 200,001 tensors; the most that is read is 200,000"
            ):
                read_header(path)


class Trap:
    def __reduce__(self):
        return (os._exit, (77,))


@pytest.mark.parametrize("suffix", [".ckpt", ".CKPT", ".bin", ".pt", ".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "torch"])
def test_a_pickle_is_refused_unopened_with_what_to_do(tmp_path, suffix, protocol):
    path = tmp_path / f"model{suffix}"
    if protocol == "torch":
        torch.save({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"pickled checkpoint.*\.safetensors file.*convert"):
        read_header(path)


@pytest.mark.parametrize("length", [640, 1152, 896, 19_280, 84_816])
def test_a_header_whose_length_reads_like_a_pickle_s_first_bytes_is_none(tmp_path, length):
    """640 is 0x0280, which begins a pickle; 19,280 is "PK", which begins an archive."""
    path = tmp_path / "t.safetensors"
    text = json.dumps({"a": entry([1], 0, 4)}).encode().ljust(length)
    path.write_bytes(file_of(text, torch.ones(1).numpy().tobytes()))
    assert path.read_bytes()[:2] in {b"\x80\x02", b"\x80\x04", b"\x80\x03", b"PK"}
    assert read_header(path).tensors["a"].start == 8 + length
    assert torch.equal(load_tensors(path)["a"], torch.ones(1))


def test_what_is_no_file_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors", tmp_path / ("x" * 300), "a\0b", "/dev/null"):
        with pytest.raises(CheckpointError, match=r"is no file|does not exist|cannot be read"):
            read_header(path)


def test_a_file_of_seven_gigabytes_is_described_without_reading_it(tmp_path):
    path = tmp_path / "huge.safetensors"
    count, side = 1680, 1440
    size = 2 * side * side
    text = json.dumps(
        {f"t{i:04d}": entry([side, side], i * size, (i + 1) * size, "F16") for i in range(count)}
    )
    path.write_bytes(file_of(text.encode()))
    os.truncate(path, 8 + len(text) + count * size)
    header = read_header(path)
    assert header.size == path.stat().st_size > 6.9e9
    assert sum(e.count for e in header.tensors.values()) == count * side * side
    os.truncate(path, header.size - 1)
    with pytest.raises(CheckpointError, match="cut short"):
        read_header(path)


# --- anything at all ---------------------------------------------------------------------------------------------

ANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = (
    st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]) | st.floats() | st.none()
)
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES, "F4", "f32", ""]) | st.integers(),
        "shape": st.lists(st.integers(0, 4) | NUMBERS, max_size=4),
        "data_offsets": st.lists(st.integers(0, 40) | NUMBERS, min_size=1, max_size=3),
    }
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def agrees_with_the_library(path) -> None:
    """A `CheckpointError`, or a header that the safetensors library reads alike."""
    try:
        header = read_header(path)
    except CheckpointError:
        return
    if b"-0" in path.read_bytes():
        return  # minus nothing is nothing to us, and no number to the library
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == header.tensors.keys()
            for name, found in header.tensors.items():
                assert tuple(file.get_slice(name).get_shape()) == found.shape
                assert file.get_slice(name).get_dtype() == found.dtype
    except SafetensorError as error:
        pytest.fail(f"we read what the library refuses: {error}")


@ANY
@given(content=st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: file_of(b"{" + raw)))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    agrees_with_the_library(path)


@ANY
@given(
    header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), FIELDS | JSON, max_size=4),
    tail=st.integers(0, 64),
)
def test_any_json(tmp_path, header, tail):
    path = tmp_path / "any.safetensors"
    path.write_bytes(file_of(header, bytes(tail)))
    agrees_with_the_library(path)


@ANY
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5),
    order=st.randoms(use_true_random=False),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=2),
    metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
)
def test_whole_files_and_their_damages(tmp_path, sizes, order, damage, metadata):
    """Undamaged ones are read, in the order of their bytes whatever the order of their names."""
    path = tmp_path / "any.safetensors"
    entries, place = {}, 0
    for index, (rows, columns) in enumerate(sizes):
        entries[f"t{index}"] = entry([rows, columns], place, place + 4 * rows * columns)
        place += 4 * rows * columns
    names = list(entries)
    order.shuffle(names)
    content = bytearray(file_of({"__metadata__": metadata} | {n: entries[n] for n in names}, bytes(place)))
    for at, value in damage:
        content[at % len(content)] = value
    path.write_bytes(content)
    agrees_with_the_library(path)
    if not damage:
        header = read_header(path)
        filled = [n for n, (rows, columns) in zip(entries, sizes, strict=True) if rows * columns]
        assert [n for n, e in header.tensors.items() if e.count] == filled
        assert header.metadata == metadata


def test_names_are_shown_as_they_are_when_they_can_be():
    assert shown("down_blocks.0.weight") == "down_blocks.0.weight"
    assert shown("a\nb") == "'a\\nb'"
    assert shown("x" * 500) == ascii("x" * 100 + "…")
