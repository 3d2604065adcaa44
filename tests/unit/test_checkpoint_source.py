"""Tensors read on demand are the file's, cost what is used of them, and outlive what becomes of the file."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoint import source
from sfumato.checkpoint.header import ITEM_BYTES
from sfumato.checkpoint.layout import weight_files
from sfumato.checkpoint.source import DTYPES, open_folder, open_weights
from sfumato.errors import CheckpointError
from sfumato.storage import file_hash

TENSORS = {
    "unet.in.weight": torch.arange(24.0).view(2, 3, 4),
    "unet.in.bias": torch.linspace(-1, 1, 5).half(),
    "vae.weight": torch.arange(6.0).bfloat16().view(3, 2),
    "vae.scale": torch.tensor(0.5),
    "ids": torch.arange(9).view(1, 9),
    "v_pred": torch.zeros(0),
}
LINUX = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "t.safetensors", {"format": "pt"})
    return tmp_path / "t.safetensors"


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


# --- one file ----------------------------------------------------------------------------------------------------


def test_names_shapes_and_tensors_are_the_file_s(file):
    weights = open_weights(file)
    assert set(weights) == set(weights.names()) == TENSORS.keys()
    assert len(weights) == len(TENSORS)
    assert list(weights) == sorted(weights, key=lambda n: weights._places[n][0].header.tensors[n].start)
    for name, tensor in TENSORS.items():
        assert weights.info(name) == (tensor.dtype, tuple(tensor.shape))
        assert same(weights[name], tensor)
        assert same(weights.read(name), tensor)
    assert weights.metadata == {"format": "pt"}
    assert weights.files == (file,)
    assert weights.hashes() == {"t.safetensors": file_hash(file)}
    assert "nothing" not in weights and weights.get("nothing") is None
    with pytest.raises(KeyError):
        weights["nothing"]


def test_every_type_that_a_header_may_name_can_be_read(tmp_path):
    assert DTYPES.keys() == ITEM_BYTES.keys()
    for name, dtype in DTYPES.items():
        assert dtype.itemsize == ITEM_BYTES[name]
        raw = torch.tensor([0, 1] * 8, dtype=torch.uint8)
        save_file({"a": raw.view(dtype)}, tmp_path / "a.safetensors") if name != "F8_E8M0" else None
        if name != "F8_E8M0":
            assert torch.equal(open_weights(tmp_path / "a.safetensors")["a"].view(torch.uint8), raw)


def test_read_casts_and_moves(file):
    weights = open_weights(file)
    cast = weights.read("vae.weight", torch.float32, "cpu")
    assert same(cast, TENSORS["vae.weight"].float())
    assert weights.read("vae.weight", device="meta").is_meta


def test_under_is_a_part_with_shorter_names(file):
    weights = open_weights(file)
    part = weights.under("unet.")
    assert set(part) == {"in.weight", "in.bias"}
    assert same(part["in.bias"], TENSORS["unet.in.bias"])
    assert part.info("in.weight") == (torch.float32, (2, 3, 4))
    assert set(part.under("in.")) == {"weight", "bias"}
    assert "unet.in.bias" not in part and len(weights.under("nothing")) == 0


def test_a_tensor_may_be_changed_and_the_file_is_not(file):
    before = file.read_bytes()
    tensor = open_weights(file)["unet.in.weight"]
    tensor.zero_()
    assert not tensor.any()
    assert file.read_bytes() == before
    assert same(open_weights(file)["unet.in.weight"], TENSORS["unet.in.weight"])


def test_tensors_outlive_the_weights_and_the_file(file):
    with open_weights(file) as weights:
        kept = weights["unet.in.weight"]
        save_file({"other": torch.ones(1000)}, file.with_name("other"))
        os.replace(file.with_name("other"), file)
        assert same(weights["vae.weight"], TENSORS["vae.weight"])  # still of the file that was opened
        file.unlink()
    del weights
    gc.collect()
    assert same(kept, TENSORS["unet.in.weight"])


def test_what_is_closed_reads_no_more(file):
    weights = open_weights(file)
    weights.close()
    weights.close()
    with pytest.raises(CheckpointError, match="was closed"):
        weights["vae.scale"]
    assert weights.info("vae.scale") == (torch.float32, ())


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    text = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "wide": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
        }
    ).encode()
    text += b" " * (len(text) % 2)
    data = b"\x07" + torch.tensor([1.5, -2.5], dtype=torch.float64).numpy().tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    tensor = open_weights(path)["wide"]
    assert same(tensor, torch.tensor([1.5, -2.5], dtype=torch.float64))
    assert tensor.data_ptr() % 8 == 0


@pytest.fixture
def many(tmp_path, monkeypatch) -> Path:
    """A file of 200 tensors of 4,000 bytes, seen through windows of 16 KiB."""
    monkeypatch.setattr(source, "WINDOW", 16 * 1024)
    monkeypatch.setattr(source, "WINDOWS_PER_FILE", 10**6)
    save_file({f"t{i:03d}": torch.full((1000,), float(i)) for i in range(200)}, tmp_path / "many.safetensors")
    return tmp_path / "many.safetensors"


def mapped(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_windows_show_every_tensor(many):
    weights = open_weights(many)
    for order in (weights.names(), reversed(weights.names()), sorted(weights, key=lambda n: n[::-1])):
        for name in order:
            assert same(weights[name], torch.full((1000,), float(name[1:])))


@LINUX
def test_a_window_goes_with_its_last_tensor(many):
    weights = open_weights(many)
    assert mapped(many) == 0
    for name in weights:
        weights[name].sum()
        assert mapped(many) <= 2  # the one in use, and the one kept for the next
    kept = [weights[name] for name in weights]
    assert mapped(many) > 40
    del kept
    gc.collect()
    assert mapped(many) <= 1
    weights.close()
    assert mapped(many) == 0


@LINUX
def test_a_large_file_takes_few_file_descriptors(many, monkeypatch):
    monkeypatch.setattr(source, "WINDOWS_PER_FILE", 32)
    monkeypatch.setattr(source, "WINDOW", 1)
    before = len(os.listdir("/proc/self/fd"))
    weights = open_weights(many)
    kept = [weights[name] for name in weights]
    assert len(os.listdir("/proc/self/fd")) - before <= 66
    del kept, weights
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@LINUX
def test_only_what_is_used_of_a_file_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    size, count = 2**26, 100
    text = json.dumps(
        {
            f"t{i}": {"dtype": "F16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
            for i in range(count)
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + count * size)

    def resident() -> int:
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile")]
        return int(line.split()[1]) * 1024

    before = resident()
    weights = open_weights(path)
    every = [weights[name] for name in weights]
    assert sum(t.numel() for t in every) * 2 == 6.25 * 2**30
    assert resident() - before < 2**26
    assert float(every[57][:1000].sum()) == 0
    assert resident() - before < 2**26


def test_the_hash_is_checked_when_it_is_given(file):
    open_weights(file, sha256=file_hash(file))
    with pytest.raises(CheckpointError, match=r"t\.safetensors does not match the hash"):
        open_weights(file, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="absent"):
        open_weights(file.with_name("absent"), sha256="0" * 64)


def test_damaged_pickled_and_absent_files_are_refused(tmp_path, file):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        open_weights(file)
    (tmp_path / "m.ckpt").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="pickled"):
        open_weights(tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(tmp_path / "absent.safetensors")


# --- folders -----------------------------------------------------------------------------------------------------

STEM = "diffusion_pytorch_model"


def put(folder: Path, name: str, **tensors: float) -> None:
    folder.mkdir(exist_ok=True)
    save_file({key: torch.full((2,), value) for key, value in tensors.items()}, folder / name)


def put_index(folder: Path, name: str, table: dict) -> None:
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


def read(folder: Path, **options) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in open_folder(folder, **options).items()}


def test_the_plain_file_or_the_variant_asked_for(tmp_path):
    put(tmp_path, f"{STEM}.safetensors", a=1.0)
    put(tmp_path, f"{STEM}.fp16.safetensors", a=2.0)
    put(tmp_path, f"{STEM}.non_ema.safetensors", a=3.0)
    put(tmp_path, "model.safetensors", a=4.0)
    assert read(tmp_path) == {"a": 1.0}
    assert read(tmp_path, variant="fp16") == {"a": 2.0}
    assert read(tmp_path, variant="non_ema") == {"a": 3.0}
    assert read(tmp_path, stem="model") == {"a": 4.0}


def test_an_absent_variant_is_an_error_that_lists_what_is_there(tmp_path):
    put(tmp_path, f"{STEM}.safetensors", a=1.0)
    put(tmp_path, f"{STEM}.fp16.safetensors", a=2.0)
    with pytest.raises(
        CheckpointError, match=r"no diffusion_pytorch_model of variant 'bf16'; there is the plain one, 'fp16'"
    ):
        open_folder(tmp_path, variant="bf16")


def test_without_a_plain_one_the_only_variant_is_taken(tmp_path):
    put(tmp_path, f"{STEM}.fp16.safetensors", a=2.0)
    assert read(tmp_path) == {"a": 2.0}
    assert weight_files(tmp_path, STEM).variant == "fp16"
    put(tmp_path, f"{STEM}.bf16.safetensors", a=3.0)
    with pytest.raises(CheckpointError, match=r"no plain diffusion_pytorch_model; there is 'bf16', 'fp16'"):
        open_folder(tmp_path)


SHARDED = {
    "diffusers": (f"{STEM}.safetensors.index.json", f"{STEM}-0000{{}}-of-00002.safetensors", None),
    "variant": (f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors", "fp16"),
    "older": (f"{STEM}.safetensors.fp16.index.json", f"{STEM}-0000{{}}-of-00002.fp16.safetensors", "fp16"),
    "between": (f"{STEM}.fp16.safetensors.index.json", f"{STEM}.fp16-0000{{}}-of-00002.safetensors", "fp16"),
}


@pytest.fixture
def shards(tmp_path) -> Path:
    index, name, _ = SHARDED["diffusers"]
    put(tmp_path, name.format(1), a=1.0, b=2.0)
    put(tmp_path, name.format(2), c=3.0)
    put_index(tmp_path, index, {"a": name.format(1), "b": name.format(1), "c": name.format(2)})
    return tmp_path


@pytest.mark.parametrize("form", SHARDED)
def test_shards_and_their_index_in_all_spellings(tmp_path, form):
    index, name, variant = SHARDED[form]
    put(tmp_path, name.format(1), a=1.0, b=2.0)
    put(tmp_path, name.format(2), c=3.0)
    put_index(tmp_path, index, {"a": name.format(1), "b": name.format(1), "c": name.format(2)})
    assert read(tmp_path) == read(tmp_path, variant=variant) == {"a": 1.0, "b": 2.0, "c": 3.0}
    weights = open_folder(tmp_path)
    assert [path.name for path in weights.files] == [name.format(1), name.format(2)]
    assert weights.hashes() == {name.format(i): file_hash(tmp_path / name.format(i)) for i in (1, 2)}


def test_a_variant_whole_and_another_in_shards(shards):
    put(shards, f"{STEM}.fp16.safetensors", a=9.0)
    assert read(shards) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert read(shards, variant="fp16") == {"a": 9.0}
    put(shards, f"{STEM}.safetensors", a=8.0)  # whole, and so before the shards
    assert read(shards) == {"a": 8.0}


FIRST, SECOND = (SHARDED["diffusers"][1].format(i) for i in (1, 2))
INDEX = SHARDED["diffusers"][0]


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/x.safetensors",
        "d/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "a\0b",
        3,
        None,
        ["x"],
    ],
)
def test_an_index_cannot_leave_its_folder(shards, shard):
    put(shards.parent, "x.safetensors", a=1.0)
    put_index(shards, INDEX, {"a": shard})
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_folder(shards)


@pytest.mark.parametrize(
    "index, said",
    [
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": [FIRST]}, "weight_map"),
        ({}, "weight_map"),
        ([], "a JSON list"),
        ("{", "not readable JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key a stands twice"),
        ({"weight_map": {"a": "weights.bin"}}, r"weights\.bin, which is no safetensors file"),
        ({"weight_map": {"a": FIRST, "b": FIRST, "c": "lost.safetensors"}}, r"lacks lost\.safetensors"),
        ({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}}, "lacks the tensor d"),
        ({"weight_map": {"a": FIRST, "c": SECOND}}, "the tensor b, which its index does not place there"),
        (
            {"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}},
            "the tensor b, which its index does not place",
        ),
        ({"weight_map": {"a": FIRST}, "auto_map": {"x": "code.X"}}, "asks for code"),
    ],
)
def test_a_damaged_index_is_refused(shards, index, said):
    (shards / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        open_folder(shards)


def test_missing_repeated_and_altered_shards_are_named(shards):
    hashes = open_folder(shards).hashes()
    open_folder(shards, hashes=hashes)
    put(shards, SECOND, c=4.0)
    with pytest.raises(CheckpointError, match=f"{SECOND} does not match the hash"):
        open_folder(shards, hashes=hashes)
    put(shards, SECOND, c=3.0, a=5.0)
    with pytest.raises(CheckpointError, match=f"{SECOND} repeats the tensor a of {FIRST}"):
        open_folder(shards)
    (shards / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SECOND}, which {INDEX} names"):
        open_folder(shards)


def test_shards_without_an_index_are_refused(shards):
    (shards / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"holds {FIRST}, but not the index"):
        open_folder(shards)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "pytorch_model.bin", "model.ckpt", "x.PT"])
def test_folders_of_pickles_are_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"only pickled weights .*can run code.*safetensors.*convert"):
        open_folder(tmp_path)


def test_folders_without_weights(tmp_path):
    (tmp_path / f"{STEM}.onnx").touch()
    with pytest.raises(CheckpointError, match=f"holds no {STEM}"):
        open_folder(tmp_path)
    for folder in (tmp_path / "absent", tmp_path / f"{STEM}.onnx", Path("a\0b")):
        with pytest.raises(CheckpointError, match="cannot be read as a folder"):
            open_folder(folder)
