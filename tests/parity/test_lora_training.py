"""Training of LoRAs on small random models: one step beside peft's and diffusers', and files that diffusers loads."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from helpers import CPU, relative_error
from sfumato.adapters.trainable import TrainedLora, chosen, layers_of, written
from sfumato.families.sd.system import open_system
from sfumato.families.sd.training import reader
from sfumato.storage import save_tensors
from sfumato.train.adapter import Batch, Subject, adapter_loss
from sfumato.train.loop import seeded
from sfumato.train.recipe import LoraLoss
from small_sd import SIDE, SMALL, write

peft = pytest.importorskip("peft")
RANK, ALPHA = 4, 2.0
CELLS = SIDE // 4
CAPTIONS = ("a small red fox", "a (blue) house")


def opened(kind: str, place, text: bool = False, **scheduler):
    prediction = scheduler.pop("prediction", "epsilon")
    write(kind, place, prediction, **scheduler)
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
    latents = torch.randn(2, 4, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(1))
    return Batch(latents, CAPTIONS, (SIDE, SIDE))


def tensors_of(trainee, lora: TrainedLora, layout: str = "diffusers") -> dict[str, Tensor]:
    return written(((own, trainee.spell(path, layout)) for path, own in lora.named_factors()), layout)


CASES = [
    ("sd1", "epsilon", "plain", False),
    ("sd1", "epsilon", "min_snr", False),
    ("sd2", "v_prediction", "min_snr", False),
    ("sdxl", "epsilon", "plain", False),
    ("sdxl", "epsilon", "plain", True),
]


@pytest.mark.parametrize(("kind", "prediction", "weighting", "dora"), CASES)
def test_a_step_s_gradients(kind, prediction, weighting, dora, tmp_path):
    """With the same factors, pictures, noise and time steps as a step written with diffusers and peft."""
    trainee = opened(kind, tmp_path / "model", prediction=prediction)
    subject, batch, lora = subject_of(trainee), a_batch(), lora_beside(trainee, dora=dora)
    loss = adapter_loss(lora, batch, subject, LoraLoss(weighting=weighting), seeded("cpu", "chance"))[0]
    loss.backward()

    chance = seeded("cpu", "chance")
    noise = torch.randn(batch.latents.shape, generator=chance)[:, :, 0]
    u = (torch.arange(2) + torch.rand(2, generator=chance)) / 2
    steps = (u.double() * 1000).long()
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    unet.requires_grad_(False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"], use_dora=dora
    )
    unet.add_adapter(config)
    theirs = {name.replace(".default", ""): p for name, p in unet.named_parameters() if "lora_" in name}
    for path, own in lora.named_factors():
        module = path.removeprefix("unet.")
        theirs[f"{module}.lora_A.weight"].data.copy_(own.down)
        theirs[f"{module}.lora_B.weight"].data.copy_(own.up)
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    clean = batch.latents[:, :, 0]
    noisy = scheduler.add_noise(clean, noise, steps)
    with torch.no_grad():
        cond = trainee.sized(subject.told(CAPTIONS), *batch.size)
    added = {}
    if kind == "sdxl":
        ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2, dtype=torch.float32)
        added = {"added_cond_kwargs": {"text_embeds": cond.vector[:, :48], "time_ids": ids}}
    answer = unet(noisy, steps, cond.tokens, **added).sample
    target = scheduler.get_velocity(clean, noise, steps) if prediction != "epsilon" else noise
    errors = functional.mse_loss(answer, target, reduction="none").flatten(1).mean(1)
    if weighting == "min_snr":
        alpha_bar = scheduler.alphas_cumprod[steps]
        snr = alpha_bar / (1 - alpha_bar)
        errors = errors * snr.clamp(max=5) / (snr + 1 if prediction != "epsilon" else snr)
    errors.mean().backward()

    assert relative_error(loss.detach(), errors.mean().detach()) < 1e-5
    for path, own in lora.named_factors():
        module = path.removeprefix("unet.")
        pairs = [(own.down, "lora_A.weight"), (own.up, "lora_B.weight")]
        if dora:
            pairs.append((own.magnitude, "lora_magnitude_vector.weight"))
        for ours, name in pairs:
            assert ours.grad.norm() > 0
            assert relative_error(ours.grad, theirs[f"{module}.{name}"].grad) < 1e-4, f"{module}.{name}"


def predicted(trainee, batch: Batch) -> Tensor:
    with torch.no_grad():
        cond = trainee.sized(trainee.reader(CAPTIONS)(CAPTIONS), *batch.size)
        return trainee.predict(batch.latents, torch.tensor([40.0, 700.0]), cond)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize(("targets", "text", "dora"), [("all", True, False), ("attention", False, True)])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_ours_opens_the_file_with_nothing_unmatched(kind, targets, text, dora, layout, tmp_path):
    trainee = opened(kind, tmp_path / "model", text=text)
    lora, batch = lora_beside(trainee, targets, dora), a_batch()
    with_it = predicted(trainee, batch)
    tensors = tensors_of(trainee, lora, layout)
    save_tensors(tmp_path / "x.safetensors", tensors)
    system = open_system(tmp_path / "model", CPU, torch.float32, systems=SMALL)
    report = system.adapters.attach(tmp_path / "x.safetensors")
    assert not report.left and len(report.matched) == len(tensors)
    with torch.no_grad():
        cond = trainee.sized(reader(system, CAPTIONS)(CAPTIONS), *batch.size)
        ours = system.network(batch.latents, torch.tensor([40.0, 700.0]), cond)
    lora.detach()
    assert relative_error(with_it, predicted(trainee, batch)) > 1e-3
    assert relative_error(ours, with_it) < 1e-5


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_loads_the_file(agrees, kind, layout, dora, tmp_path):
    """All keys matched, and the same answer of U-Net and text encoders."""
    if dora and layout == "kohya":
        pytest.skip("diffusers drops DoRA's magnitudes of kohya's files")
    trainee = opened(kind, tmp_path / "model", text=True)
    lora, batch = lora_beside(trainee, "attention", dora), a_batch()
    tensors = tensors_of(trainee, lora, layout)
    save_tensors(tmp_path / "x.safetensors", tensors)
    with_it = predicted(trainee, batch)
    pipeline_class = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    options = {} if kind == "sdxl" else {"safety_checker": None}
    pipeline = pipeline_class.from_pretrained(tmp_path / "model", **options)
    pipeline.load_lora_weights(tmp_path, weight_name="x.safetensors")
    loaded = sum(
        "lora_" in name
        for network in (pipeline.unet, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None))
        if network is not None
        for name, _ in network.named_parameters()
    )
    assert loaded == sum(not name.endswith(".alpha") for name in tensors)
    if kind == "sdxl":
        tokens, _, pooled, _ = pipeline.encode_prompt(list(CAPTIONS), do_classifier_free_guidance=False)
        ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2, dtype=torch.float32)
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    else:
        tokens, _ = pipeline.encode_prompt(list(CAPTIONS), "cpu", 1, False)
        added = {}
    with torch.no_grad():
        theirs = pipeline.unet(batch.latents[:, :, 0], torch.tensor([40.0, 700.0]), tokens, **added).sample[
            :, :, None
        ]
    agrees("LoRA trained here, one call", f"{kind}, {layout}{', DoRA' if dora else ''}", with_it, theirs, 1e-5,
           "diffusers load_lora_weights, peft")  # fmt: skip


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
def test_the_loss_falls_on_a_fixed_batch(kind, tmp_path):
    trainee = opened(kind, tmp_path / "model", text=True)
    subject, batch, lora = subject_of(trainee), a_batch(), lora_beside(trainee, "all")
    optimizer = torch.optim.AdamW(lora.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = adapter_loss(lora, batch, subject, LoraLoss(), seeded("cpu", "same"))[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
