"""What `sfumato inspect` says of files and folders, from their headers alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from sfumato.cli import inspect
from sfumato.errors import CheckpointError
from sfumato.families import describe
from sfumato.storage import file_hash

STEM = "diffusion_pytorch_model"


def run(*arguments: object) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(inspect.inspect)
    typer.main.get_command(app).main([str(argument) for argument in arguments], standalone_mode=False)


def report(capsys, *arguments: object) -> dict:
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> int:
    """A valid file of float16 tensors whose numbers were never written; returns its size."""
    header: dict[str, object] = {"__metadata__": metadata or {}}
    place = 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + place)
    return 8 + len(text) + place


def marks(kind: str, part: str, layout: str) -> dict[str, tuple[int, ...]]:
    """The tensors by which a kind of file is known."""
    table = json.loads(describe.TABLE.read_text())["signatures"]
    entry = next(e for e in table if (e.get("kind"), e.get("part"), e.get("layout")) == (kind, part, layout))
    return {name: tuple(side or 1 for side in shape or ()) for name, shape in entry["required"].items()}


def test_the_table_of_marks_is_that_of_the_families():
    """If not: python -m sfumato.families.describe."""
    assert json.loads(describe.TABLE.read_text()) == json.loads(json.dumps(describe.table()))


def test_the_table_is_written_as_it_is(tmp_path):
    describe.write_table(tmp_path / "marks.json")
    assert (tmp_path / "marks.json").read_bytes() == describe.TABLE.read_bytes()


# --- single files ------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_seven_gigabytes_is_told_without_reading_it(tmp_path, capsys):
    path = tmp_path / "xl.safetensors"
    shapes = marks("sdxl", "checkpoint", "original") | {
        "model.diffusion_model.rest": (51_000, 51_000),
        "first_stage_model.rest": (1000, 1000),
        "conditioner.embedders.0.transformer.rest": (1000, 1000),
        "conditioner.embedders.1.model.rest": (30_000, 30_000),
        "stray": (7,),
    }
    size = sparse(path, shapes, {"modelspec.title": "XL"})
    assert size > 6.9e9
    run(path)
    capsys.readouterr()  # what is imported is imported now
    before = read_so_far()
    told = report(capsys, path)
    assert read_so_far() - before < 2**20
    assert (told["family"], told["layout"], told["bytes"]) == ("sdxl", "original", size)
    assert told["metadata"] == {"modelspec.title": "XL"}
    assert told["autov1"] == hashlib.sha256(bytes(2**16)).hexdigest()[:8]
    unet = [shape for name, shape in shapes.items() if name.startswith("model.diffusion_model.")]
    assert told["parts"] == {
        "unet": counted(unet),
        "vae": counted([(1000, 1000)]),
        "text_encoder": counted([(1000, 1000)]),
        "text_encoder_2": counted([(30_000, 30_000)]),
        "other": counted([(7,)]),
    }


def counted(shapes: list[tuple[int, ...]]) -> dict:
    numbers = sum(math.prod(shape) for shape in shapes)
    return {"tensors": len(shapes), "parameters": numbers, "dtypes": {"F16": numbers}}


def read_so_far() -> int:
    """Bytes that this process has read from files."""
    if not Path("/proc/self/io").exists():
        return 0
    [line] = [x for x in Path("/proc/self/io").read_text().splitlines() if x.startswith("rchar")]
    return int(line.split()[1])


def test_a_network_alone_is_one_part(tmp_path, capsys):
    sparse(tmp_path / "v.safetensors", marks("f8c4", "vae", "diffusers"))
    told = report(capsys, tmp_path / "v.safetensors")
    assert told["family"] == "f8c4"
    assert list(told["parts"]) == ["vae"]


def test_what_is_recognised_and_refused_says_why(tmp_path, capsys):
    save_file(
        {"a.lora_down.weight": torch.ones(2, 2), "b.lora_down.weight": torch.ones(2)},
        tmp_path / "l.safetensors",
    )
    told = report(capsys, tmp_path / "l.safetensors")
    assert told["family"] == "unknown"
    assert told["adapter"] == "LoRA" and told["layout"] == "kohya"
    assert told["parts"] == {"denoiser": {"modules": 2}} and told["ranks"] == {"2": 1}


def test_mixed_types_and_a_file_of_nothing(tmp_path, capsys):
    save_file(
        {"a.x": torch.ones(3).half(), "a.y": torch.ones(2), "a.z": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    assert report(capsys, tmp_path / "m.safetensors")["parts"] == {
        "a": {"tensors": 3, "parameters": 6, "dtypes": {"F32": 3, "F16": 3}}
    }
    save_file({}, tmp_path / "n.safetensors")
    told = report(capsys, tmp_path / "n.safetensors")
    assert (told["family"], told["parts"], told["metadata"]) == ("unknown", {}, {})


def test_lines_for_people(tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    size = sparse(path, marks("f8c4", "vae", "diffusers"), {"format": "pt", "long": "x" * 500})
    run(path, "--hash")
    lines = capsys.readouterr().out.splitlines()
    assert f"path      {path}" in lines
    assert "family    f8c4 (diffusers names)" in lines
    assert f"bytes     {size:,}" in lines
    assert f"sha256    {file_hash(path)}  v.safetensors" in lines
    assert "metadata  format: pt" in lines
    assert "metadata  long: " + "x" * 100 + "…" in lines
    [part] = [line for line in lines if line.startswith("part")]
    assert part.split()[1] == "vae" and part.endswith("tensors of F16")


def test_nothing_in_a_file_reaches_the_terminal_raw(tmp_path, capsys):
    evil = "\x1b[2J[red]\r\n"
    path = tmp_path / "e.safetensors"
    sparse(path, {f"{evil}{i}.w": (1,) for i in range(50)}, {f"{evil}{i}": evil for i in range(50)})
    run(path)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert "part      and 30 more" in out and "metadata  and 30 more" in out
    assert len(out.splitlines()) < 60
    assert report(capsys, path)["metadata"][f"{evil}0"] == evil


def test_it_needs_no_torch(tmp_path):
    """Importing torch takes longer than all the rest."""
    path = tmp_path / "v.safetensors"
    sparse(path, marks("f8c4", "vae", "diffusers"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom sfumato.cli.inspect import inspect\n"
        "inspect(Path(sys.argv[1]), None, True, False)\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "family    f8c4" in done.stdout


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    for part, shapes in (
        ("unet", marks("sdxl", "unet", "diffusers")),
        ("vae", marks("f8c4", "vae", "diffusers")),
    ):
        sparse(tmp_path / part / f"{STEM}.fp16.safetensors", shapes)
        (tmp_path / part / "config.json").write_text("{}")
    return tmp_path


def test_a_diffusers_folder(model, capsys):
    told = report(capsys, model)
    assert (told["family"], told["pipeline"], told["absent"]) == (
        "sdxl",
        "StableDiffusionXLPipeline",
        ["text_encoder"],
    )
    assert {part: value["kind"] for part, value in told["parts"].items()} == {"unet": "sdxl", "vae": "f8c4"}
    unet = counted(list(marks("sdxl", "unet", "diffusers").values()))
    assert told["parts"]["unet"] == unet | {"kind": "sdxl"}
    assert told["bytes"] == sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    hashes = report(capsys, model, "--hash", "--variant", "fp16")["sha256"]
    assert hashes == {
        f"{p}/{STEM}.fp16.safetensors": file_hash(model / p / f"{STEM}.fp16.safetensors")
        for p in ("unet", "vae")
    }
    run(model)
    out = capsys.readouterr().out
    assert "pipeline  StableDiffusionXLPipeline" in out and "absent    text_encoder" in out


def test_shards_are_one_part(tmp_path, capsys):
    shapes = marks("f8c4", "vae", "diffusers")
    names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = len(shapes) // 2
    halves = [dict(list(shapes.items())[:half]), dict(list(shapes.items())[half:])]
    for name, part in zip(names, halves, strict=True):
        sparse(tmp_path / name, part)
    table = {key: name for name, part in zip(names, halves, strict=True) for key in part}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    told = report(capsys, tmp_path)
    assert (told["family"], told["pipeline"]) == ("f8c4", "AutoencoderKL")
    assert told["parts"]["model"]["tensors"] == len(shapes)


def test_a_folder_of_our_own(capsys):
    from sfumato.families import DEFAULT_MODEL, PACKAGED

    told = report(capsys, PACKAGED[DEFAULT_MODEL])
    assert told["family"] == DEFAULT_MODEL
    assert set(told["parts"]) == {"autoencoder", "denoiser", "temporal", "animator"}
    assert all(part["parameters"] > 10**5 for part in told["parts"].values())


def test_what_cannot_be_told_is_refused(model, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "m.ckpt").write_bytes(b"\x80\x02")
    for path, said in (
        (empty, "no model folder"),
        (empty / "m.ckpt", "pickled"),
        (empty / "absent", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(path)
    with pytest.raises(CheckpointError, match="variant 'bf16'; there is 'fp16'"):
        run(model, "--variant", "bf16")
    (model / "unet" / f"{STEM}.fp16.safetensors").rename(model / "unet" / f"{STEM}.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        run(model)
