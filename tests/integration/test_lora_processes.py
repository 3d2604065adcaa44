"""A LoRA trained by two processes where some factors are never asked for: the last layer of a text encoder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import small_sd
from sfumato.storage import load_tensors

pytestmark = pytest.mark.full

TRAIN = """
import sys
import torch
import small_sd
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.train import run
from sfumato.train.recipe import parse_recipe

torch.set_num_threads(1)
SYSTEMS.update(small_sd.SMALL)
base, pictures, out = sys.argv[1:]
recipe = parse_recipe({
    "name": "two",
    "data": {"size": 32},
    "lora": {"base": base, "rank": 2, "dtype": "float32", "targets": "all", "text": True,
             "train": {"steps": 3, "batch": 4, "microbatch": 1, "lr": 1e-2, "precision": "float32", "sheet_every": 9}},
})
run(recipe, data=pictures, out=out, device="cpu")
"""


def trained(base: Path, pictures: Path, out: Path, processes: int) -> dict[str, torch.Tensor]:
    script = out.parent / "train.py"
    script.write_text(TRAIN, encoding="utf-8")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(several if processes > 1 else []),
        str(script),
        str(base),
        str(pictures),
        str(out),
    ]
    path = os.pathsep.join([str(Path(small_sd.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_tensors(out / "two.safetensors")


def test_two_processes_make_what_one_makes(tmp_path):
    base = small_sd.write("sdxl", tmp_path / "base")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(4):
        picture = np.full((32, 32, 3), 60 * k, np.uint8)
        Image.fromarray(picture).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"grey {k}", encoding="utf-8")
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    one, two = (trained(base, pictures, tmp_path / name / "run", int(name)) for name in ("1", "2"))
    assert one.keys() == two.keys()
    unasked = [
        name for name in one if "text_model.encoder.layers.1" in name and name.endswith("lora_B.weight")
    ]
    assert unasked and any(not one[name].any() for name in unasked)  # up began at zero, and nothing moved it
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-4, rtol=2e-3), name
