"""LoRAs of Stable Diffusion 3 on small random models: pictures and training steps beside diffusers' and peft's."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from helpers import CPU, relative_error
from sfumato.adapters.trainable import TrainedLora, chosen, layers_of, written
from sfumato.checkpoint.rules import shapes
from sfumato.errors import InputError
from sfumato.families.sd3.keys import transformer_map
from sfumato.families.sd3.system import open_system
from sfumato.families.sd3.training import reader
from sfumato.generate import Model
from sfumato.sampling import SeededNoise
from sfumato.storage import save_tensors
from sfumato.train.adapter import Batch, Subject, adapter_loss
from sfumato.train.loop import seeded
from sfumato.train.recipe import LoraLoss
from sfumato.types import Request
from small_sd3 import SIDE, SMALL, write

peft = pytest.importorskip("peft")
KINDS = ("sd3-medium", "sd3.5-medium")
LAST = SMALL["sd3-medium"].transformer.layers - 1
RANK, ALPHA, WEIGHT, BOUND = 4, 2.0, 0.8, 1e-5
CELLS = SIDE // 4
CAPTIONS = ("a small red sphere", "an old (blue) house")
REQUEST = Request(
    "a red metal sphere", negative="blurry", seed=3, steps=2, guidance=4.0, sampler="euler", schedule="flow_match",
    size=(SIDE, SIDE), prompt_rules="none",
)  # fmt: skip
LOADED = "diffusers load_lora_weights, peft"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {kind: write(kind, tmp_path_factory.mktemp(kind) / "model") for kind in KINDS}


def pipeline_of(place) -> StableDiffusion3Pipeline:
    t5 = PreTrainedTokenizerFast(
        tokenizer_file=str(place / "tokenizer_3" / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    pipeline = StableDiffusion3Pipeline.from_pretrained(place, tokenizer_3=t5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def loaded(pipeline) -> int:
    """How many tensors of a LoRA it has taken in."""
    networks = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    return sum("lora_" in name for network in networks for name, _ in network.named_parameters())


# --- drawing -------------------------------------------------------------------------------------------------------


def both_forms(system) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same LoRA by kohya's names, q, k and v fused and halves swapped, and by diffusers' ones."""
    generator = torch.Generator().manual_seed(11)
    kohya: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}

    def factors(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        up = torch.randn(rows, RANK, generator=generator) * 0.2
        return up, torch.randn(RANK, columns, generator=generator) * 0.2

    def put(key: str, up: Tensor, down: Tensor, ours: dict[str, Tensor]) -> None:
        kohya.update({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
        kohya[f"{key}.alpha"] = torch.tensor(ALPHA)
        for module, part in ours.items():
            theirs[f"{module}.lora_B.weight"] = (part * ALPHA / RANK).contiguous()
            theirs[f"{module}.lora_A.weight"] = down.clone()

    table = transformer_map(system.shapes.transformer)
    forms = shapes(table.to_theirs(system.parts["transformer"]))
    for name, shape in forms.items():
        if not name.endswith(".weight") or len(shape) != 2 or "mlp.0" in name or "mlp.2" in name:
            continue
        up, down = factors(*shape)
        placed = table.to_ours({n: up if n == name else torch.zeros(s) for n, s in forms.items()})
        rule = next(rule for rule in table.rules if rule.theirs == name)
        ours = (rule.ours,) if isinstance(rule.ours, str) else rule.ours
        put(f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}", up, down,
            {f"transformer.{n.removesuffix('.weight')}": placed[n] for n in ours})  # fmt: skip
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        for name, shape in shapes(system.parts[part]).items():
            if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")):
                module = name.removesuffix(".weight")
                up, down = factors(*shape)
                put(f"lora_te{number}_{module.replace('.', '_')}", up, down, {f"{part}.{module}": up})
    return kohya, theirs


def drawn(model: Model) -> tuple[Tensor, Tensor]:
    """(initial noise, latents after the steps)."""
    request = model.complete(REQUEST)
    noise = SeededNoise(request.seeds(), model.system.latent_shape(1, SIDE, SIDE)).initial()[:, :, 0]
    return noise, model.sample(model.condition(request), request.seeds(), request)[:, :, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_a_lora(agrees, places, tmp_path, kind):
    """diffusers reads no SD3 LoRA of kohya's; given the same change by its own names it draws the same."""
    model = Model(open_system(places[kind], CPU, torch.float32, systems=SMALL), CPU, kind)
    kohya, theirs = both_forms(model.system)
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(theirs, tmp_path / "peft.safetensors")
    noise, plain = drawn(model)
    pipeline = pipeline_of(places[kind])
    pipeline.load_lora_weights(tmp_path, weight_name="peft.safetensors", adapter_name="ink")
    assert loaded(pipeline) == len(theirs)
    pipeline.set_adapters(["ink"], [WEIGHT])
    wanted = pipeline(
        REQUEST.prompt, negative_prompt=REQUEST.negative, width=SIDE, height=SIDE, output_type="latent",
        num_inference_steps=REQUEST.steps, guidance_scale=REQUEST.guidance, latents=noise.clone(),
    ).images  # fmt: skip
    for form in ("kohya", "peft"):
        report = model.attach(tmp_path / f"{form}.safetensors", WEIGHT, name="ink")
        assert not report.left
        latents = drawn(model)[1]
        assert (latents - plain).norm() > 0.01 * plain.norm()
        agrees("LoRA, latents after 2 steps", f"{kind}, {form}", latents, wanted, BOUND, LOADED)
    model.detach()
    assert torch.equal(drawn(model)[1], plain)


# --- training ------------------------------------------------------------------------------------------------------


def opened(place, text: bool = False):
    return open_system(place, CPU, torch.float32, offload="model", systems=SMALL).trainee(text)


def subject_of(trainee) -> Subject:
    read = trainee.reader(CAPTIONS)
    return Subject(read, trainee.sized, trainee.predict, trainee.parameterization, trainee.levels)


def lora_beside(trainee, targets="attention", dora: bool = False) -> TrainedLora:
    layers = {
        f"{part}.{path}": layer
        for part, network in trainee.networks.items()
        for path, layer in layers_of(network)
    }
    lora = TrainedLora(
        chosen(layers, targets), RANK, ALPHA, dora=dora, seeds=lambda path: seeded("cpu", "test", path)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, own in lora.named_factors():
            own.up.normal_(std=0.05, generator=generator)
    return lora


def a_batch() -> Batch:
    latents = torch.randn(2, 16, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(1))
    return Batch(latents, CAPTIONS, (SIDE, SIDE))


def tensors_of(trainee, lora: TrainedLora, layout: str = "diffusers") -> dict[str, Tensor]:
    return written(((own, trainee.spell(path, layout)) for path, own in lora.named_factors()), layout)


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_s_gradients(places, kind, dora):
    """With the same factors, pictures and noise as a step written with diffusers and peft; the levels are logit-normal,
    shifted as the model's own (Esser et al. 2024, sec. 3.1 and 5.3.2).
    """
    trainee = opened(places[kind])
    subject, batch, lora = subject_of(trainee), a_batch(), lora_beside(trainee, dora=dora)
    loss = adapter_loss(lora, batch, subject, LoraLoss(), seeded("cpu", "chance"))[0]
    loss.backward()

    chance = seeded("cpu", "chance")
    noise = torch.randn(batch.latents.shape, generator=chance)[:, :, 0]
    u = (torch.arange(2) + torch.rand(2, generator=chance)) / 2
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(places[kind], subfolder="scheduler")
    shift = scheduler.config.shift
    t = torch.sigmoid(torch.special.ndtri(u.double()))
    sigma = (shift * t / (1 + (shift - 1) * t)).float()
    transformer = SD3Transformer2DModel.from_pretrained(places[kind] / "transformer")
    transformer.requires_grad_(False)
    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=dora))
    theirs = {
        name.replace(".default", ""): p for name, p in transformer.named_parameters() if "lora_" in name
    }
    own = {path.removeprefix("transformer."): factors for path, factors in lora.named_factors()}
    assert len(theirs) == (3 if dora else 2) * len(own)
    for module, factors in own.items():
        theirs[f"{module}.lora_A.weight"].data.copy_(factors.down)
        theirs[f"{module}.lora_B.weight"].data.copy_(factors.up)
    clean = batch.latents[:, :, 0]
    level = sigma[:, None, None, None]
    noisy = (1 - level) * clean + level * noise
    with torch.no_grad():
        cond = subject.told(CAPTIONS)
    answer = transformer(noisy, cond.tokens, cond.vector, 1000 * sigma).sample
    errors = functional.mse_loss(answer, noise - clean)
    errors.backward()
    assert relative_error(loss.detach(), errors.detach()) < 1e-5
    for module, factors in own.items():
        pairs = [(factors.down, "lora_A.weight"), (factors.up, "lora_B.weight")]
        if dora:
            pairs.append((factors.magnitude, "lora_magnitude_vector.weight"))
        for ours, name in pairs:
            if ours.grad is None:  # nobody reads what the last block's text would be told, so nothing asks it
                assert module == f"transformer_blocks.{LAST}.attn.add_q_proj"
                assert not theirs[f"{module}.{name}"].grad.any()
                continue
            assert relative_error(ours.grad, theirs[f"{module}.{name}"].grad) < 1e-4, f"{module}.{name}"


def predicted(trainee, batch: Batch) -> Tensor:
    with torch.no_grad():
        return trainee.predict(batch.latents, torch.tensor([40.0, 700.0]), trainee.reader(CAPTIONS)(CAPTIONS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("targets", "text", "dora"), [("all", True, False), ("attention", False, True)])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_ours_opens_the_file_with_nothing_unmatched(places, tmp_path, kind, targets, text, dora, layout):
    trainee = opened(places[kind], text)
    lora, batch = lora_beside(trainee, targets, dora), a_batch()
    with_it = predicted(trainee, batch)
    tensors = tensors_of(trainee, lora, layout)
    save_tensors(tmp_path / "x.safetensors", tensors)
    system = open_system(places[kind], CPU, torch.float32, systems=SMALL)
    report = system.adapters.attach(tmp_path / "x.safetensors")
    assert not report.left and len(report.matched) == len(tensors)
    if layout == "kohya":
        assert any("_attn_qkv.lora_up" in name for name in tensors) and not any(
            "to_q" in name for name in tensors
        )
    with torch.no_grad():
        cond = reader(system, CAPTIONS)(CAPTIONS)
        ours = system.network(batch.latents, torch.tensor([40.0, 700.0]), cond)
    lora.detach()
    assert relative_error(with_it, predicted(trainee, batch)) > 1e-3
    assert relative_error(ours, with_it) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_the_file(agrees, places, tmp_path, kind, dora):
    """All keys matched, and the same answer of transformer and text encoders."""
    trainee = opened(places[kind], text=True)
    lora, batch = lora_beside(trainee, "attention", dora), a_batch()
    tensors = tensors_of(trainee, lora)
    save_tensors(tmp_path / "x.safetensors", tensors)
    with_it = predicted(trainee, batch)
    pipeline = pipeline_of(places[kind])
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert loaded(pipeline) == len(tensors)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        list(CAPTIONS), None, None, do_classifier_free_guidance=False
    )
    with torch.no_grad():
        theirs = pipeline.transformer(
            batch.latents[:, :, 0], tokens, pooled, torch.tensor([40.0, 700.0])
        ).sample[:, :, None]
    agrees("LoRA trained here, one call", f"{kind}{', DoRA' if dora else ''}", with_it, theirs, BOUND, LOADED)


def test_some_of_a_fused_layer(places, tmp_path):
    """Factors beside the keys alone stand in kohya's fused layer, whose other rows stay; DoRA needs them all."""
    from sfumato.adapters.trainable import check_spelled

    trainee = opened(places["sd3-medium"])
    lora, batch = lora_beside(trainee, ["*.attn.to_k"]), a_batch()
    with_it = predicted(trainee, batch)
    save_tensors(tmp_path / "x.safetensors", tensors_of(trainee, lora, "kohya"))
    system = open_system(places["sd3-medium"], CPU, torch.float32, systems=SMALL)
    system.adapters.attach(tmp_path / "x.safetensors")
    with torch.no_grad():
        cond = reader(system, CAPTIONS)(CAPTIONS)
        ours = system.network(batch.latents, torch.tensor([40.0, 700.0]), cond)
    assert relative_error(ours, with_it) < 1e-5
    shares = [trainee.spell(path, "kohya") for path, _ in lora.named_factors()]
    check_spelled(shares, False)
    with pytest.raises(
        InputError, match="attn_qkv is 3 layers here, of which 1 would be trained: DoRA needs all"
    ):
        check_spelled(shares, True)


@pytest.mark.full
def test_the_loss_falls_on_a_fixed_batch(places):
    trainee = opened(places["sd3.5-medium"], text=True)
    subject, batch, lora = subject_of(trainee), a_batch(), lora_beside(trainee, "all")
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = adapter_loss(lora, batch, subject, LoraLoss(), seeded("cpu", "same"))[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
