"""Files are whole or absent, only safetensors are read, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato import storage
from sfumato.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_crumbs(tmp_path):
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), storage.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert names(tmp_path) == ["f.txt"]


def test_a_write_replaces_whole_and_follows_the_umask(tmp_path):
    target = tmp_path / "new" / "f.txt"
    old = os.umask(0o027)
    try:
        with storage.atomic_file(target) as temporary:
            temporary.write_text("new")
            assert not target.exists()
    finally:
        os.umask(old)
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert names(target.parent) == ["f.txt"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    target = tmp_path / ("é" * 125 + ".txt")
    with storage.atomic_file(target) as temporary:
        temporary.write_text("x")
    with storage.atomic_directory(tmp_path / ("d" * 255)) as staging:
        (staging / "x").write_text("x")
    assert target.read_text() == "x"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    target = tmp_path / "f.txt"
    target.write_text("old")
    code = (
        "import sys, os, signal; from sfumato.storage import atomic_file\n"
        "with atomic_file(sys.argv[1]) as t:\n    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with storage.atomic_directory(target) as staging:
        (staging / "one").write_text("1")
    with pytest.raises(RuntimeError), storage.atomic_directory(target) as staging:
        (staging / "two").write_text("2")
        raise RuntimeError
    assert names(target) == ["one"]
    with storage.atomic_directory(target) as staging:
        (staging / "three").write_text("3")
    assert names(target) == ["three"]
    assert names(tmp_path) == ["run"]


def test_a_directory_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    with storage.atomic_directory(tmp_path / "run") as staging:
        (staging / "a").write_text("old")
    replace = os.replace

    def refuse(source, target):
        if Path(target) == tmp_path / "run" and Path(source).name != "old":
            raise PermissionError("held open by another program")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError), storage.atomic_directory(tmp_path / "run") as staging:
        (staging / "a").write_text("new")
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "old"


def test_json_round_trip_and_its_damages(tmp_path):
    path = tmp_path / "a.json"
    storage.write_json(path, {"x": "é", "y": [1, None]})
    assert storage.read_json(path) == {"x": "é", "y": [1, None]}
    for text in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 100_000):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"a\.json"):
            storage.read_json(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        storage.read_json(tmp_path / "absent.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        storage.read_json(tmp_path)


def test_tensors_round_trip(tmp_path):
    path = tmp_path / "t.safetensors"
    transposed = torch.arange(6.0).view(2, 3).T
    storage.save_tensors(path, {**TENSORS, "c": transposed}, {"key": "value"})
    read = storage.load_tensors(path)
    assert torch.equal(read["a"], TENSORS["a"])
    assert torch.equal(read["b"], TENSORS["b"])
    assert read["b"].dtype == torch.bfloat16
    assert torch.equal(read["c"], transposed)


class Bomb:
    def __reduce__(self):
        return (os._exit, (77,))


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_refused_unopened(tmp_path, suffix, protocol):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(CheckpointError, match=r"pickle|not a safetensors"):
        storage.load_tensors(path)


def test_a_torch_archive_under_a_false_name_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="pickled"):
        storage.load_tensors(path)


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "header over the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "header not JSON": file_of(b"{nope}"),
    "header not UTF-8": file_of(b"\xff\xff"),
    "header a list": file_of([1]),
    "overlap": file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "gap": file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "shape is not bytes": file_of({"a": entry([3], 0, 8)}, bytes(8)),
    "shape overflows": file_of({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)),
    "truncated": file_of({"a": entry([4], 0, 16)}, bytes(8)),
    "trailing data": file_of({"a": entry([1], 0, 4)}, bytes(8)),
    "unknown dtype": file_of({"a": entry([1], 0, 4, "F33")}, bytes(4)),
    "negative offset": file_of({"a": entry([1], -4, 0)}, bytes(4)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, case):
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors"):
        storage.load_tensors(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_checkpoint_error_or_a_change_of_numbers(tmp_path, data):
    path = tmp_path / "t.safetensors"
    storage.save_tensors(path, TENSORS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read = storage.load_tensors(path)
    except CheckpointError:
        return
    assert sum(t.numel() * t.element_size() for t in read.values()) == 32


def test_shards_stay_within_the_limit_and_come_back(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    tensors["large"] = torch.zeros(2000)
    files = storage.save_sharded(tmp_path, "w", tensors, limit=2000)
    assert files == [f"w-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    hashes = {file: storage.file_hash(tmp_path / file) for file in files}
    read = storage.load_sharded(tmp_path, files, hashes)
    assert storage.tensors_hash(read) == storage.tensors_hash(tensors)
    for file in files:
        alone = storage.load_tensors(tmp_path / file)
        assert len(alone) == 1 or (tmp_path / file).stat().st_size <= 2000 + 128
    hashes[files[1]] = hashes[files[0]]
    with pytest.raises(CheckpointError, match="hash"):
        storage.load_sharded(tmp_path, files, hashes)
    with pytest.raises(CheckpointError, match="repeats"):
        storage.load_sharded(tmp_path, [files[0], files[0]])
    (tmp_path / files[2]).unlink()
    with pytest.raises(CheckpointError, match=files[2]):
        storage.load_sharded(tmp_path, files)


@pytest.mark.parametrize(
    "name", ["../w.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", 3, None]
)
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match="outside"):
        storage.load_sharded(tmp_path, [name], {str(name): "0"})


def test_the_hash_of_tensors_sees_names_types_shapes_and_values():
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float16)},
        {"a": torch.tensor([[0, 0, 0], [0, 0, 1.0]])},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ]
    hashes = [storage.tensors_hash(t) for t in (base, *others)]
    assert len(set(hashes)) == len(hashes)
    reordered = {"y": torch.ones(1), "x": torch.zeros(1)}
    assert storage.tensors_hash(reordered) == storage.tensors_hash(dict(reversed(reordered.items())))
