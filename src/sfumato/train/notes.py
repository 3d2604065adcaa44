"""What a trained LoRA says of itself in its file's header.

Sources: Stability-AI/ModelSpec 1.0.0 (`modelspec.`); kohya-ss/sd-scripts train_network.py (`ss_`), which A1111 and
others show. Nothing of time or place is noted, so that the same training writes the same file.
"""

from __future__ import annotations

import json

import sfumato
from sfumato.families.trainee import Trainee
from sfumato.train.recipe import Recipe


def notes_of(recipe: Recipe, trainee: Trainee, step: int) -> dict[str, str]:
    """The header's metadata after `step` steps."""
    own = recipe.lora
    assert own is not None
    # with diffusers' names the scale is in the tensors
    alpha = (own.alpha or own.rank) if own.layout == "kohya" else own.rank
    side = recipe.data.size
    notes = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{side}x{side}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(own.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": recipe.name,
        "ss_sd_model_name": own.base.replace("\\", "/").rpartition("/")[2],
        "ss_learning_rate": repr(own.train.lr),
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_lr_warmup_steps": str(own.train.warmup),
        "ss_steps": str(step),
        "ss_max_train_steps": str(own.train.steps),
        "ss_total_batch_size": str(own.train.batch),
        "ss_resolution": f"({side}, {side})",
        "ss_seed": str(recipe.seed),
        "ss_caption_dropout_rate": repr(own.loss.drop_prompt),
        "ss_cache_latents": "True",
        "sfumato.version": sfumato.__version__,
    }
    if own.trigger:
        notes["modelspec.trigger_phrase"] = own.trigger
    if own.loss.weighting == "min_snr":
        notes["ss_min_snr_gamma"] = repr(own.loss.gamma)
    if own.prior.prompt or own.prior.path:
        notes["ss_prior_loss_weight"] = repr(own.loss.prior_weight)
    if own.dora:
        notes["ss_network_args"] = json.dumps({"dora_wd": "True"})
    return notes | dict(trainee.notes)
