"""What is said of a LoRA beside its file or in its header, by PEFT and diffusers: alpha, and patterns of modules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import save_file

from lora_files import RANK, factors, layers, lora_bases, read
from sfumato.adapters.lora import read_lora
from sfumato.checkpoint.rules import shapes
from sfumato.errors import CheckpointError


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return lora_bases(tmp_path_factory.mktemp("bases"))


def test_peft_says_alpha_beside_the_file(bases, tmp_path):
    names, parts = bases["sd1"]
    modules = [f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk"]
    tensors = {}
    for module in modules:
        up, down = factors(parts["unet"], module)
        tensors |= {
            f"base_model.model.{module}.lora_B.weight": up,
            f"base_model.model.{module}.lora_A.weight": down,
        }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn1.to_k": 1.5}}

    def scales() -> list[float]:
        found = read_lora(tmp_path, names, {n: shapes(p) for n, p in parts.items()})
        assert found.name == tmp_path.name
        return [found.deltas["unet"][f"{m}.weight"].scale for m in modules]

    assert scales() == [1.0, 1.0]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert scales() == [2.0, 0.5]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert scales() == pytest.approx([6 / math.sqrt(RANK), 1.5 / math.sqrt(RANK)])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT"}))
    with pytest.raises(CheckpointError, match="is of 'OFT'; LORA is read here"):
        scales()
    for key, value in (("fan_in_fan_out", True), ("init_lora_weights", "pissa_niter_4")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=f"has {key}"):
            scales()


def test_patterns_of_alpha_are_those_of_peft(bases, tmp_path):
    """As PEFT's own function tells them, which key of several being the first that matches."""
    from peft.utils.other import get_pattern_key

    part = bases["sd1"][1]["unet"]
    found = [m for m in layers(part) if "mid_block" in m]
    patterns = {
        "^mid_block.resnets.0.conv1": 1, ".*resnets.*time_.*proj": 13, "ff.net.(0|1|2|3|4|5|6|7|8|9|10|11)$": 15,
        r".*attn1\.to_[qk]": 2, "to_v": 3, "attentions.0.proj_(in|out)": 5,
        r"to_out\.\d": 7, "conv2|conv1": 9,
    }  # fmt: skip
    tensors = {}
    for module in found:
        up, down = factors(part, module)
        tensors |= {f"unet.{module}.lora_B.weight": up, f"unet.{module}.lora_A.weight": down}
    note = {"unet.lora_alpha": 11, "unet.alpha_pattern": patterns}
    deltas = read(bases, "sd1", tensors, tmp_path, {"lora_adapter_metadata": json.dumps(note)}).deltas["unet"]
    right = {m: patterns.get(get_pattern_key(patterns, m), 11) for m in found}
    assert set(right.values()) == {1, 2, 3, 5, 7, 9, 11, 13, 15}
    assert {m: deltas[f"{m}.weight"].scale for m in found} == {m: a / RANK for m, a in right.items()}
    for pattern, said in (
        ("to_nothing", r"alpha_pattern to_nothing \(matches no module of the file\); .* `partial`"),
        ("to_(q", "'?to_\\(q'? is no regular expression"),
        ("(.+)+x", r"\+ is not read there in the pattern"),
        ("(?x:(.+) +)Z", r"\? is not read there"),
        ("x\ny", "is not read there"),
        (r"(x)\1", r"\\1.? is not read there"),
        ("x.*.*.*.*y", "too many ways; up to 3 of"),
        ("(x|x)" * 13, "too many ways"),
    ):
        note = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 1}})}
        with pytest.raises(CheckpointError, match=said):
            read(bases, "sd1", tensors, tmp_path, note)
    note = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"to_nothing": 1}})}
    left = read(bases, "sd1", tensors, tmp_path, note, partial=True).report.left
    assert left == {"alpha_pattern to_nothing": "matches no module of the file"}


@pytest.mark.parametrize("pattern", [".*a.*a.*a", "(a|a)(a|a)(a|a)(a|a).*a.*x", "a.a|" * 255 + r".+\d"])
def test_no_pattern_takes_long(pattern):
    """Not even of names that are made for it, which are longer than a model's or as long."""
    from time import process_time

    from sfumato.adapters.config import LONGEST, NOTE, peft_config

    config = peft_config(Path("x"), {NOTE: json.dumps({"alpha_pattern": {pattern: 1}})})
    start = process_time()
    config.unused(["a." * (LONGEST // 2 - 1) + "by", "a." * 10**5 + "y"])
    assert process_time() - start < 1


def test_diffusers_says_alpha_in_the_header(bases, tmp_path):
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    up, down = factors(bases["sd1"][1]["unet"], module)
    note = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 12, "text_encoder.lora_alpha": 1})}
    tensors = {f"unet.{module}.lora_B.weight": up, f"unet.{module}.lora_A.weight": down}
    assert read(bases, "sd1", tensors, tmp_path, note).deltas["unet"][f"{module}.weight"].scale == 12 / RANK


def test_what_is_said_of_one_encoder_is_not_said_of_another(bases, tmp_path):
    tensors, path = {}, "text_model.encoder.layers.0.self_attn.q_proj"
    for part in ("text_encoder", "text_encoder_2"):
        up, down = factors(
            bases["sdxl"][1][part], next(m for m in layers(bases["sdxl"][1][part]) if "q_proj" in m)
        )
        tensors |= {f"{part}.{path}.lora_B.weight": up, f"{part}.{path}.lora_A.weight": down}
    told = {"text_encoder.alpha_pattern": {"q_proj": 8}, "text_encoder_2.alpha_pattern": {"q_proj": 2}}
    note = {"lora_adapter_metadata": json.dumps(told | {"text_encoder_2.use_rslora": True})}
    deltas = read(bases, "sdxl", tensors, tmp_path, note).deltas
    scales = [next(iter(deltas[part].values())).scale for part in ("text_encoder", "text_encoder_2")]
    assert scales == pytest.approx([8 / RANK, 2 / math.sqrt(RANK)])
