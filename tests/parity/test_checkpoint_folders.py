"""Folders as diffusers and transformers write them: plain, in a variant, in shards, and both."""

from __future__ import annotations

import pytest
import torch

from sfumato.checkpoint.layout import find_parts, weight_files
from sfumato.checkpoint.source import open_folder

VARIANTS = [(None, "10GB"), ("fp16", "10GB"), (None, "100KB"), ("fp16", "100KB")]


def check(folder, stem, state, variant, shard) -> None:
    assert find_parts(folder).parts["model"].stem == stem
    assert len(weight_files(folder, stem, variant).files) == 1 or shard == "100KB"
    assert len(weight_files(folder, stem).files) > 1 or shard == "10GB"
    weights = open_folder(folder, stem, variant)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("variant, shard", VARIANTS)
def test_a_vae_that_diffusers_saved(tmp_path, variant, shard):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    check(tmp_path, "diffusion_pytorch_model", vae.state_dict(), variant, shard)


@pytest.mark.parametrize("variant, shard", VARIANTS)
def test_a_text_encoder_that_transformers_saved(tmp_path, variant, shard):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = CLIPTextModel(config)
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    check(tmp_path, "model", model.state_dict(), variant, shard)
