"""LoRAs in a model's weights: exact, for every kind of network, and gone without a trace when taken off."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato import load
from sfumato.adapters.fold import Folded
from sfumato.checkpoint.fill import Streamed
from sfumato.errors import CheckpointError, InputError, SfumatoError
from sfumato.families.published.networks import part_hash
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.nn.quantized import can_quantize
from sfumato.types import LoraUse, Request
from small_sd import SMALL, write

CPU = torch.device("cpu")
REQUEST = Request("a cat", seed=1, steps=2, guidance=3.0, size=(32, 32))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write("sd1", tmp_path_factory.mktemp("sd1") / "model")


@pytest.fixture(scope="module")
def ink(place, tmp_path_factory):
    """A LoRA on every matrix and kernel of U-Net and text encoder, biases and norms included."""
    system = open_system(place, CPU, torch.float32, systems=SMALL, offload="model")
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        for name in system.parts[part]:
            module, _, what = name.rpartition(".")
            if "embedding" in module and part == "text_encoder":
                continue
            key, shape = f"{prefix}_{module.replace('.', '_')}", system.parts[part].info(name)[1]
            if what == "bias":
                tensors[f"{key}.diff_b"] = torch.randn(shape, generator=generator) * 0.05
            elif len(shape) == 1:
                tensors[f"{key}.w_norm"] = torch.randn(shape, generator=generator) * 0.05
            else:
                up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator) * 0.2
                tensors[f"{key}.lora_up.weight"] = up
                tensors[f"{key}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=generator) * 0.2
    file = tmp_path_factory.mktemp("lora") / "ink.safetensors"
    save_file(tensors, file)
    return file


def opened(place, dtype=torch.float32, **options) -> Model:
    return Model(open_system(place, CPU, dtype, systems=SMALL, **options), CPU, "sd1")


def picture(model: Model, **changes) -> np.ndarray:
    from dataclasses import replace

    return np.asarray(model.generate(replace(REQUEST, **changes)).images[0])


def answers(model: Model) -> tuple[Tensor, Tensor]:
    """What the text encoder and the U-Net say with what is folded in now."""
    cond = model.condition(REQUEST)
    x = torch.linspace(-2, 2, 4 * 8 * 8).reshape(1, 4, 1, 8, 8)
    return cond.tokens, model.denoiser(cond, 3.0)(x, torch.tensor(5.0))


FORMS = [
    (torch.float32, "none"),
    (torch.float16, "none"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "model"),
    (torch.float32, "sequential"),
    (torch.int8, "none"),
]


@pytest.mark.parametrize(("dtype", "offload"), FORMS, ids=str)
def test_attached_is_as_if_opened_so_and_detached_as_if_never(place, ink, dtype, offload):
    if dtype == torch.int8 and not can_quantize(torch.empty(0)):
        pytest.skip("this CPU has no eight-bit products")
    model = opened(place, dtype, offload=offload)
    plain = answers(model)
    model.attach(ink, 0.7)
    attached = answers(model)
    fresh = opened(place, dtype, offload="model" if offload == "none" else offload)
    fresh.attach(ink, 0.7)  # before anything is opened
    for ours, right, before in zip(attached, answers(fresh), plain, strict=True):
        assert torch.equal(ours, right) and not torch.equal(ours, before)
    model.attach(ink, 0.2)
    assert not torch.equal(answers(model)[1], attached[1])
    model.attach(ink, 0.7)
    assert all(map(torch.equal, answers(model), attached))
    model.detach("ink")
    assert all(map(torch.equal, answers(model), plain))


def test_what_is_folded_is_the_sum_in_float32_rounded_once(place, ink):
    model = opened(place)
    model.attach(ink, 0.7)
    adapters = model.system.adapters
    for part, network in (("unet", model.system.denoiser), ("text_encoder", model.system.text.encoders[0])):
        for name, delta in adapters.opened["ink"].deltas[part].items():
            base = adapters.base[part][name]
            right = base.double() + 0.7 * delta.full(base.shape).double()
            assert torch.allclose(adapters.parts[part][name].double(), right, atol=1e-5)
        held = network.state_dict()
        for name in (
            held.keys() & adapters.parts[part].now.changes.keys()
        ):  # what is packed holds no parameters
            assert torch.equal(held[name], adapters.parts[part][name])


def test_only_layers_that_change_are_made_anew(place, ink):
    model = opened(place)
    unet = model.system.denoiser
    before = {name: module for name, module in unet.named_modules() if not list(module.children())}
    model.attach(ink, 1.0, blocks={"unet": 0, "mid": 1})
    after = {name: module for name, module in unet.named_modules() if not list(module.children())}
    changed = {name for name in before if name in after and after[name] is not before[name]}
    assert model.system.denoiser is unet
    assert changed and all(name.startswith("mid_block.") for name in changed)


def test_layers_that_are_streamed_stay_so(place, ink):
    model = opened(place, offload="sequential")
    unet = model.system.denoiser
    model.attach(ink)
    assert model.system.denoiser is unet
    assert any(isinstance(module, Streamed) for module in unet.modules())


def test_several_at_once_in_any_order(place, ink, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), 0.05)}, other)
    model = opened(place)
    model.attach(ink, 0.5)
    model.attach(other, 0.5)
    one = answers(model)
    model.detach()
    model.attach(other, 0.5)
    model.attach(ink, 0.5)
    assert torch.allclose(answers(model)[1], one[1], atol=1e-3)  # but for the last bits of sums
    model.detach("ink")
    only = answers(model)
    model.detach()
    model.attach(other, 0.5)
    assert torch.equal(answers(model)[1], only[1])


def test_a_request_weighs_for_itself(place, ink):
    model = opened(place)
    plain = picture(model)
    model.attach(ink, 0.3)
    attached = picture(model)
    assert (attached != plain).any()
    assert (picture(model, loras=()) == plain).all()
    assert (picture(model, loras=(LoraUse("ink", 0.0),)) == plain).all()
    assert (picture(model, loras=(LoraUse("ink", 0.3),)) == attached).all()
    assert (picture(model, loras=(LoraUse("ink", 0.6, {"unet": 0.5, "text": 0.5}),)) == attached).all()
    assert (picture(model, loras=(LoraUse("ink", 0.3, {"text": 0}),)) != attached).any()
    assert (picture(model) == attached).all()
    with pytest.raises(InputError, match=r'LoRA "pen" is not open; open are ink$'):
        picture(model, loras=(LoraUse("pen"),))
    with pytest.raises(InputError, match='has no block "nowhere"'):
        picture(model, loras=(LoraUse("ink", 1.0, {"nowhere": 0}),))
    with pytest.raises(InputError, match='loras names "ink" twice'):
        picture(model, loras=(LoraUse("ink"), LoraUse("ink")))
    with pytest.raises(InputError, match="not in the prompt"):
        picture(model, prompt="a cat <lora:ink:1>")


def test_the_closest_block_counts(place, ink):
    model = opened(place)
    model.attach(ink, 2.0, blocks={"down": 0.5, "down.0.attentions.0": 0, "text": 0})
    changes = model.system.adapters.parts["unet"].now.changes
    weights = {name: {weight for weight, _ in own} for name, own in changes.items()}
    assert all(w == {1.0} for name, w in weights.items() if name.startswith("down_blocks."))
    assert not any(name.startswith("down_blocks.0.attentions.0.") for name in weights)
    assert all(w == {2.0} for name, w in weights.items() if not name.startswith("down_blocks."))
    assert not model.system.adapters.parts["text_encoder"].now.changes


def test_drawings_with_other_loras_wait_for_each_other(place, ink):
    """Threads that draw with different weights at once get the pictures they would get alone."""
    model = opened(place)
    model.attach(ink, 0.0)
    uses = [(LoraUse("ink", weight),) for weight in (0.0, 0.4, 0.8)]
    alone = [picture(model, loras=use) for use in uses]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.__setitem__(n, picture(model, loras=uses[n % 3])))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[n] == alone[n % 3]).all() for n in range(6))


def test_a_drawing_cannot_change_its_own_loras(place, ink):
    model = opened(place)
    model.attach(ink, 0.1)
    with pytest.raises(SfumatoError, match="cannot change its LoRAs"):
        model.generate(REQUEST, on_step=lambda step: model.attach(ink, 0.5))
    assert (picture(model) == picture(model)).all()


def test_numbers_beyond_the_type_leave_the_model_as_it_was(place, tmp_path):
    model = opened(place, torch.float16)
    plain = answers(model)
    save_file({"lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), 9e4)}, tmp_path / "loud.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"conv_in\.weight with loud at weight 1 holds numbers beyond the range of torch\.float16",
    ):
        model.attach(tmp_path / "loud.safetensors")
    assert not model.system.adapters.opened and not model.system.adapters.standing
    assert all(map(torch.equal, answers(model), plain))


@pytest.mark.parametrize("offload", ["none", "model"])
def test_what_a_weight_makes_infinite_is_not_the_files_fault(place, tmp_path, offload):
    save_file({"lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), 3e38)}, tmp_path / "loud.safetensors")
    model = opened(place, offload=offload)
    with pytest.raises(
        CheckpointError, match=r"conv_in\.weight with loud at weight 2 is beyond the range of float32"
    ) as refused:
        model.attach(tmp_path / "loud.safetensors", 2)
        answers(model)  # of one that opens its networks when they are called
    assert refused.value.argument == "loras" or offload != "none"


def test_what_is_refused_changes_nothing_of_what_was_attached(place, ink, tmp_path):
    """Two that only together are within range: neither can be taken off alone."""
    for name, sign in (("loud", 1), ("quiet", -1)):
        save_file(
            {"lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), sign * 9e4)},
            tmp_path / f"{name}.safetensors",
        )
    model = opened(place, torch.float16)
    model.attach(ink, 0.3)
    both = (LoraUse("loud"), LoraUse("quiet"))
    adapters = model.system.adapters
    model.attach(tmp_path / "loud.safetensors", 0.0)
    model.attach(tmp_path / "quiet.safetensors", 0.0)
    before, standing = answers(model), adapters.standing
    with pytest.raises(CheckpointError, match="beyond the range"):
        model.attach(tmp_path / "loud.safetensors", 1.0)
    assert adapters.standing == adapters.now == standing and set(adapters.opened) == {"ink", "loud", "quiet"}
    assert all(map(torch.equal, answers(model), before))
    with adapters.using(both):
        pass
    adapters.standing = both
    with pytest.raises(CheckpointError, match="with quiet at weight 1"):
        model.detach("loud")
    assert adapters.standing == both and "loud" in adapters.opened


def test_a_product_beyond_the_range_of_a_network_that_has_drawn_is_refused(place, tmp_path):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    model = opened(place, torch.float16)
    before = answers(model)
    width = model.system.adapters.shapes["unet"][
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ][0]
    tensors = {
        f"{module}.lora_up.weight": torch.full((width, 1), 3e2),
        f"{module}.lora_down.weight": torch.full((1, width), 3e2),
    }
    save_file(tensors, tmp_path / "steep.safetensors")
    with pytest.raises(CheckpointError, match="beyond the range"):
        model.attach(tmp_path / "steep.safetensors")
    assert all(map(torch.equal, answers(model), before))


@pytest.mark.parametrize("first", ["loud", "quiet"])
def test_what_waits_for_a_drawing_is_attached_only_once_it_is_taken(place, tmp_path, first):
    """Two wait for one drawing, one of which is refused: in either order the other one alone is attached."""
    for name, value in (("loud", 9e4), ("quiet", 0.05)):
        save_file(
            {"lora_unet_conv_in.diff": torch.full((32, 4, 3, 3), value)}, tmp_path / f"{name}.safetensors"
        )
    model = opened(place, torch.float16)
    adapters = model.system.adapters
    refused: list[str] = []

    def attach(name: str) -> None:
        try:
            model.attach(tmp_path / f"{name}.safetensors")
        except CheckpointError:
            refused.append(name)

    waiting = [
        threading.Thread(target=attach, args=(n,)) for n in sorted(("loud", "quiet"), key=first.__ne__)
    ]
    with adapters.using(()):
        for count, thread in enumerate(waiting, 1):
            thread.start()
            while len(adapters._turn._waiters) < count:
                time.sleep(0.001)
        assert not adapters.opened and adapters.settled(None) == ()
    for thread in waiting:
        thread.join()
    assert refused == ["loud"]
    assert adapters.now == adapters.standing == (LoraUse("quiet"),) and set(adapters.opened) == {"quiet"}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_in_eight_bits(place, tmp_path, kind, dtype):
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = (t.to(kind) for t in torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)))
    model = opened(place, dtype)
    width = model.system.adapters.shapes["unet"][
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ][0]
    tensors = {f"{module}.lora_up.weight": up[:width, :2], f"{module}.lora_down.weight": down[:2, :width]}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "eight.safetensors")
    save_file({name: t.float().contiguous() for name, t in tensors.items()}, tmp_path / "wide.safetensors")
    model.attach(tmp_path / "eight.safetensors")
    eight = answers(model)[1]
    model.detach()
    model.attach(tmp_path / "wide.safetensors")
    assert torch.equal(answers(model)[1], eight)


def test_hashes_are_of_the_base_and_of_what_is_added(place, ink):
    model = opened(place)
    hashes, parts = model.hashes, model.system.adapters.parts
    own = part_hash(parts["unet"])
    assert own == hashes["denoiser"]
    model.attach(ink, 0.5)
    half = part_hash(parts["unet"])
    model.attach(ink, 0.6)
    assert opened(place).hashes == hashes and len({own, half, part_hash(parts["unet"])}) == 3


def test_a_folded_part_tells_types_without_reading():
    part = Folded({"a": torch.zeros(2, 3, dtype=torch.bfloat16)})
    assert part.info("a") == (torch.bfloat16, (2, 3)) and "a" in part and len(part) == 1


def test_the_plan_counts_what_is_attached(place, ink):
    from sfumato import planning

    model = opened(place, torch.bfloat16, offload="model")
    before = planning.plan(model, REQUEST, "none")
    model.attach(ink)
    after = planning.plan(model, REQUEST, "none")
    size = ink.stat().st_size
    for old, new in zip(before.stages, after.stages, strict=True):
        assert new.bytes >= old.bytes + size
    drawn = planning.follow(model, after)
    assert drawn.system.adapters.now == (LoraUse("ink"),)
    fresh = opened(place, torch.bfloat16)
    fresh.attach(ink)
    assert (picture(drawn) == picture(fresh)).all()


# --- pocket --------------------------------------------------------------------------------------------------------


def test_pocket_takes_loras_of_its_own_names(tmp_path):
    model = load()
    request = Request("a red cube", steps=2)
    plain = np.asarray(model.generate(request).images[0])
    hashes = load().hashes
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for module in ("dit.blocks.0.attn.qkv", "dit.blocks.3.mlp.w_out", "text.blocks.1.attn.out"):
        shape = model.system.denoiser.get_submodule(module).weight.shape
        tensors[f"base_model.model.{module}.lora_B.weight"] = (
            torch.randn(shape[0], 2, generator=generator) * 0.1
        )
        tensors[f"base_model.model.{module}.lora_A.weight"] = (
            torch.randn(2, shape[1], generator=generator) * 0.1
        )
    save_file(tensors, tmp_path / "own.safetensors")
    report = model.attach(tmp_path / "own.safetensors")
    assert report.modules == {"denoiser": 3} and report.formats == ("PEFT",)
    assert (np.asarray(model.generate(request).images[0]) != plain).any()
    assert model.hashes == hashes
    model.detach()
    assert (np.asarray(model.generate(request).images[0]) == plain).all()
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1, 4)}, tmp_path / "sd.safetensors")
    with pytest.raises(CheckpointError, match="has nothing for this pocket model"):
        model.attach(tmp_path / "sd.safetensors")
