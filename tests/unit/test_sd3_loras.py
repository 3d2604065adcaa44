"""LoRAs of Stable Diffusion 3: by every naming the same change; in every form of its networks; merged and extracted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.adapters.delta import change_of
from sfumato.adapters.lora import Lora, read_lora
from sfumato.checkpoint.rules import shapes
from sfumato.errors import CheckpointError
from sfumato.families.published.adapters import adapters_of, few_steps, names_of
from sfumato.families.published.checkpoint import open_checkpoint
from sfumato.families.published.convert import write_file
from sfumato.families.published.loras import extract, with_loras
from sfumato.families.sd3.family import FAMILY
from sfumato.families.sd3.keys import transformer_map
from sfumato.families.sd3.system import open_system
from sfumato.generate import Model
from sfumato.nn.quantized import can_quantize
from sfumato.types import Request
from small_sd3 import SMALL, write

CPU = torch.device("cpu")
KINDS = ("sd3-medium", "sd3.5-medium")
RANK = 3
KOHYA, PEFT = (".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")
FAMILIES = (replace(FAMILY, systems=SMALL),)
REQUEST = Request("a red sphere", seed=1, steps=2, guidance=3.0, size=(64, 64))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {kind: write(kind, tmp_path_factory.mktemp(kind) / "model") for kind in KINDS}


@pytest.fixture(scope="module")
def bases(places):
    """kind → (its names, the parts of a small model)."""
    return {
        kind: (names_of(FAMILY, kind, SMALL[kind]), open_checkpoint(place, FAMILIES).parts)
        for kind, place in places.items()
    }


def layers(part) -> list[str]:
    """Modules with matrices and kernels, without tables."""
    tables = ("_embedding.weight", "_attention_bias.weight", "shared.weight")
    return [
        name.removesuffix(".weight")
        for name in part
        if name.endswith(".weight") and len(part.info(name)[1]) > 1 and not name.endswith(tables)
    ]


def factors(shape: tuple[int, ...], name: str) -> tuple[Tensor, Tensor]:
    """(up, down) for a module, always the same."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
    return up, torch.randn(RANK, *shape[1:], generator=generator)


def read(bases, kind: str, tensors: dict[str, Tensor], place, **options) -> Lora:
    names, parts = bases[kind]
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "ink.safetensors")
    return read_lora(place / "ink.safetensors", names, {n: shapes(p) for n, p in parts.items()}, **options)


OURS = {  # how each tool spells a module that has the name of diffusers, and the two endings
    "diffusers, SimpleTuner": (lambda m: f"transformer.{m}", PEFT),
    "PEFT": (lambda m: f"base_model.model.{m}", PEFT),
    "PEFT, another prefix": (lambda m: f"base_model.model.transformer.{m}", PEFT),
    "OneTrainer": (lambda m: f"lora_transformer_{m.replace('.', '_')}", KOHYA),
    "OneTrainer, dotted": (lambda m: f"lora_transformer.{m}", KOHYA),
    "SimpleTuner, LyCORIS": (lambda m: f"lycoris_{m.replace('.', '_')}", KOHYA),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", OURS)
def test_every_module_by_diffusers_names(bases, tmp_path, kind, spelling):
    name, (up_end, down_end) = OURS[spelling]
    part = bases[kind][1]["transformer"]
    tensors = {}
    for module in layers(part):
        up, down = factors(part.info(f"{module}.weight")[1], module)
        tensors |= {name(module) + up_end: up, name(module) + down_end: down}
    found = read(bases, kind, tensors, tmp_path)
    assert set(found.deltas["transformer"]) == {f"{m}.weight" for m in layers(part)}
    assert len(found.report.matched) == len(tensors)
    for module in layers(part):
        shape = part.info(f"{module}.weight")[1]
        up, down = (tensor.flatten(1).double() for tensor in factors(shape, module))
        change = change_of(found.deltas["transformer"][f"{module}.weight"], part[f"{module}.weight"])
        assert torch.allclose(change.double().flatten(1), up @ down, atol=1e-4)


ORIGINAL = {
    "kohya": (lambda m: f"lora_unet_{m.replace('.', '_')}", KOHYA),
    "original paths": (lambda m: f"diffusion_model.{m}", PEFT),
    "bare": (lambda m: m, PEFT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ORIGINAL)
def test_every_module_by_the_original_names(bases, tmp_path, kind, spelling):
    """q, k and v are one there, and where a modulation has shift and scale alone they stand the other way round."""
    name, (up_end, down_end) = ORIGINAL[spelling]
    table = transformer_map(SMALL[kind].transformer)
    part = bases[kind][1]["transformer"]
    theirs = table.to_theirs(part)
    modules = [n.removesuffix(".weight") for n in theirs if n.endswith(".weight") and ".ln_" not in n]
    tensors, whole = {}, {n: torch.zeros(theirs.info(n)[1]) for n in theirs}
    for module in modules:
        up, down = factors(theirs.info(f"{module}.weight")[1], module)
        tensors |= {name(module) + up_end: up, name(module) + down_end: down}
        whole[f"{module}.weight"] = (up.flatten(1) @ down.flatten(1)).view(whole[f"{module}.weight"].shape)
    wanted = table.to_ours(whole)  # the rules that place the weights place their changes
    found = read(bases, kind, tensors, tmp_path)
    assert len(found.report.matched) == len(tensors)
    assert set(found.deltas["transformer"]) == {f"{m}.weight" for m in layers(part)}
    for tensor, delta in found.deltas["transformer"].items():
        assert torch.allclose(change_of(delta, part[tensor]), wanted[tensor], atol=1e-4), tensor


def test_onetrainer_numbers_the_parts_of_a_fused_layer(bases, tmp_path):
    part = bases["sd3-medium"][1]["transformer"]
    tensors = {}
    for number, letter in enumerate("qkv"):
        up, down = factors((48, 48), letter)
        key = f"transformer.joint_blocks.0.x_block.attn.qkv.{number}"
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    found = read(bases, "sd3-medium", tensors, tmp_path)
    for letter in "qkv":
        name = f"transformer_blocks.0.attn.to_{letter}.weight"
        up, down = factors((48, 48), letter)
        assert torch.allclose(change_of(found.deltas["transformer"][name], part[name]), up @ down, atol=1e-4)


def test_dora_of_a_fused_layer_is_that_of_its_parts(bases, tmp_path):
    part = bases["sd3-medium"][1]["transformer"]
    key, names = (
        "lora_unet_joint_blocks_0_x_block_attn_qkv",
        [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"],
    )
    up, down = factors((144, 48), key)
    magnitude = torch.rand(144, 1) + 0.5
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.dora_scale": magnitude}
    deltas = read(bases, "sd3-medium", tensors, tmp_path).deltas["transformer"]
    base = torch.cat([part[name] for name in names])
    moved = base + up @ down
    right = magnitude * moved / moved.norm(dim=1, keepdim=True) - base
    assert torch.allclose(torch.cat([change_of(deltas[n], part[n]) for n in names]), right, atol=1e-4)


TEXTS = {
    "kohya": (lambda n, m: f"lora_te{n}_{m.replace('.', '_')}", KOHYA),
    "diffusers, PEFT": (lambda n, m: f"text_encoder{f'_{n}' if n > 1 else ''}.{m}", PEFT),
    "OneTrainer, newer": (lambda n, m: f"{('clip_l', 'clip_g', 't5')[n - 1]}.{m}", KOHYA),
    "ComfyUI": (lambda n, m: f"text_encoders.{('clip_l', 'clip_g', 't5xxl')[n - 1]}.transformer.{m}", KOHYA),
    "PEFT without text_model": (
        lambda n, m: f"text_encoder{f'_{n}' if n > 1 else ''}.{m.removeprefix('text_model.')}",
        PEFT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", TEXTS)
def test_text_encoders_by_every_name(bases, tmp_path, spelling):
    name, (up_end, down_end) = TEXTS[spelling]
    parts = {n: p for n, p in bases["sd3-medium"][1].items() if n.startswith("text")}
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts.values(), 1):
        for module in layers(part):
            up, down = factors(part.info(f"{module}.weight")[1], module)
            tensors |= {name(number, module) + up_end: up, name(number, module) + down_end: down}
    found = read(bases, "sd3-medium", tensors, tmp_path)
    assert found.report.modules == {n: len(layers(p)) for n, p in parts.items()}
    assert len(parts) == 3


# --- on a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ink(bases, tmp_path_factory):
    """A LoRA on every matrix of the transformer, by kohya's names, and of all text encoders."""
    parts = bases["sd3.5-medium"][1]
    tensors: dict[str, Tensor] = {}
    theirs = transformer_map(SMALL["sd3.5-medium"].transformer).to_theirs(parts["transformer"])
    matrices = [n for n in theirs if n.endswith(".weight") and len(theirs.info(n)[1]) > 1]
    named = [("lora_unet", n, theirs.info(n)[1]) for n in matrices]
    for number, part in enumerate(("text_encoder", "text_encoder_2", "text_encoder_3"), 1):
        named += [
            (f"lora_te{number}", f"{m}.weight", parts[part].info(f"{m}.weight")[1])
            for m in layers(parts[part])
        ]
    for prefix, name, shape in named:
        key = f"{prefix}_{name.removesuffix('.weight').replace('.', '_')}"
        up, down = factors(shape, name)
        tensors |= {f"{key}.lora_up.weight": up * 0.1, f"{key}.lora_down.weight": down * 0.1}
    file = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    save_file(tensors, file)
    return file


def opened(place, dtype=torch.float32, **options) -> Model:
    return Model(open_system(place, CPU, dtype, systems=SMALL, **options), CPU, "sd3")


def answers(model: Model) -> tuple[Tensor, Tensor]:
    """What the text encoders and the transformer say with what is folded in now."""
    cond = model.condition(REQUEST)
    x = torch.linspace(-2, 2, 16 * 16 * 16).reshape(1, 16, 1, 16, 16)
    return cond.tokens, model.denoiser(cond, 3.0)(x, torch.tensor(0.7))


FORMS = [
    (torch.float32, "none", {}),
    (torch.bfloat16, "none", {}),
    (torch.bfloat16, "model", {}),
    (torch.bfloat16, "none", {"text_dtype": torch.int8}),
    (torch.float32, "sequential", {}),
    (torch.int8, "none", {}),
]


@pytest.mark.parametrize(("dtype", "offload", "options"), FORMS, ids=str)
def test_attached_is_as_if_opened_so_and_detached_as_if_never(places, ink, dtype, offload, options):
    if dtype == torch.int8 and not can_quantize(torch.empty(0)):
        pytest.skip("this CPU has no eight-bit products")
    model = opened(places["sd3.5-medium"], dtype, offload=offload, **options)
    plain = answers(model)
    report = model.attach(ink, 0.7)
    assert set(report.modules) == {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3"}
    attached = answers(model)
    fresh = opened(
        places["sd3.5-medium"], dtype, offload="model" if offload == "none" else offload, **options
    )
    fresh.attach(ink, 0.7)  # before anything is opened
    for ours, right, before in zip(attached, answers(fresh), plain, strict=True):
        assert torch.equal(ours, right) and not torch.equal(ours, before)
    model.attach(ink, 0.7, blocks={"blocks.0": 0, "text2": 0.5})
    assert not torch.equal(answers(model)[1], attached[1])
    model.detach("ink")
    assert all(map(torch.equal, answers(model), plain))


def test_an_encoder_that_is_left_out_takes_none(places, ink):
    model = opened(places["sd3.5-medium"], without=("t5",))
    with pytest.raises(CheckpointError, match=r"lora_te3_\S+ \(there is no text_encoder_3 here\)"):
        model.attach(ink)
    report = model.attach(ink, partial=True)
    assert report.left and "text_encoder_3" not in report.modules


def merged(place, lora, target):
    found, reports = with_loras(open_checkpoint(place, FAMILIES), "model", [(lora, 0.5, {})])
    assert "96 of transformer" not in reports[0]
    write_file(found, target)
    return target


def test_merged_and_extracted_again(places, ink, tmp_path):
    place = places["sd3.5-medium"]
    tuned = merged(place, ink, tmp_path / "tuned.safetensors")
    model, other = opened(place), opened(tuned, tokenizer=place / "tokenizer_3" / "tokenizer.json")
    model.attach(ink, 0.5)
    for ours, theirs in zip(answers(model), answers(other), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    kept = extract(place, tuned, tmp_path / "found.safetensors", RANK, FAMILIES, dtype=torch.float32)
    assert kept.share > 0.9999 and not kept.left
    old, new = load_file(ink), load_file(tmp_path / "found.safetensors")
    assert set(old) == {name for name in new if not name.endswith(".alpha")}
    again = opened(place)
    again.attach(tmp_path / "found.safetensors")
    for ours, theirs in zip(answers(model), answers(again), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


# --- whose it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "kind", "said"),
    [
        ({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (1, 2048)},
         "sd3-medium", "a LoRA for Stable Diffusion XL .* this model is Stable Diffusion 3"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "sd3-medium", "for FLUX"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 2432)}, "sd3-medium",
         r"a LoRA for a Stable Diffusion 3 of width 2432 \(3\.5 Large\); this model's is 48"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (4, 1536)}, "sd3.5-large",
         r"of width 1536 \(3 or 3\.5 Medium\); this model's is 64"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "sd3-medium",
         "has nothing for"),
    ],
)  # fmt: skip
def test_a_lora_of_another_model_says_so(tmp_path, tensors, kind, said):
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "ink.safetensors")
    parts = {"transformer": {}, "vae": {}}
    with pytest.raises(CheckpointError, match=said):
        adapters_of(FAMILY, kind, SMALL[kind], parts, lambda touched: None).attach(
            tmp_path / "ink.safetensors"
        )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sd3.5-turbo-8steps-lora", {"steps": 8, "guidance": 1.0, "sampler": "euler", "schedule": "flow_match"}),
        ("Hyper-SD3-16steps-CFG-lora", {"steps": 16, "sampler": "euler", "schedule": "flow_match"}),
        ("ink", {}),
        ("lcm", {}),
    ],
)  # fmt: skip
def test_loras_for_few_steps(bases, tmp_path, name, wanted):
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(1, 48), f"{key}.lora_B.weight": torch.ones(48, 1)}
    lora = read(bases, "sd3-medium", tensors, tmp_path, name=name)
    assert few_steps(lora, FAMILY.naming.few).fields == wanted
