"""Training a ControlNet beside a frozen model of any family: a recipe with a table [control], to one file.

    [control]        base: the model; kind: what the ControlNet is called, and of scenes which picture it reads;
                     pictures: of a folder, where the control pictures are
    [control.train]  its optimisation, as of the other recipes

The model draws with its weights as they are; what is trained begins by changing nothing.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.buckets import Order
from sfumato.diffusion.loss import logit_normal, prediction_loss, spread, training_pair
from sfumato.diffusion.path import FLOW
from sfumato.errors import InputError
from sfumato.families import DEFAULT_MODEL
from sfumato.generate import Model, load, to_image
from sfumato.train.control_data import Folder, Pairs, Scenes
from sfumato.train.loop import Event, Loss, OnEvent, Player, fit, seeded
from sfumato.train.recipe import DataRecipe, TrainRecipe, checked, read_tables
from sfumato.train.stages import VOLATILE
from sfumato.train.tasks import save_sheet
from sfumato.types import Conditioning, Control, Request

SHEET = 4  # pictures of a sheet
ENCODED = 32  # pictures encoded at a time
EDGE = 1e-4  # how near to the ends of a flow's path training comes


@dataclass(frozen=True)
class ControlRecipe:
    """What is trained beside what. blocks, outputs: of a model of our own, how many of the base's blocks are copied and
    before how many something is added. mean: of the logit of a flow's noise levels. drop_prompt: share of the pictures
    whose caption is emptied, so that the control picture must say it all.
    """

    train: TrainRecipe
    base: str = DEFAULT_MODEL
    kind: str = "depth"
    pictures: str = ""
    blocks: int = 1
    outputs: int = 4
    mean: float = 0.8
    drop_prompt: float = 0.3


@dataclass(frozen=True)
class Recipe:
    name: str
    data: DataRecipe
    control: ControlRecipe
    seed: int = 0
    out: str = ""


def is_control(path: str | Path) -> bool:
    """Whether a recipe file trains a ControlNet; what cannot be read is left to who reads it whole."""
    try:
        return "control" in tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False


def read(path: str | Path, overrides: dict[str, Any] | None, data: str | Path | None) -> Recipe:
    """The recipe in a file, checked; see `recipe.read_recipe`."""
    values = read_tables(path, overrides)
    found: Recipe = checked(Recipe, values, "control")
    own = found.control
    if data is not None:
        found = replace(found, data=replace(found.data, kind="folder", path=str(data)))
    if found.data.kind not in ("scenes", "folder"):
        raise InputError(f"data.kind must be scenes or folder, not {found.data.kind!r}", argument="data.kind")
    if found.data.kind == "folder" and not (found.data.path and own.pictures):
        raise InputError(
            "a folder needs data.path, of captioned pictures, and control.pictures, of control pictures with the same "
            "names",
            argument="control.pictures",
        )
    if found.data.flip:
        raise InputError(
            "data.flip turns pictures and not their control pictures; leave it out", argument="data.flip"
        )
    if not 0 <= own.drop_prompt <= 1:
        raise InputError(
            f"control.drop_prompt must be from 0 to 1, not {own.drop_prompt}", argument="control.drop_prompt"
        )
    return found


def run(
    path: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    on_event: OnEvent | None = None,
    base: Model | None = None,
) -> Path:
    """Train what a recipe describes, or go on from where it stopped; return the file of the ControlNet.

    base: the model, if it is open already. Raises `InputError` for a bad recipe, a model without ControlNets, or a run
    folder of another recipe.
    """
    recipe = read(path, overrides, data)
    folder = Path(out or recipe.out or Path("runs") / recipe.name)
    tell = on_event or (lambda event: None)
    model = base or load(recipe.control.base, device)
    trainee = getattr(model.system, "control_trainee", None)
    if trainee is None:
        raise InputError(f"{model.name!r} has no ControlNets to train", argument="control.base")
    torch.manual_seed(recipe.seed)
    task = ControlTask(recipe, folder, model, trainee(recipe.control.blocks, recipe.control.outputs), tell)
    state = fit(task, folder / "control", identity(recipe, model), model.device, tell)
    file = task.export(state)
    tell(Event("done", "control", recipe.control.train.steps, recipe.control.train.steps, text=str(file)))
    return file


def identity(recipe: Recipe, model: Model) -> str:
    """A hash of what decides the weights at a given step."""
    parts = asdict(recipe) | {"out": "", "base": model.hashes}
    parts["control"]["train"] = {k: v for k, v in parts["control"]["train"].items() if k not in VOLATILE}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """One microbatch. latents: (B, C, 1, H, W); hints: what the ControlNet reads of their control pictures."""

    latents: Tensor
    hints: Tensor
    cond: Conditioning = field(repr=False)
    rows: int = 0


class ControlTask:
    """A ControlNet as the loop knows it. `trainee`: a family's `control_trainee`."""

    stage = "control"
    flops = 0.0

    def __init__(
        self, recipe: Recipe, folder: Path, model: Model, trainee: Any, tell: Callable[[Event], None]
    ):
        self.whole, self.folder, self.model, self.trainee = recipe, folder, model, trainee
        self.recipe, self.seed = recipe.control.train, recipe.seed
        self.pairs = _pairs(recipe, model, tell)
        self.order = Order(self.pairs.buckets(), self.recipe.batch, self.seed)
        count = sum(map(len, self.pairs.buckets().values()))
        self._latents: dict[int, Tensor] = {}
        self._hints: dict[int, Tensor] = {}
        for members in self.pairs.buckets().values():
            for start in range(0, len(members), ENCODED):
                self._prepare(members[start : start + ENCODED])
                tell(Event("prepare", "encoding", len(self._latents), count))
        self.players = [Player("control", trainee.network, self.recipe, self.batch, self.loss)]

    @torch.no_grad()
    def _prepare(self, indices: list[int]) -> None:
        """Encode pictures once; control pictures too, where the ControlNet reads them so."""
        pixels = self.pairs.pictures(indices).to(self.model.device).float() / 127.5 - 1
        with self.model.precision():
            latents = self.model.system.encode(pixels[:, :, None]).float().cpu()
        self._latents |= dict(zip(indices, latents, strict=True))
        controls = self.pairs.controls(indices)
        if self.trainee.encodes:
            with self.model.precision():
                controls = self.trainee.hint(controls.to(self.model.device).float() / 255).float().cpu()
        self._hints |= dict(zip(indices, controls, strict=True))

    def batch(self, step: int, part: int) -> Batch:
        """Microbatch `part` of `step` (from 1): a function of both alone."""
        chosen = self.order.batch_at(step - 1, part, self.recipe.parts)
        dropped = torch.rand(len(chosen.indices), generator=seeded("cpu", self.seed, "prompt", step, part))
        indices = [int(i) for i in chosen.indices]
        texts = [
            "" if drop < self.whole.control.drop_prompt else self.pairs.caption(i, int(epoch))
            for i, epoch, drop in zip(indices, chosen.epochs, dropped.tolist(), strict=True)
        ]
        latents = torch.stack([self._latents[i] for i in indices]).to(self.model.device)
        hints = torch.stack([self._hints[i] for i in indices]).to(self.model.device)
        size = self.pairs.pictures(indices[:1]).shape[-2:]
        with torch.no_grad():
            told = self.model.told([*texts, *[None] * len(texts)], self._request(size))
        return Batch(latents, hints, told.change(lambda rows: rows[: len(texts)]), len(texts))

    def _request(self, size: torch.Size) -> Request:
        return self.model.complete(Request(size=(int(size[1]), int(size[0]))))

    def loss(self, net: nn.Module, batch: Batch, step: int, part: int) -> Loss:
        """The error of the model's own prediction, with what the ControlNet adds."""
        system = self.model.system
        generator = seeded("cpu", self.seed, "noise", step, part)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents.device)
        sigma = self._sigma(torch.rand(batch.rows, generator=generator)).to(batch.latents.device)
        pair = training_pair(batch.latents, noise, sigma, system.parameterization)
        hints = batch.hints if self.trainee.encodes else self.trainee.hint(batch.hints.float() / 255)
        control = self.trainee.adds(net, pair.x.float(), pair.time, batch.cond, hints)
        answer = self.trainee.answer(pair.x.float(), pair.time, batch.cond, control)
        loss = prediction_loss(answer, pair).mean()
        return loss, {"loss": loss}

    def _sigma(self, u: Tensor) -> Tensor:
        """Noise levels for draws u, uniform on (0, 1): by the table that the model was trained on, or along a flow."""
        levels = self.model.system.levels
        if levels.path is FLOW:
            return logit_normal(self.whole.control.mean)(spread(u)).clamp(EDGE, 1 - EDGE)
        return levels.sigmas[(spread(u) * len(levels.sigmas)).long()].float()

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Control pictures above what is drawn after them; the file is brought up to date too."""
        file = self.export(average)
        system = self.model.system.with_controls({self.whole.control.kind: file})
        model = Model(system, self.model.device, self.model.name)
        members = next(iter(self.pairs.buckets().values()))[:SHEET]
        shown = [to_image(c[:, None].float() / 127.5 - 1) for c in self.pairs.controls(members)]
        drawn = [
            model.generate(
                Request(
                    self.pairs.caption(index, 0),
                    size=image.size,
                    controls=(Control(self.whole.control.kind, image),),
                )
            ).images[0]
            for index, image in zip(members, shown, strict=True)
        ]
        return save_sheet([shown, drawn], self.folder / "sheets" / f"control-{step:07d}.png")

    def export(self, average: dict[str, Tensor]) -> Path:
        """Write the averaged weights as a file that `load(…, controlnets=…)` opens."""
        return self.trainee.save(average, self.folder / f"control-{self.whole.control.kind}.safetensors")


def _pairs(recipe: Recipe, model: Model, tell: Callable[[Event], None]) -> Pairs:
    from sfumato.data.folder import FolderSource
    from sfumato.data.scenes import SceneSource

    d = recipe.data
    if d.kind == "scenes":
        source = SceneSource(d.count, d.seed, d.split, d.size)
        return Scenes(
            source, recipe.control.kind, lambda done, of: tell(Event("prepare", "rendering", done, of))
        )
    multiple = model.system.config.multiple
    return Folder(FolderSource(d.path, d.size, multiple=multiple, seed=d.seed), Path(recipe.control.pictures))
