"""ControlNet files: every layout to the same tensors, relatives and damage refused by name, and how they are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import small_control as small
from helpers import noise
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published.openers import plain_network
from sfumato.families.sd.controlnet import control_map, open_control
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.planning import plan_of
from sfumato.storage import save_tensors
from sfumato.types import Control, Request
from small_sd import SMALL, write

CPU = torch.device("cpu")
KINDS = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_holds_all_names_of_the_network_and_as_many_as_published(kind):
    config = ControlNetConfig(SYSTEMS[kind].unet)
    with torch.device("meta"):
        names = ControlNet(config).state_dict()
    table = control_map(config)
    assert sorted(table.ours) == sorted(names)
    assert len(set(table.theirs)) == len(names)


@pytest.mark.parametrize("layout", ["diffusers", "original", "prefixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_gives_the_same_tensors(tmp_path, kind, layout):
    found = open_control(small.file(tmp_path / "c.safetensors", kind, layout), systems=SMALL)
    expected = small.network(kind).state_dict()
    assert (found.kind, found.config) == (kind, small.config_of(kind))
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_names_of_real_files_stand_in_the_table():
    table = control_map(ControlNetConfig(SYSTEMS["sd1"].unet))
    pairs = dict(zip(table.theirs, table.ours, strict=True))
    assert pairs["input_hint_block.14.weight"] == "controlnet_cond_embedding.conv_out.weight"
    assert pairs["input_hint_block.2.bias"] == "controlnet_cond_embedding.blocks.0.bias"
    assert pairs["zero_convs.11.0.weight"] == "controlnet_down_blocks.11.weight"
    assert pairs["middle_block_out.0.bias"] == "controlnet_mid_block.bias"
    assert pairs["input_blocks.3.0.op.weight"] == "down_blocks.0.downsamplers.0.conv.weight"


def test_a_checkpoint_around_it_is_left_by_name(tmp_path):
    held = small.tensors("sd1", "prefixed") | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_tensors(tmp_path / "c.safetensors", held)
    found = open_control(tmp_path / "c.safetensors", systems=SMALL)
    assert list(found.tensors.report.dropped) == ["model.diffusion_model.out.2.bias"]


def test_a_folder_says_what_tensors_do_not(tmp_path):
    place = small.folder(
        tmp_path / "c", "sd1", global_pool_conditions=True, controlnet_conditioning_channel_order="bgr"
    )
    config = open_control(place, systems=SMALL).config
    assert config.pooled and config.bgr
    place = small.folder(tmp_path / "d", "sd1", controlnet_conditioning_channel_order="grb")
    with pytest.raises(CheckpointError, match="'grb'; rgb and bgr are known"):
        open_control(place, systems=SMALL)


def test_half_precision_is_drawn_in_what_is_asked(tmp_path):
    found = open_control(small.file(tmp_path / "c.safetensors", "sd1", dtype=torch.float16), systems=SMALL)
    assert {found.tensors.info(name)[0] for name in found.tensors} == {torch.float16}
    made = plain_network(found.config, found.tensors, found.source, torch.float32, CPU)
    assert {p.dtype for p in made.parameters()} == {torch.float32}


RELATIVES = {
    "a union ControlNet": {"task_embedding": (6, 320), "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "a ControlNet of SD3": {"controlnet_blocks.0.weight": (2, 2), "pos_embed_input.proj.weight": (2, 2)},
    "a ControlNet of FLUX": {"controlnet_x_embedder.weight": (2, 2)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (2, 2)},
    "a Control-LoRA": {"lora_controlnet": (0,)},
    "a ControlLLLite": {"lllite_unet_input_blocks_4_1.conditioning1.0.weight": (2, 2)},
    "its difference from a base model": {"difference": (0,), "control_model.time_embed.0.weight": (2, 2)},
    "an IP-Adapter": {"image_proj.proj.weight": (2, 2)},
    "a LoRA, not a ControlNet": {"lora_unet_x.lora_down.weight": (2, 2)},
}  # fmt: skip


@pytest.mark.parametrize("words", RELATIVES)
def test_relatives_are_refused_by_name(tmp_path, words):
    save_tensors(
        tmp_path / "c.safetensors", {name: torch.zeros(shape) for name, shape in RELATIVES[words].items()}
    )
    with pytest.raises(CheckpointError, match=f"cannot be used: this is .*{words}"):
        open_control(tmp_path / "c.safetensors", systems=SMALL)


def test_two_layouts_in_one_file_are_refused(tmp_path):
    mixed = small.tensors("sd1") | {"input_hint_block.0.weight": torch.zeros(8, 3, 3, 3)}
    save_tensors(tmp_path / "c.safetensors", mixed)
    with pytest.raises(CheckpointError, match="a mixture of two layouts"):
        open_control(tmp_path / "c.safetensors", systems=SMALL)


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path):
    held = small.tensors("sd1")
    del held["controlnet_down_blocks.1.bias"]
    save_tensors(tmp_path / "c.safetensors", held | {"stranger": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 missing: .*down_blocks\.1\.bias.*1 unexpected: .*stranger"):
        open_control(tmp_path / "c.safetensors", systems=SMALL)


def test_a_cut_file_is_refused(tmp_path):
    place = small.file(tmp_path / "c.safetensors", "sd1")
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="safetensors"):
        open_control(place, systems=SMALL)


def test_one_without_attention_in_its_middle_is_refused(tmp_path):
    held = {k: v for k, v in small.tensors("sdxl").items() if not k.startswith("mid_block.attentions")}
    save_tensors(tmp_path / "c.safetensors", held)
    with pytest.raises(CheckpointError, match="without attention in its middle"):
        open_control(tmp_path / "c.safetensors", systems=SMALL)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return open_system(write("sd1", tmp_path_factory.mktemp("m") / "m"), CPU, torch.float32, systems=SMALL)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_one_of_another_family_is_refused_with_both_widths(tmp_path, system, kind):
    place = small.file(tmp_path / "c.safetensors", kind)
    with pytest.raises(
        InputError, match=rf"is a ControlNet of {kind}, which reads text .* the model is of sd1"
    ) as told:
        system.with_controls({"canny": place}, SMALL)
    assert told.value.argument == "controlnet"


def test_another_engine_takes_none(tmp_path, system):
    place = small.file(tmp_path / "c.safetensors", "sd1")
    with pytest.raises(
        InputError, match="ControlNets go with the engine torch; openvino runs a U-Net as it is"
    ):
        replace(system, engine="openvino").with_controls({"canny": place}, SMALL)


def drawn(model: Model, **changes) -> torch.Tensor:
    control = Control("canny", noise(32, 32), weight=0.8)
    request = Request("a cat", steps=3, guidance=4.0, sampler="euler", size=(32, 32), controls=(control,))
    request = model.complete(request)
    return model.sample(model.condition(request), request.seeds(), request)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_it_draws_the_same_however_networks_are_kept(tmp_path, system, offload):
    place = small.file(tmp_path / "c.safetensors", "sd1")
    having = system.with_controls({"canny": place}, SMALL)
    there, elsewhere = (Model(s, CPU, "m") for s in (having, having.offloaded(offload)))
    assert torch.equal(drawn(there), drawn(elsewhere))
    assert list(having.controlnets._held) == ["canny"]
    assert not elsewhere.system.controlnets._held


def test_the_plan_of_memory_counts_it(tmp_path, system):
    place = small.file(tmp_path / "c.safetensors", "sd1")
    model = Model(system.with_controls({"canny": place}, SMALL), CPU, "m")
    bare = Request("a cat", size=(32, 32), steps=2)
    shown = Request("a cat", size=(32, 32), steps=2, controls=(Control("canny", noise(32, 32)),))
    weights = 4 * sum(p.numel() for p in small.network("sd1").parameters())
    for offload in ("none", "model"):
        without, having = (
            next(s for s in plan_of(model, request, offload, None).stages if s.name == "denoise")
            for request in (bare, shown)
        )
        assert having.weights - without.weights == pytest.approx(weights, rel=0.05)
        assert having.activations > without.activations


def test_in_bfloat16_and_eight_bits_its_layers_are_packed(tmp_path):
    from sfumato.nn.packed import PackedConv2d

    found = open_control(small.file(tmp_path / "c.safetensors", "sd1"), systems=SMALL)
    made = found.network(CPU, torch.bfloat16)
    assert any(isinstance(m, PackedConv2d) for m in made.modules())
    exact = found.network(CPU, torch.float32)
    for dtype in (torch.bfloat16, torch.int8):
        made = found.network(CPU, dtype)
        x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
        pixels = torch.rand(1, 3, 32, 32)
        answers = [
            torch.cat(
                [t.float().flatten() for t in net(x, torch.tensor(500.0), context, hint=net.features(pixels))]
            )
            for net in (exact, made)
        ]
        error = (answers[1] - answers[0]).norm() / answers[0].norm()
        assert error < 0.1
