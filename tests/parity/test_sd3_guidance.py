"""Skip-layer guidance and the schedules of Stable Diffusion 3 against diffusers' pipeline and scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from sfumato.diffusion.guidance import Skipping, cfg, cfg_batched
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.path import FLOW
from sfumato.diffusion.schedules import flow_levels, share_interval, sigmas_for
from sfumato.sampling import SAMPLERS

THEIRS = "diffusers StableDiffusion3Pipeline"
STEPS, SCALE, SKIP = 10, 4.0, 2.8


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(2)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=weight[0].numel() ** -0.5)
    return network.eval()


@pytest.fixture(scope="module")
def told():
    """Tokens and pooled embeddings of a prompt and of its negative, and the noise."""
    torch.manual_seed(3)
    return torch.randn(2, 9, 24), torch.randn(2, 12), torch.randn(1, 4, 8, 8)


@pytest.mark.parametrize("share", ((0.01, 0.2), (0.0, 0.5), (0.25, 1.0), (0.5, 0.55)))
@pytest.mark.parametrize("batched", (True, False))
@torch.no_grad()
def test_skip_layer_guidance_is_that_of_the_pipeline(transformer, told, agrees, share, batched):
    tokens, pooled, noise = told
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = StableDiffusion3Pipeline(
        transformer, scheduler, AutoencoderKL(latent_channels=4), None, None, None, None, None, None
    )
    pipeline.set_progress_bar_config(disable=True)
    skipped = [1, 2]
    want = pipeline(
        prompt_embeds=tokens[:1], negative_prompt_embeds=tokens[1:], pooled_prompt_embeds=pooled[:1],
        negative_pooled_prompt_embeds=pooled[1:], height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor, num_inference_steps=STEPS, guidance_scale=SCALE, latents=noise.clone(),
        skip_guidance_layers=skipped, skip_layer_guidance_scale=SKIP, skip_layer_guidance_start=share[0],
        skip_layer_guidance_stop=share[1], output_type="latent",
    ).images  # fmt: skip

    calls = {"whole": 0, "skipping": 0}

    def network(rows, skip=None):
        def answer(x, time, _):
            calls["skipping" if skip else "whole"] += 1
            return transformer(
                hidden_states=x, timestep=1000 * time, encoder_hidden_states=tokens[rows],
                pooled_projections=pooled[rows], return_dict=False, skip_layers=skip,
            )[0]  # fmt: skip

        return Parameterization("flow", FLOW).denoiser(answer, None)

    sigmas = sigmas_for("flow_match", STEPS, flow_levels(3.0))
    assert torch.allclose(sigmas, scheduler.sigmas.double(), atol=1e-6)
    wanted, unwanted = slice(0, 1), slice(1, 2)
    skipping = Skipping(network(wanted, skipped), SKIP, share_interval(sigmas, *share))
    denoise = (
        cfg_batched(network(slice(0, 2)), network(wanted), SCALE, skipping=skipping)
        if batched
        else cfg(network(wanted), network(unwanted), SCALE, skipping=skipping)
    )
    ours = SAMPLERS["euler"](denoise, noise, sigmas, path=FLOW, noise=None)
    agrees("skip-layer guidance", "SD3, 10 steps of euler", ours, want, 1e-4, THEIRS)
    acting = [i for i in range(STEPS) if share[0] * STEPS < i < share[1] * STEPS]
    assert calls == {"whole": STEPS * (1 if batched else 2), "skipping": len(acting)}


@pytest.mark.parametrize("steps", (1, 4, 28, 50))
@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_flow_match_is_diffusers_grid(agrees, steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = sigmas_for("flow_match", steps, flow_levels(shift))
    agrees("schedule flow_match", "1 to 50 steps", ours, scheduler.sigmas.double(), 1e-6,
           "diffusers FlowMatchEulerDiscreteScheduler")  # fmt: skip


@pytest.mark.parametrize("steps", (1, 4, 28))
@pytest.mark.parametrize("size", ((512, 512), (1024, 1024), (1536, 640)))
def test_flow_dynamic_is_diffusers_dynamic_shift(agrees, steps, size):
    tokens = size[0] * size[1] // 16**2
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(steps, mu=calculate_shift(tokens))
    ours = sigmas_for("flow_dynamic", steps, flow_levels(3.0), tokens)
    agrees("schedule flow_dynamic", "512² to 1024²", ours, scheduler.sigmas.double(), 1e-6,
           "diffusers FlowMatchEulerDiscreteScheduler")  # fmt: skip


def test_the_shift_at_both_ends_is_the_published_one():
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        middle = float(sigmas_for("flow_dynamic", 1000, flow_levels(), tokens)[500])
        assert middle == pytest.approx(1 / (1 + math.exp(-mu) * (1 / 0.5 - 1)), rel=1e-6)
