"""The tables of names: complete, invertible, and those of our own modules."""

from __future__ import annotations

import pytest
import torch

from sfumato.autoencoder.kl import AutoencoderKL, KLConfig
from sfumato.checkpoint.rules import shapes
from sfumato.families.sd import keys
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.nn.unet import UNet
from sfumato.text.clip import CLIP_L, OPENCLIP_BIGG, OPENCLIP_H, ClipTextEncoder

# tensors of the published files, without buffers and markers: U-Net, VAE, text encoder(s) as the file keeps them
COUNTS = {
    "sd1": 686 + 248 + 196,
    "sd1-inpaint": 686 + 248 + 196,
    "sd1-lcm": 687 + 248 + 196,
    "sd2": 686 + 248 + 23 * 12 + 4,
    "sd2-inpaint": 686 + 248 + 23 * 12 + 4,
    "sdxl": 1680 + 248 + 196 + 32 * 12 + 5,
    "sdxl-inpaint": 1680 + 248 + 196 + 32 * 12 + 5,
    "sdxl-lcm": 1681 + 248 + 196 + 32 * 12 + 5,
    "sdxl-refiner": 1220 + 248 + 32 * 12 + 5,
}


@pytest.mark.parametrize("kind", SYSTEMS)
def test_a_file_has_as_many_tensors_as_the_published_one(kind):
    assert len(FAMILY.file_map(SYSTEMS[kind]).theirs) == COUNTS[kind]


@pytest.mark.parametrize("kind", SYSTEMS)
def test_there_and_back_is_the_same_for_every_name(kind):
    table = FAMILY.file_map(SYSTEMS[kind])
    ours = {
        name: torch.full((2, 2) if name.endswith("weight") else (2,), float(n))
        for n, name in enumerate(table.ours)
    }
    theirs = dict(table.to_theirs(ours))
    back = table.to_ours(theirs)
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
    again = table.to_theirs(back)
    assert sorted(again) == sorted(theirs) and len(theirs) == COUNTS[kind]
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())


def test_names_of_real_files_stand_in_the_tables():
    """Spot checks, by hand, of names that are easy to get wrong."""
    block = "transformer_blocks.9.ff.net.0.proj.weight"
    layer = "text_model.encoder.layers.31"
    expected = [
        (
            keys.unet_map(SYSTEMS["sd1"].unet),
            {
                "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
                "input_blocks.4.0.skip_connection.bias": "down_blocks.1.resnets.0.conv_shortcut.bias",
                "input_blocks.11.0.out_layers.3.bias": "down_blocks.3.resnets.1.conv2.bias",
                "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
                "output_blocks.5.2.conv.weight": "up_blocks.1.upsamplers.0.conv.weight",
                "output_blocks.11.1.proj_out.weight": "up_blocks.3.attentions.2.proj_out.weight",
            },
        ),
        (
            keys.unet_map(SYSTEMS["sdxl"].unet),
            {
                "output_blocks.2.2.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
                "label_emb.0.2.weight": "add_embedding.linear_2.weight",
                f"middle_block.1.{block}": f"mid_block.attentions.0.{block}",
                f"input_blocks.8.1.{block}": f"down_blocks.2.attentions.1.{block}",
            },
        ),
        (
            keys.vae_map(KLConfig()),
            {
                "decoder.up.3.block.0.norm1.weight": "decoder.up_blocks.0.resnets.0.norm1.weight",
                "decoder.up.0.block.0.nin_shortcut.weight": "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
                "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.2.upsamplers.0.conv.bias",
                "encoder.mid.attn_1.proj_out.bias": "encoder.mid_block.attentions.0.to_out.0.bias",
            },
        ),
        (
            keys.open_clip_map(OPENCLIP_BIGG),
            {
                "text_projection": "text_projection.weight",
                "positional_embedding": "text_model.embeddings.position_embedding.weight",
                "transformer.resblocks.31.mlp.c_fc.bias": f"{layer}.mlp.fc1.bias",
                "transformer.resblocks.31.attn.in_proj_weight": tuple(
                    f"{layer}.self_attn.{x}_proj.weight" for x in "qkv"
                ),
            },
        ),
    ]
    for part, names in expected:
        table = {rule.theirs: rule.ours for rule in part.rules}
        assert {name: table[name] for name in names} == names


@pytest.mark.parametrize("kind", SYSTEMS)
def test_our_unet_has_the_names_of_the_table(kind):
    with torch.device("meta"):
        state = UNet(SYSTEMS[kind].unet).state_dict()
    assert sorted(keys.unet_map(SYSTEMS[kind].unet).ours) == sorted(state)


@pytest.mark.parametrize(
    "config", [KLConfig(), KLConfig(widths=(32, 32, 64), resnets=1, use_quant_conv=False)]
)
def test_our_vae_has_the_names_of_the_table(config):
    with torch.device("meta"):
        state = AutoencoderKL(config).state_dict()
    table = keys.vae_map(config)
    assert sorted(table.ours) == sorted(state)
    original = shapes(table.to_theirs(state))
    assert original["decoder.mid.attn_1.q.weight"] == (config.widths[-1], config.widths[-1], 1, 1)
    assert original["encoder.conv_in.weight"] == (config.widths[0], 3, 3, 3)


@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_H, OPENCLIP_BIGG], ids=["l", "h", "bigg"])
def test_our_text_encoders_have_the_names_of_the_tables(config):
    with torch.device("meta"):
        state = {n: t for n, t in ClipTextEncoder(config).state_dict().items() if "position_ids" not in n}
    for table in (keys.clip_map(config), keys.open_clip_map(config)):
        assert sorted(table.ours) == sorted(state)
    fused = shapes(keys.open_clip_map(config).to_theirs(state))
    assert fused["transformer.resblocks.0.attn.in_proj_weight"] == (3 * config.width, config.width)
    assert f"transformer.resblocks.{config.layers}.ln_1.weight" not in fused


def test_the_last_block_of_sd2_is_dropped_by_name_and_a_missing_one_is_missed():
    table = keys.open_clip_map(OPENCLIP_H)
    names = {*table.theirs, "text_projection", "logit_scale"}
    names |= {
        f"transformer.resblocks.23.{name}" for name in ("ln_1.weight", "attn.in_proj_bias", "mlp.c_fc.bias")
    }
    report = table.match(names)
    assert report.complete and len(report.dropped) == 5
    report = table.match(names - {"transformer.resblocks.22.ln_1.weight"})
    assert report.missing == ("transformer.resblocks.22.ln_1.weight",)
    assert table.match({*names, "transformer.resblocks.24.ln_1.weight"}).unexpected


def test_a_file_says_which_parts_it_has():
    sd2 = SYSTEMS["sd2"]
    assert FAMILY.prefixes(sd2) == {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.model.",
    }
    turbo = ["model.diffusion_model.out.0.bias", "conditioner.embedders.0.model.ln_final.bias"]
    assert FAMILY.prefixes(sd2, iter(turbo)) == {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.model.",
    }
