"""What the shared rooms need to know of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import CheckpointError
from sfumato.families.published.checkpoint import Checkpoint
from sfumato.families.published.kinds import Family, Network
from sfumato.families.sd import folder, keys
from sfumato.families.sd.adapters import NAMING
from sfumato.families.sd.condition import plan_of
from sfumato.families.sd.distilled import preset_named
from sfumato.families.sd.levels import has_usual_levels
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.signatures import control_title, predicts_v, signatures
from sfumato.nn.controlnet import ControlNet, ControlNetConfig
from sfumato.nn.unet import KEPT, UNet, UNetConfig

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' words to ours

TAGS = "modelspec.tags"
SCHEDULERS = {  # what a folder's says of a model that was distilled so
    "lcm": {"_class_name": "LCMScheduler"},
    "turbo": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "lightning": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
}


def settled(found: Checkpoint, source: str) -> Checkpoint:
    """With the prediction that the scheduler's JSON tells, or else, of an SD 2, the numbers."""
    said = found.configs.get("scheduler")
    if said is not None:
        prediction = said.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise CheckpointError(
                f"{source}/scheduler asks for the prediction {prediction!r}; epsilon and v_prediction are known"
            )
        zero_snr = said.get("rescale_betas_zero_snr") is True
        return replace(found, prediction=PREDICTIONS[prediction], zero_snr=zero_snr)
    if found.kind == "sd2" and found.prediction == "epsilon" and found.draws:
        v = predicts_v(found.parts["unet"], found.system.unet)
        return replace(found, prediction="v" if v else "epsilon")
    return found


def unsayable(found: Checkpoint) -> str:
    if found.system.unet.time_cond:
        return (
            "its U-Net is told the guidance scale, for which single files have no name; keep it as a folder"
        )
    if not has_usual_levels(found):
        return "its scheduler has betas of its own, for which single files have no name; keep it as a folder"
    return ""


def markers(found: Checkpoint) -> dict[str, Tensor]:
    """Empty tensors whose names say that the U-Net was trained to predict v, and how."""
    if found.prediction != "v":
        return {}
    names = ("v_pred", "ztsnr") if found.zero_snr else ("v_pred",)
    return {name: torch.zeros(0) for name in names}


def notes(found: Checkpoint) -> dict[str, str]:
    """The word by which a reader knows again what a folder's scheduler says of how it is drawn."""
    how = preset_named(found)[0]
    return {TAGS: how} if how != "plain" and found.configs.get("scheduler") else {}


def _tagged(found: Checkpoint) -> str:
    """The word that `notes` has put into a single file, "" where there is none."""
    word = preset_named(found)[0]
    return word if found.metadata.get(TAGS) == word else ""


def denoiser_config(found: Checkpoint) -> dict[str, Any]:
    system = found.system
    v_of_sd2 = found.kind == "sd2" and found.prediction == "v"
    small = (found.kind == "sd2" and not v_of_sd2) or _tagged(found) == "turbo"
    size = 512 if small else system.size
    return folder.unet_config(system.unet, size // system.vae.factor, upcast=v_of_sd2)


def scheduler_config(found: Checkpoint) -> dict[str, Any]:
    usual = folder.scheduler_config(found.kind, found.prediction, found.zero_snr)
    return usual | SCHEDULERS.get(_tagged(found), {})


def model_index(found: Checkpoint, scheduler: str) -> dict[str, Any]:
    return folder.model_index(found.kind, found.system, scheduler)


def pads(kind: str) -> Mapping[str, int | None]:
    return {reader.part: reader.pad for reader in plan_of(kind).readers}


FAMILY = Family(
    name="sd",
    denoiser="unet",
    called="a U-Net",
    systems=SYSTEMS,
    predictions=("epsilon", "v"),
    networks={UNetConfig: Network(UNet, KEPT), ControlNetConfig: Network(ControlNet, KEPT)},
    signatures=signatures,
    control_title=control_title,
    denoiser_map=keys.unet_map,
    extras=keys.EXTRAS,
    settled=settled,
    unsayable=unsayable,
    markers=markers,
    denoiser_config=denoiser_config,
    scheduler_config=scheduler_config,
    model_index=model_index,
    pads=pads,
    same_tensors={},
    naming=NAMING,
    notes=notes,
)
