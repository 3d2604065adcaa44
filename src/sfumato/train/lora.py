"""A recipe with [lora], from its first line to the file: the model, latents, pictures of the class, texts, training."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.adapters.trainable import TrainedLora, check_spelled, chosen, layers_of, written
from sfumato.checkpoint.writer import write_tensors
from sfumato.data.discover import discover
from sfumato.data.folder import FolderSource
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.source import Source
from sfumato.errors import DataError, InputError
from sfumato.families import open_model
from sfumato.families.trainee import Trainee
from sfumato.generate import Model, to_image
from sfumato.memory import available
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import DTYPES, fast_dtype
from sfumato.storage import data_hash, write_json
from sfumato.train.activations import SHARE, computed_twice, kept_bytes
from sfumato.train.adapter import (
    Examples,
    Pictures,
    Subject,
    adapter_loss,
    held_out_error,
    picture_flops,
)
from sfumato.train.job import VOLATILE, Job, data_identity, fingerprint
from sfumato.train.loop import Event, Loss, Player, fit, seeded
from sfumato.train.notes import notes_of
from sfumato.train.prior import draw_class
from sfumato.train.recipe import LoraRecipe
from sfumato.train.state import has_state, tensorboard
from sfumato.train.tasks import SHEET_WIDTH, save_sheet
from sfumato.train.texts import TextCache, build_texts

SHEET_PICTURES = 4  # of captions, where the recipe names no samples
HELD_OUT_ROUNDS = 8  # draws of noise for each held-out picture
DRAWS = 1  # to be raised whenever training takes other chance for the same recipe


@dataclass
class LoraJob(Job):
    """A recipe with [lora]. `whole` does all of it; the other methods are its parts."""

    stage = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.recipe.lora is not None
        self.own: LoraRecipe = self.recipe.lora
        precision = self.own.train.precision
        self.dtype = fast_dtype(self.device) if precision == "auto" else DTYPES[precision]

    def whole(self) -> Path:
        """The trained LoRA's file."""
        own, place = self.own, self.folder / "lora"
        trainee, identity, layers = self.trainee, self.identity, self.layers
        has_state(place / "state", identity)
        check_spelled((trainee.spell(path, own.layout) for path in layers), own.dora)
        if own.prior.path:
            discover(own.prior.path)  # what is wrong with it is told before anything is encoded
        source = self.source(self.multiple, "train")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.describe(source, f"; {len(layers)} layers of {own.base}")
        pictures = Pictures(source, self.latents(source), self.caption)
        prior = self.prior()
        unseen = self.unseen()
        told = self.texts([p for p in (pictures, prior, unseen) if p is not None])
        subject = Subject(told, trainee.sized, trainee.predict, trainee.parameterization, trainee.levels)
        examples = Examples(pictures, prior, own.train, own.loss.drop_prompt, self.recipe.seed, self.device)
        lora = TrainedLora(
            layers,
            own.rank,
            own.alpha or float(own.rank),
            dora=own.dora,
            seeds=lambda path: seeded("cpu", self.recipe.seed, "factors", path),
        )
        lora.to(self.device)
        try:
            with self.recomputation(lora, examples, subject):
                task = LoraTask(self, lora, examples, subject, self.prompts(source))
                peak = matmul_peak(self.device, self.dtype, 0.6)
                with tensorboard(self.recipe.log, self.world.leads, place) as log:
                    state = fit(task, place, identity, self.device, self.tell, peak, log)
            lora.load_state_dict(state)
            if self.world.leads:
                self.export(lora, own.train.steps)
                if unseen is not None:
                    self.measure(lora, unseen, subject)
            self.world.wait()
        finally:
            lora.detach()
        self.tell(Event("done", "lora", own.train.steps, own.train.steps, text=str(self.file)))
        return self.file

    @property
    def file(self) -> Path:
        return self.folder / f"{self.recipe.name}.safetensors"

    # --- the model ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def trainee(self) -> Trainee:
        system = open_model(self.own.base, self.device, self.dtype, {"offload": "auto"})
        make: Callable[[bool], Trainee] | None = getattr(system, "trainee", None)
        if make is None:
            raise InputError(f"LoRAs for {self.own.base!r} are not trained here", argument="lora.base")
        return make(self.own.text)

    @functools.cached_property
    def model(self) -> Model:
        """Draws and encodes with the networks that are trained beside."""
        return Model(self.trainee.system, self.device, self.own.base, self.dtype)

    @functools.cached_property
    def layers(self) -> dict[str, torch.nn.Module]:
        """Path to layer, of those that get factors. Text encoders' are among them only if they are asked for."""
        trainee = self.trainee
        known = {
            f"{part}.{path}": layer
            for part, network in trainee.networks.items()
            for path, layer in layers_of(network)
        }
        if not self.own.text:
            known = {path: layer for path, layer in known.items() if not trainee.in_text(path)}
        targets = self.own.targets
        return chosen(known, targets[0] if len(targets) == 1 else targets)

    @functools.cached_property
    def identity(self) -> str:
        """A hash of what decides the factors at a given step."""
        own = asdict(self.own)
        own["train"] = {key: value for key, value in own["train"].items() if key not in VOLATILE}
        for name in ("samples", "layout", "dtype", "recompute"):
            del own[name]
        data = data_identity(self.recipe.data)
        parts = [DRAWS, data, self.recipe.seed, own, self.trainee.identity(), str(self.dtype)]
        return fingerprint(parts)

    @contextlib.contextmanager
    def recomputation(self, lora: TrainedLora, examples: Examples, subject: Subject) -> Iterator[None]:
        """Blocks are computed twice inside, if the recipe says so, or where a step would not fit."""
        twice = self.own.recompute == "on"
        if self.own.recompute == "auto":
            one = examples.part(1, 0)
            largest = max(height * width for height, width in examples.own.cache.buckets())
            factor = len(one.latents) * largest / (one.size[0] * one.size[1])
            with self.model.precision():
                with torch.no_grad():
                    cond = subject.sized(subject.told(one.captions[:1]), *one.size)
                time = torch.full((1,), 0.5, device=self.device)
                kept = kept_bytes(
                    lambda: lora(subject.predict, one.latents[:1], time, cond),
                    [p for network in self.trainee.networks.values() for p in network.parameters()],
                )
            twice = kept * factor > SHARE * available(self.device)
            if twice:
                self.note(f"a step would keep {kept * factor / 2**30:.1f} GiB, so blocks are computed twice")
        with computed_twice(self.trainee.repeated) if twice else contextlib.nullcontext():
            yield

    # --- what it learns from -----------------------------------------------------------------------------------------

    @property
    def multiple(self) -> int:
        return int(self.model.system.config.multiple)

    def unseen(self) -> Pictures | None:
        """Pictures held out, to measure on, if there are any."""
        try:
            source = self.source(self.multiple, "held_out")
        except DataError:
            return None
        return Pictures(source, self.latents(source), self.caption)

    def caption(self, text: str) -> str:
        """A caption as it is read: the trigger first."""
        return f"{self.own.trigger} {text}".strip() if self.own.trigger else text

    def latents(self, source: Source) -> LatentCache:
        digest = self.model.hashes["autoencoder"]
        place = self.folder / "latents" / f"{digest[:12]}-{str(self.dtype).removeprefix('torch.')}"

        def encode(pixels: Tensor) -> Tensor:
            with self.model.precision():
                return self.model.system.encode(pixels.to(self.device)).float()

        if self.world.leads:
            build_latents(source, encode, digest, place, 8, self.progress("encoding"))
        self.world.wait()
        return LatentCache(place, source, digest)

    def prior(self) -> Pictures | None:
        """Pictures of the class: given, or drawn by the model before it learns anything, once."""
        own, d = self.own.prior, self.recipe.data
        if not own.prompt and not own.path:
            return None
        place = Path(own.path)
        if own.prompt:
            place = self.folder / "prior"
            if self.world.leads:
                seed = self.recipe.seed
                draw_class(
                    self.model, own, place, d.size, seed, self.trainee.identity(), self.progress("prior")
                )
            self.world.wait()
        source = FolderSource(
            place, d.size, multiple=self.multiple, seed=d.seed, cache=self.folder / "pictures"
        )
        return Pictures(source, self.latents(source))

    def texts(self, all_pictures: list[Pictures]) -> Callable[[tuple[str, ...]], Any]:
        """What tells features of captions: a cache, unless encoders are trained. Too long ones are named first."""
        captions = {""}
        for pictures in all_pictures:
            source = pictures.source
            for index in range(len(source)):
                caption = pictures.caption(source.caption(index, 0))
                if caption not in captions:
                    try:
                        self.trainee.reader([caption])
                    except InputError as error:
                        raise InputError(
                            f"the caption of {source.name(index)} cannot be read: {error}", argument="data"
                        ) from None
                captions.add(caption)
        reader = self.trainee.reader(captions)
        if self.own.text:
            return reader

        def read(some: Any) -> Any:
            with self.model.precision():
                return reader(some)

        key = f"{self.trainee.identity()} {self.dtype}"
        progress = self.progress("reading captions")
        if self.world.leads:
            build_texts(captions, read, key, self.folder / "texts", on_progress=progress)
        self.world.wait()
        path, ordered = build_texts(captions, read, key, self.folder / "texts")
        return TextCache(path, ordered, self.device)

    def prompts(self, source: Source) -> list[str]:
        """What the sample sheets show."""
        if self.own.samples:
            return list(self.own.samples)
        spread = range(0, len(source), max(1, len(source) // SHEET_PICTURES))
        return list(dict.fromkeys(self.caption(source.caption(i, 0)) for i in spread[:SHEET_PICTURES]))

    # --- what comes of it --------------------------------------------------------------------------------------------

    def export(self, lora: TrainedLora, step: int) -> Path:
        """Write the file, whole or not at all."""
        layout = self.own.layout
        factors = ((own, self.trainee.spell(path, layout)) for path, own in lora.named_factors())
        tensors = written(factors, layout)
        notes = notes_of(self.recipe, self.trainee, step)
        write_tensors(self.file, tensors, dtype=DTYPES[self.own.dtype], metadata=notes)
        hashed = {"sshs_model_hash": data_hash(self.file)}
        write_tensors(self.file, tensors, dtype=DTYPES[self.own.dtype], metadata=notes | hashed)
        return self.file

    def measure(self, lora: TrainedLora, unseen: Pictures, subject: Subject) -> None:
        """Write the error on held-out pictures with the LoRA and without it."""
        chance = self.recipe.seed, max(1, self.own.train.batch), HELD_OUT_ROUNDS, self.device
        with self.model.precision():
            after = held_out_error(lora, unseen, subject, self.own.loss, *chance)
            with lora.aside():
                before = held_out_error(lora, unseen, subject, self.own.loss, *chance)
        count = len(unseen.source)
        write_json(
            self.folder / "lora" / "held-out.json",
            {"pictures": count, "rounds": HELD_OUT_ROUNDS, "without": before, "with": after},
        )
        self.note(f"held out: error {before:.4f} without the LoRA, {after:.4f} with it ({count} pictures)")


class LoraTask:
    """Noisy latents and captions against what the model's parameterization asks for, as the loop knows it."""

    stage = "lora"

    def __init__(
        self, run: LoraJob, lora: TrainedLora, examples: Examples, subject: Subject, prompts: list[str]
    ):
        self.run, self.lora, self.prompts = run, lora, prompts
        self.recipe = run.own.train
        loss_recipe, seed = run.own.loss, run.recipe.seed

        def loss(net: Any, batch: Any, step: int, part: int) -> Loss:
            return adapter_loss(net, batch, subject, loss_recipe, seeded("cpu", seed, "noise", step, part))

        # of some encoders the last layers are not read, and factors beside them are never asked for
        self.players = [Player("lora", lora, self.recipe, examples.part, loss, partial=True)]
        self.flops = picture_flops(lora, examples.part(1, 0), subject, loss_recipe)
        lora.zero_grad(set_to_none=True)

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """The prompts drawn with the averaged factors; the LoRA's file is brought up to date too."""
        run = self.run
        now = {name: value.clone() for name, value in self.lora.state_dict().items()}
        try:
            self.lora.load_state_dict(average)
            run.export(self.lora, step)
            size = (run.recipe.data.size,) * 2
            pixels = run.model.generate_pixels(self.prompts, range(len(self.prompts)), size=size)
        finally:
            self.lora.load_state_dict(now)
        images = [to_image(p[:, None]) for p in pixels]
        rows = [images[i : i + SHEET_WIDTH] for i in range(0, len(images), SHEET_WIDTH)]
        return save_sheet(rows, run.folder / "sheets" / f"lora-{step:07d}.png")
