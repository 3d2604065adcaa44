"""What a folder says of its parts: found, named, and refused where it asks for code or is damaged."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.checkpoint.layout import find_parts
from sfumato.checkpoint.source import open_folder
from sfumato.errors import CheckpointError

STEM = "diffusion_pytorch_model"


def put(folder: Path, name: str) -> None:
    """A file of weights with one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.tensor(1.0)}, folder / name)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def model(tmp_path) -> Path:
    write(
        tmp_path / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": True,
            "sizes": [1, 2, 3],
        },
    )
    write(
        tmp_path / "scheduler/scheduler_config.json",
        {"beta_end": 0.012, "trained_betas": None, "shift": -1.5},
    )
    write(tmp_path / "tokenizer/tokenizer_config.json", {"model_max_length": 77})
    write(tmp_path / "unet/config.json", {"_class_name": "UNet2DConditionModel", "in_channels": 4})
    put(tmp_path / "unet", f"{STEM}.fp16.safetensors")
    write(tmp_path / "text_encoder/config.json", {"hidden_size": 768, "trust_remote_code": False})
    put(tmp_path / "text_encoder", "model.safetensors")
    return tmp_path


def test_the_parts_of_a_model_folder(model):
    layout = find_parts(model)
    assert layout.kind == "StableDiffusionPipeline"
    assert list(layout.parts) == ["scheduler", "text_encoder", "tokenizer", "unet"]
    assert layout.absent == ("safety_checker",)
    assert layout.options == {"force_zeros_for_empty_prompt": True, "sizes": [1, 2, 3]}
    unet = layout.parts["unet"]
    assert (unet.library, unet.kind, unet.stem) == ("diffusers", "UNet2DConditionModel", STEM)
    assert unet.config["in_channels"] == 4
    assert layout.parts["text_encoder"].stem == "model"
    assert layout.parts["scheduler"].config["shift"] == -1.5
    assert layout.parts["scheduler"].stem is None
    assert layout.parts["tokenizer"].config == {"model_max_length": 77}
    assert {**open_folder(unet.folder, STEM)}.keys() == {"a"}


def test_a_folder_that_is_one_part(tmp_path):
    write(tmp_path / "config.json", {"_class_name": "AutoencoderKL", "scaling_factor": 0.18215})
    put(tmp_path, f"{STEM}.safetensors")
    layout = find_parts(tmp_path)
    assert layout.kind == "AutoencoderKL"
    part = layout.parts["model"]
    assert (part.folder, part.stem, part.kind) == (tmp_path, STEM, "AutoencoderKL")


def test_a_folder_of_neither_kind(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model_index\.json nor config\.json"):
        find_parts(tmp_path)


CODE = {
    "auto_map": ("unet/config.json", {"auto_map": {"AutoModel": "trap.Trap"}}),
    "auto_map within": (
        "text_encoder/config.json",
        {"text_config": [{"auto_map": {"AutoModel": "trap.Trap"}}]},
    ),
    "auto_map of a tokenizer": (
        "tokenizer/tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["trap.Trap", None]}},
    ),
    "trust_remote_code": ("unet/config.json", {"trust_remote_code": True}),
    "class of a file": ("unet/config.json", {"_class_name": ["trap", "Trap"]}),
    "pipeline of a file": ("model_index.json", {"_class_name": ["trap", "Trap"]}),
    "part of a file": ("model_index.json", {"_class_name": "P", "unet": ["trap", "Trap"]}),
    "part of the standard library": ("model_index.json", {"_class_name": "P", "unet": ["os", "system"]}),
    "part of no library": ("model_index.json", {"_class_name": "P", "unet": [None, "Trap"]}),
}


@pytest.mark.parametrize("case", CODE)
def test_a_folder_that_asks_for_code_is_refused_and_none_is_run(model, case):
    file, value = CODE[case]
    write(model / file, value)
    for place in (model, model / "unet"):
        write(place / "trap.py", f"open({str(model / 'sprung')!r}, 'w')")
    with pytest.raises(CheckpointError, match=r"asks for code .*never run") as caught:
        find_parts(model)
    assert file in str(caught.value)
    assert not (model / "sprung").exists()
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    "file, value, said",
    [
        ("model_index.json", {"_class_name": "P", "../unet": ["diffusers", "X"]}, "cannot be a folder"),
        ("model_index.json", {"_class_name": "P", "unet": ["diffusers", "os.system"]}, "must name a class"),
        ("model_index.json", {"_class_name": "P", "unet": ["diffusers", None]}, "must name a class"),
        ("model_index.json", {}, "must name a class"),
        ("model_index.json", "[]", "a JSON list"),
        ("model_index.json", "{", "not readable JSON"),
        ("unet/config.json", '{"a": NaN}', "not readable JSON"),
        ("unet/config.json", '{"a": 1, "a": 2}', "stands twice"),
        ("unet/config.json", '{"a":' * 100_000 + "1" + "}" * 100_000, "not readable JSON"),
    ],
)
def test_damaged_descriptions_are_named(model, file, value, said):
    write(model / file, value)
    with pytest.raises(CheckpointError, match=said) as caught:
        find_parts(model)
    assert file in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_description_too_large_to_be_one(model):
    os.truncate(model / "unet/config.json", 2**40)
    with pytest.raises(CheckpointError, match="exceeds"):
        find_parts(model)
