"""LoRA files of every naming on small Stable Diffusions: the same change whatever the names; refusals of one line."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_files import KINDS, RANK, factors, layers, lora_bases, read
from sfumato.adapters.delta import change_of
from sfumato.adapters.lora import read_lora
from sfumato.adapters.names import Names, PartNames, modules
from sfumato.checkpoint.rules import KeyMap, Rename, Split, shapes
from sfumato.errors import CheckpointError, InputError
from sfumato.families.lora import require_family
from sfumato.families.published.adapters import adapters_of, few_steps
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.keys import unet_map
from small_sd import SMALL


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return lora_bases(tmp_path_factory.mktemp("bases"))


def original(kind: str) -> dict[str, str]:
    """Our modules → their names in single files."""
    rules = unet_map(SMALL[kind].unet).rules
    return {
        r.ours.removesuffix(".weight"): r.theirs.removesuffix(".weight")
        for r in rules
        if r.ours.endswith(".weight")
    }


def flat(path: str) -> str:
    return path.replace(".", "_")


def processor(path: str) -> str:
    """`attn1.to_out.0` → `attn1.processor.to_out`, as diffusers once had it."""
    head, _, last = path.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{last}"


KOHYA, PEFT = (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")
UNET_NAMES = {  # how each tool spells a module of the U-Net, and the two endings
    "kohya": (lambda kind, m: f"lora_unet_{flat(m)}", KOHYA),
    "kohya, original names": (lambda kind, m: f"lora_unet_{flat(original(kind)[m])}", KOHYA),
    "LyCORIS' wrapper, SimpleTuner": (lambda kind, m: f"lycoris_{flat(m)}", KOHYA),
    "diffusers, PEFT": (lambda kind, m: f"unet.{m}", PEFT),
    "PEFT": (lambda kind, m: f"base_model.model.{m}", PEFT),
    "PEFT with a name": (
        lambda kind, m: f"base_model.model.unet.{m}", (".lora_B.default.weight", ".lora_A.default.weight")
    ),
    "diffusers": (lambda kind, m: f"unet.{m}", (".lora.up.weight", ".lora.down.weight")),
    "original paths": (lambda kind, m: f"diffusion_model.{original(kind)[m]}", PEFT),
    "dotted kohya, OneTrainer": (lambda kind, m: f"lora_unet.{m}", KOHYA),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", UNET_NAMES)
def test_every_module_of_the_unet_by_every_name(bases, tmp_path, kind, spelling):
    name, (up_end, down_end) = UNET_NAMES[spelling]
    part = bases[kind][1]["unet"]
    tensors: dict[str, Tensor] = {}
    for module in layers(part):
        up, down = factors(part, module)
        tensors |= {name(kind, module) + up_end: up, name(kind, module) + down_end: down}
    found = read(bases, kind, tensors, tmp_path)
    assert set(found.deltas) == {"unet"} and len(found.report.matched) == len(tensors)
    assert {f"{m}.weight" for m in layers(part)} == set(found.deltas["unet"])
    for module in layers(part):
        up, down = (tensor.flatten(1).double() for tensor in factors(part, module))
        change = change_of(found.deltas["unet"][f"{module}.weight"], part[f"{module}.weight"])
        assert torch.allclose(change.double().flatten(1), up @ down, atol=1e-4)


def test_the_attention_processors_of_old_diffusers(bases, tmp_path):
    part = bases["sd1"][1]["unet"]
    modules = [m for m in layers(part) if ".attn" in m]
    tensors = {}
    for module in modules:
        up, down = factors(part, module)
        tensors |= {f"{processor(module)}_lora.up.weight": up, f"{processor(module)}_lora.down.weight": down}
    found = read(bases, "sd1", tensors, tmp_path)
    assert set(found.deltas["unet"]) == {f"{m}.weight" for m in modules}
    assert found.report.formats == ("diffusers (old)",)


TEXT_NAMES = {
    "kohya": (lambda n, m: f"lora_te{n}_{flat(m)}", KOHYA),
    "diffusers, PEFT": (lambda n, m: f"text_encoder{n and f'_{n}' if n == 2 else ''}.{m}", PEFT),
    "diffusers": (
        lambda n, m: f"text_encoder{'_2' if n == 2 else ''}.{m}",
        (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    ),
    "PEFT without text_model": (
        lambda n, m: f"text_encoder{'_2' if n == 2 else ''}.{m.removeprefix('text_model.')}",
        PEFT,
    ),
}


@pytest.mark.parametrize("spelling", TEXT_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders_by_every_name(bases, tmp_path, kind, spelling):
    name, (up_end, down_end) = TEXT_NAMES[spelling]
    parts = {n: p for n, p in bases[kind][1].items() if n.startswith("text")}
    tensors: dict[str, Tensor] = {}
    for place, part in enumerate(parts.values(), 1):
        number = place if len(parts) > 1 else ""
        for module in layers(part):
            up, down = factors(part, module)
            tensors |= {name(number, module) + up_end: up, name(number, module) + down_end: down}
    found = read(bases, kind, tensors, tmp_path)
    assert found.report.modules == {n: len(layers(p)) for n, p in parts.items()}


def one(
    bases, kind="sd1", module="mid_block.attentions.0.transformer_blocks.0.attn1.to_q", name=None
) -> dict[str, Tensor]:
    up, down = factors(bases[kind][1]["unet"], module)
    key = name or f"lora_unet_{flat(module)}"
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}


def test_alpha_belongs_to_the_module(bases, tmp_path):
    """Where diffusers gives all the most common one."""
    tensors: dict[str, Tensor] = {}
    modules = [f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qkv"]
    for n, module in enumerate(modules):
        tensors |= one(bases, module=module) | {f"lora_unet_{flat(module)}.alpha": torch.tensor(2.0**n)}
    deltas = read(bases, "sd1", tensors, tmp_path).deltas["unet"]
    assert [deltas[f"{m}.weight"].scale for m in modules] == [2.0**n / RANK for n in range(3)]


def test_norms_and_biases_of_lycoris(bases, tmp_path):
    part = bases["sd1"][1]["unet"]
    tensors = {
        "lora_unet_conv_norm_out.w_norm": torch.ones(part.info("conv_norm_out.weight")[1]),
        "lora_unet_conv_norm_out.b_norm": torch.ones(part.info("conv_norm_out.bias")[1]),
        "lora_unet_conv_in.diff": torch.ones(part.info("conv_in.weight")[1]),
        "lora_unet_conv_in.diff_b": torch.ones(part.info("conv_in.bias")[1]),
    }
    found = read(bases, "sd1", tensors, tmp_path)
    assert set(found.deltas["unet"]) == {
        f"conv_{n}.{p}" for n in ("norm_out", "in") for p in ("weight", "bias")
    }


def test_formats_may_share_a_file_but_not_a_module(bases, tmp_path):
    q, k = (f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qk")
    both = one(bases, module=q) | one(bases, module=k, name=f"lora_unet_{flat(original('sd1')[k])}")
    assert read(bases, "sd1", both, tmp_path).report.modules == {"unet": 2}
    up, down = factors(bases["sd1"][1]["unet"], q)
    twice = one(bases, module=q) | {f"unet.{q}.lora_B.weight": up, f"unet.{q}.lora_A.weight": down}
    with pytest.raises(CheckpointError, match=r"changes unet .*to_q\.weight twice.*two formats in one file"):
        read(bases, "sd1", twice, tmp_path)


def refused(bases, tmp_path, tensors, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(bases, "sd1", tensors, tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_dropped_silently(bases, tmp_path):
    good = one(bases)
    bad = good | {"lora_te3_nowhere.lora_up.weight": torch.ones(4, 2), "something": torch.ones(1)}
    said = refused(bases, tmp_path, bad)
    assert (
        "2 of 4 tensors have no place" in said
        and "lora_te3_nowhere.lora_up.weight (no module of sd1)" in said
    )
    assert "something (no part of a LoRA)" in said and said.endswith("take the rest with `partial`")
    found = read(bases, "sd1", bad, tmp_path, partial=True)
    assert set(found.report.left) == {"lora_te3_nowhere.lora_up.weight", "something"}
    assert "2 left out" in found.report.describe()


def test_nothing_at_all_is_an_error_even_in_part(bases, tmp_path):
    said = refused(bases, tmp_path, {"lora_unet_x.lora_up.weight": torch.ones(4, 2)}, partial=True)
    assert "has nothing for this sd1 model" in said and "lora_unet_x" in said


@pytest.mark.parametrize("ending", ["oft_blocks", "a1.weight", "lora_E"])
def test_kinds_that_are_not_read_are_named(bases, tmp_path, ending):
    said = refused(bases, tmp_path, one(bases) | {f"lora_unet_conv_in.{ending}": torch.ones(2, 2)})
    assert {"oft_blocks": "OFT", "a1.weight": "GLoRA", "lora_E": "AdaLoRA"}[
        ending
    ] + " is not read here" in said


def test_shapes_of_another_model(bases, tmp_path):
    name = next(iter(one(bases))).partition(".")[0]
    tensors = {f"{name}.lora_up.weight": torch.ones(999, 2), f"{name}.lora_down.weight": torch.ones(2, 64)}
    assert "shape (999, 64) for a (64, 64) of the model" in refused(bases, tmp_path, tensors)
    assert "a LoRA without its down" in refused(
        bases, tmp_path, {f"{name}.lora_up.weight": torch.ones(64, 2)}
    )
    lonely = {f"{name}.alpha": torch.tensor(1.0)}
    assert "a number without what it scales" in refused(bases, tmp_path, lonely)
    norm = {"lora_unet_conv_norm_out.diff_b": torch.ones(3)}
    assert "shape (3,) for a (32,)" in refused(bases, tmp_path, norm)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none(bases, tmp_path, value):
    tensors = one(bases)
    first = next(iter(tensors))
    tensors[first] = tensors[first].index_fill(0, torch.tensor([0]), value)
    assert f"{first} holds NaN or infinite values" in refused(bases, tmp_path, tensors)
    tensors = one(bases)
    tensors[first.replace("lora_up.weight", "alpha")] = torch.tensor(value)
    for partial in (False, True):
        said = refused(bases, tmp_path, tensors, partial=partial)
        assert said.endswith("alpha holds NaN or infinite values; the file is unusable")


def test_whole_numbers_are_no_weights(bases, tmp_path):
    tensors = one(bases)
    first = next(iter(tensors))
    tensors[first] = torch.ones_like(tensors[first], dtype=torch.int8)
    said = refused(bases, tmp_path, tensors)
    assert said.endswith(f"{first} is of int8; floating-point numbers are right")


@pytest.mark.parametrize(
    ("endings", "kind"),
    [(["oft_blocks", "alpha"], "OFT"), (["a1.weight", "b2.weight"], "GLoRA"), (["on_input"], "IA3")],
)
def test_a_file_of_nothing_but_a_kind_that_is_not_read_names_it(bases, tmp_path, endings, kind):
    save_file({f"lora_unet_conv_in.{end}": torch.ones(2, 2) for end in endings}, tmp_path / "ink.safetensors")
    with pytest.raises(CheckpointError, match=rf"is of {kind}, a kind of adapter that is not read"):
        adapters(bases, "sd1").attach(tmp_path / "ink.safetensors")


@pytest.mark.parametrize(
    ("kind", "clip", "part"),
    [
        ("sd1", "clip_l", "text_encoder"),
        ("sd2", "clip_h", "text_encoder"),
        ("sdxl", "clip_g", "text_encoder_2"),
    ],
)
def test_text_encoders_by_comfyuis_names(bases, tmp_path, kind, clip, part):
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    up, down = factors(bases[kind][1][part], module)
    name = f"text_encoders.{clip}.transformer.{module}"
    found = read(bases, kind, {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path)
    assert list(found.deltas[part]) == [f"{module}.weight"]


def test_self_attention_alone_tells_a_unet_and_its_depth_sdxl(bases, tmp_path):
    place = tmp_path / "ink.safetensors"
    head = "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q"
    up, down = torch.ones(4, 1), torch.ones(1, 4)
    save_file({f"{head}.lora_up.weight": up, f"{head}.lora_down.weight": down}, place)
    with pytest.raises(CheckpointError, match="is a LoRA for Stable Diffusion XL"):
        adapters(bases, "sd1").attach(place)
    head = head.replace("blocks_9", "blocks_0")
    save_file({f"{head}.lora_up.weight": up, f"{head}.lora_down.weight": down}, place)
    with pytest.raises(CheckpointError, match=r"for a U-Net, as .* XL have; this model is pocket"):
        require_family(place, "pocket")


def test_a_file_cut_short(bases, tmp_path):
    read(bases, "sd1", one(bases), tmp_path)
    file = tmp_path / "ink.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    names, parts = bases["sd1"]
    with pytest.raises(CheckpointError, match="cut short"):
        read_lora(file, names, {n: shapes(p) for n, p in parts.items()})
    with pytest.raises(CheckpointError, match="pickled"):
        (tmp_path / "ink.pt").write_bytes(b"PK\x03\x04")
        read_lora(tmp_path / "ink.pt", names, {})
    with pytest.raises(CheckpointError, match="without adapter_model"):
        (tmp_path / "empty").mkdir()
        read_lora(tmp_path / "empty", names, {})


WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
MODULE = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


def adapters(bases, kind: str):
    return adapters_of(FAMILY, kind, SMALL[kind], bases[kind][1], lambda touched: None)


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_a_lora_of_another_family_says_so(bases, tmp_path, ours, theirs):
    width = WIDTHS[theirs]
    save_file(
        {f"{MODULE}.lora_up.weight": torch.ones(320, 1), f"{MODULE}.lora_down.weight": torch.ones(1, width)},
        tmp_path / "ink.safetensors",
    )
    with pytest.raises(CheckpointError) as caught:
        adapters(bases, ours).attach(tmp_path / "ink.safetensors")
    said = f"its cross-attention reads texts of width {width}"
    assert (said in str(caught.value)) == (ours != theirs)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 1536)}, "for Stable Diffusion 3"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 1536)}, "for Stable Diffusion 3"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "for FLUX"),
        ({"dit.blocks.0.attn.qkv.lora_A.weight": (4, 320)}, "for pocket"),
        ({"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": (4, 1024)}, "Diffusion 2"),
        ({"model.weight": (4, 4)}, "is no LoRA"),
    ],
)  # fmt: skip
def test_other_neighbours_are_told_too(bases, tmp_path, tensors, said):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "ink.safetensors")
    with pytest.raises(CheckpointError, match=said):
        adapters(bases, "sd1").attach(tmp_path / "ink.safetensors")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e9, "1"])
def test_weights_that_are_none(bases, tmp_path, weight):
    read(bases, "sd1", one(bases), tmp_path)
    with pytest.raises(InputError, match="weight of LoRA"):
        adapters(bases, "sd1").attach(tmp_path / "ink.safetensors", weight)
    with pytest.raises(InputError, match='factor of "mid"'):
        adapters(bases, "sd1").attach(tmp_path / "ink.safetensors", blocks={"mid": weight})


def test_blocks_that_do_not_exist(bases, tmp_path):
    read(bases, "sd1", one(bases), tmp_path)
    with pytest.raises(
        InputError, match=r'sd1 has no block "down\.9"; there are unet, down, mid, up, text, text1'
    ):
        adapters(bases, "sd1").attach(tmp_path / "ink.safetensors", blocks={"down.9": 0.5})


@pytest.mark.parametrize(
    ("name", "notes", "wanted"),
    [
        ("lcm-lora-sdxl", {}, ("lcm", "lcm", 4)),
        ("pytorch_lora_weights", {"modelspec.title": "LCM for SD 1.5"}, ("lcm", "lcm", 4)),
        ("sdxl_lightning_8step_lora", {}, ("euler", "trailing", 8)),
        ("Hyper-SD15-8steps-lora", {}, ("ddim", "trailing", 8)),
        ("sd_xl_turbo_lora_v1", {}, ("euler", "trailing", 4)),
        ("lcmartist", {}, None),
        ("hyper-detailed", {}, None),
        ("lightning-storm", {}, None),
        ("ink", {"modelspec.title": "turbo", "ss_training_comment": "hyper detailed skin"}, None),
        ("ink", {"modelspec.title": "SDXL Lightning", "ss_output_name": "4step"}, ("euler", "trailing", 4)),
        ("Hyper_SDXL", {}, ("ddim", "trailing", 4)),
        ("ink", {"ss_output_name": "ink"}, None),
    ],
)
def test_loras_for_few_steps_bring_their_way_of_drawing(bases, tmp_path, name, notes, wanted):
    found = read(bases, "sd1", one(bases), tmp_path, notes or None, name=name)
    preset = few_steps(found, FAMILY.naming.few).fields
    right = {} if wanted is None else dict(zip(("sampler", "schedule", "steps"), wanted, strict=True))
    assert preset == (right | {"guidance": 1.0} if right else {})


def test_how_much_it_changes(bases, tmp_path):
    parts = bases["sd1"][1]
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    found = read(bases, "sd1", one(bases), tmp_path)
    up, down = factors(parts["unet"], module)
    right = float((up.double() @ down.double()).norm() / parts["unet"][f"{module}.weight"].double().norm())
    assert found.relative(parts) == {"unet": pytest.approx(right, rel=1e-5)}


def test_a_fused_layer_of_theirs_is_three_of_ours(tmp_path):
    """As in Stable Diffusion 3, whose original names have one layer for q, k and v: a table says it all."""
    table = KeyMap(
        (
            Split(
                "joint_blocks.0.qkv.weight", ("block.to_q.weight", "block.to_k.weight", "block.to_v.weight")
            ),
            Rename("joint_blocks.0.proj.weight", "block.to_out.weight"),
        )
    )
    names = Names("sd3", (PartNames("transformer", (modules(table),), ("transformer.",), ("lora_unet_",)),))
    up, down = torch.randn(3 * 8, 2), torch.randn(2, 8)
    sizes = {"transformer": {f"block.to_{x}.weight": (8, 8) for x in ("q", "k", "v", "out")}}
    for key, ends in (("lora_unet_joint_blocks_0_qkv", KOHYA), ("transformer.joint_blocks.0.qkv", PEFT)):
        save_file({key + ends[0]: up, key + ends[1]: down}, tmp_path / "ink.safetensors")
        deltas = read_lora(tmp_path / "ink.safetensors", names, sizes).deltas["transformer"]
        found = [change_of(deltas[f"block.to_{x}.weight"], torch.zeros(8, 8)) for x in "qkv"]
        assert torch.allclose(torch.cat(found), up @ down, atol=1e-5)
