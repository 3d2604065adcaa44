"""A checkpoint of full size is converted in the memory of a few of its tensors."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.checkpoint.rules import shapes
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.nn.unet import UNet
from sfumato.text.clip import ClipTextEncoder

CODE = """
import resource, sys, torch
from sfumato.families.convert import convert
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
written = convert(sys.argv[1], sys.argv[2], dtype=torch.bfloat16)
print(written.size, peak() - before)
"""


@pytest.mark.full
@pytest.mark.parametrize("target", ["folder", "bf16.safetensors"])
def test_memory_holds_a_few_tensors_and_not_the_model(target, tmp_path):
    system = SYSTEMS["sd1"]
    with torch.device("meta"):
        parts = {"unet": UNet(system.unet), "vae": AutoencoderKL(system.vae)}
        parts |= {part.name: ClipTextEncoder(part.config) for part in system.text}
    ours = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    ours = {name: tensor for name, tensor in ours.items() if "position_ids" not in name}
    header, end = {}, 0
    for name, shape in shapes(FAMILY.file_map(system).to_theirs(ours)).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "sd1.safetensors", "wb") as stream:  # zeros that take no place on the disk
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)

    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "sd1.safetensors"), str(tmp_path / target)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    size, growth = map(int, done.stdout.split())
    assert size == end > 2e9
    assert growth < 400 * 2**20
