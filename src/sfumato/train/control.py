"""A recipe with [control], from its first line to the file: a ControlNet beside a frozen model of any family.

The model draws with its weights as they are; what is trained begins by changing nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.buckets import Order
from sfumato.data.folder import FolderSource
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Size
from sfumato.diffusion.loss import flow_density, prediction_loss, spread, table_density, training_pair
from sfumato.diffusion.path import FLOW
from sfumato.errors import DataError, InputError
from sfumato.generate import Model, load, to_image
from sfumato.storage import write_json
from sfumato.train.control_data import Folder, Pairs, Scenes
from sfumato.train.job import VOLATILE, Job, data_identity, fingerprint, source_of
from sfumato.train.loop import Event, Loss, Player, fit, seeded
from sfumato.train.recipe import ControlRecipe
from sfumato.train.state import tensorboard
from sfumato.train.tasks import save_sheet
from sfumato.train.texts import Remembered
from sfumato.types import Conditioning, Control, Request

SHEET = 4  # pictures of a sheet
ENCODED = 32  # pictures encoded at a time
HELD_OUT_ROUNDS = 4  # draws of noise for each held-out picture


@dataclass
class ControlJob(Job):
    """A recipe with [control]. `whole` does all of it; the other methods are its parts."""

    stage = "control"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.recipe.control is not None
        self.own: ControlRecipe = self.recipe.control

    def whole(self) -> Path:
        """The trained ControlNet's file."""
        own, place = self.own, self.folder / "control"
        self.check()
        torch.manual_seed(self.recipe.seed)
        trainee = self.trainee
        self.folder.mkdir(parents=True, exist_ok=True)
        examples = Examples(self.pairs("train"), self)
        task = ControlTask(self, examples)
        with tensorboard(self.recipe.log, self.world.leads, place) as log:
            state = fit(task, place, self.identity, self.device, self.tell, log=log)
        if self.world.leads:
            self.export(state)
            trainee.network.load_state_dict(state)
            self.measure(task)
        self.world.wait()
        self.tell(Event("done", "control", own.train.steps, own.train.steps, text=str(self.file)))
        return self.file

    def check(self) -> None:
        """`InputError` for a kind of control picture that scenes do not have, or a folder of them that is not there."""
        from sfumato.scenes.controls import require_kind

        if self.recipe.data.kind == "scenes":
            require_kind(self.own.kind, "control.kind")
        elif not Path(self.own.pictures).is_dir():
            raise InputError(
                f"there is no folder of control pictures {self.own.pictures!r}; name one as control.pictures",
                argument="control.pictures",
            )

    @property
    def file(self) -> Path:
        return self.folder / f"control-{self.own.kind}.safetensors"

    @functools.cached_property
    def model(self) -> Model:
        return load(self.own.base, str(self.device))

    @functools.cached_property
    def trainee(self) -> Any:
        """What a family's `control_trainee` makes: the network that is trained, and how it acts on the model."""
        make = getattr(self.model.system, "control_trainee", None)
        if make is None:
            raise InputError(f"{self.own.base!r} has no ControlNets to train", argument="control.base")
        return make(self.own.blocks, self.own.outputs)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of what decides the weights at a given step."""
        own = asdict(self.own)
        own["train"] = {name: value for name, value in own["train"].items() if name not in VOLATILE}
        data = data_identity(self.recipe.data)
        return fingerprint([data, self.recipe.seed, own, self.model.hashes])

    def pairs(self, part: str) -> Pairs:
        """Pictures with their control pictures: those to learn from (train), or held_out."""
        source = source_of(self.recipe, self.model.system.config.multiple, part, self.folder)
        self.describe(source, f" ({part.replace('_', ' ')})")
        if isinstance(source, SceneSource):
            return Scenes(source, self.own.kind, self.progress("rendering"))
        assert isinstance(source, FolderSource)
        return Folder(source, Path(self.own.pictures))

    def export(self, average: dict[str, Tensor]) -> Path:
        """Write the averaged weights as a file that `load(…, controlnets=…)` opens, whole or not at all."""
        return Path(self.trainee.save(average, self.file))

    def measure(self, task: ControlTask) -> None:
        """Write the error on held-out pictures with the ControlNet and without it, if any were held out."""
        try:
            unseen = Examples(self.pairs("held_out"), self)
        except DataError as error:
            self.note(f"not measured on held-out pictures: {error}")
            return
        with_it, without = (task.held_out_error(unseen, control) for control in (True, False))
        values = {"pictures": len(unseen), "rounds": HELD_OUT_ROUNDS, "without": without, "with": with_it}
        write_json(self.folder / "control" / "held-out.json", values)
        self.note(
            f"held out: error {without:.4f} without the ControlNet, {with_it:.4f} with it ({len(unseen)} pictures)"
        )


@dataclass(frozen=True)
class Batch:
    """One microbatch. latents: (B, C, 1, H, W); hints: what the ControlNet reads of their control pictures; cond: what
    the model is told of their captions.
    """

    latents: Tensor
    hints: Tensor
    cond: Conditioning


class Examples:
    """Pictures encoded once; control pictures too, where the ControlNet reads them so. Any of them at any time."""

    def __init__(self, pairs: Pairs, job: ControlJob):
        self.pairs, self.model, self.trainee, self.own = pairs, job.model, job.trainee, job.own
        self.seed = job.recipe.seed
        self.buckets = pairs.buckets()
        self.order = Order(self.buckets, job.own.train.batch, self.seed)
        self._requests = {
            size: self.model.complete(Request(size=(size[1], size[0]))) for size in self.buckets
        }
        self._told = {size: self._reader(request) for size, request in self._requests.items()}
        self._latents: dict[int, Tensor] = {}
        self._hints: dict[int, Tensor] = {}
        told = job.progress("encoding")
        for members in self.buckets.values():
            for start in range(0, len(members), ENCODED):
                self._prepare(members[start : start + ENCODED])
                told(len(self._latents), len(self))

    def __len__(self) -> int:
        return sum(map(len, self.buckets.values()))

    @torch.no_grad()
    def _prepare(self, indices: list[int]) -> None:
        pictures, controls = self.pairs.both(indices)
        with self.model.precision():
            pixels = pictures.to(self.model.device).float() / 127.5 - 1
            latents = self.model.system.encode(pixels[:, :, None]).float().cpu()
            if self.trainee.encodes:
                controls = self.trainee.hint(controls.to(self.model.device).float() / 255).float().cpu()
        self._latents |= dict(zip(indices, latents, strict=True))
        self._hints |= dict(zip(indices, controls, strict=True))

    def part(self, step: int, part: int) -> Batch:
        """Microbatch `part` of `step` (from 1): a function of both alone."""
        chosen = self.order.batch_at(step - 1, part, self.own.train.parts)
        dropped = torch.rand(len(chosen.indices), generator=seeded("cpu", self.seed, "prompt", step, part))
        indices = [int(i) for i in chosen.indices]
        captions = [
            "" if drop < self.own.drop_prompt else self.pairs.caption(i, int(epoch))
            for i, epoch, drop in zip(indices, chosen.epochs, dropped.tolist(), strict=True)
        ]
        return self.batch(indices, captions, self.order.bucket_at(step - 1))

    @torch.no_grad()
    def batch(self, indices: list[int], captions: list[str], size: Size) -> Batch:
        """These pictures, all of one size (height, width), with these captions."""
        latents = torch.stack([self._latents[i] for i in indices]).to(self.model.device)
        hints = torch.stack([self._hints[i] for i in indices]).to(self.model.device)
        return Batch(latents, hints, self._told[size](captions))

    def _reader(self, request: Request) -> Remembered:
        """What the model is told of captions at a size: its encoders are frozen, so each caption is read once."""

        @torch.no_grad()
        def read(captions: Sequence[str]) -> Conditioning:
            told = self.model.told([*captions, *[None] * len(captions)], request)
            return told.change(lambda rows: rows[: len(captions)])

        return Remembered(read, together=False)  # of some models a row is as long as the longest beside it


class ControlTask:
    """A ControlNet as the loop knows it."""

    stage = "control"
    flops = 0.0

    def __init__(self, job: ControlJob, examples: Examples):
        self.job, self.examples, self.trainee, self.model = job, examples, job.trainee, job.model
        self.recipe, self.seed = job.own.train, job.recipe.seed
        self.players = [Player("control", self.trainee.network, self.recipe, examples.part, self.loss)]

    def loss(self, net: nn.Module, batch: Batch, step: int, part: int) -> Loss:
        """The error of the model's own prediction, with what the ControlNet adds."""
        loss = self._error(net, batch, seeded("cpu", self.seed, "noise", step, part)).mean()
        return loss, {"loss": loss}

    def _error(self, net: nn.Module | None, batch: Batch, generator: torch.Generator) -> Tensor:
        """(B,) squared errors; without a network, of the model alone."""
        system, device = self.model.system, batch.latents.device
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        sigma = self._sigma(torch.rand(len(noise), generator=generator)).to(device)
        pair = training_pair(batch.latents, noise, sigma, system.parameterization)
        asked = pair.x.float(), pair.time, batch.cond
        if net is None:
            return prediction_loss(system.network(*asked), pair)
        hints = batch.hints if self.trainee.encodes else self.trainee.hint(batch.hints.float() / 255)
        control = self.trainee.adds(net, *asked, hints)
        return prediction_loss(self.trainee.answer(*asked, control), pair)

    def _sigma(self, u: Tensor) -> Tensor:
        """Noise levels for draws u, uniform on (0, 1): by the table that the model was trained on, or along a flow."""
        levels = self.model.system.levels
        density = flow_density(mean=self.job.own.mean) if levels.path is FLOW else table_density(levels)
        return density(spread(u)).float()

    @torch.no_grad()
    def held_out_error(self, unseen: Examples, controlled: bool) -> float:
        """Mean error over all of `unseen`, with the ControlNet or without; the same noise for both."""
        net, total = self.trainee.network if controlled else None, 0.0
        for number in range(HELD_OUT_ROUNDS):
            for size, members in unseen.buckets.items():
                for start in range(0, len(members), self.recipe.batch):
                    some = list(members[start : start + self.recipe.batch])
                    batch = unseen.batch(some, [unseen.pairs.caption(i, 0) for i in some], size)
                    chance = seeded("cpu", self.seed, "held out", number, *size, start)
                    with self.model.precision():
                        total += float(self._error(net, batch, chance).sum())
        return total / (HELD_OUT_ROUNDS * len(unseen))

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Control pictures above what is drawn after them; the file is brought up to date too."""
        kind, pairs = self.job.own.kind, self.examples.pairs
        system = self.model.system.with_controls({kind: self.job.export(average)})
        model = Model(system, self.model.device, self.model.name)
        members = next(iter(self.examples.buckets.values()))[:SHEET]
        shown = [to_image(control[:, None].float() / 127.5 - 1) for control in pairs.both(members)[1]]
        drawn = [
            model.generate(
                Request(pairs.caption(index, 0), size=image.size, controls=(Control(kind, image),))
            ).images[0]
            for index, image in zip(members, shown, strict=True)
        ]
        return save_sheet([shown, drawn], self.job.folder / "sheets" / f"control-{step:07d}.png")
