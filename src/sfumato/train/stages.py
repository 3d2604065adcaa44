"""A recipe from its first line to a model folder: autoencoder, its statistics, cached latents, denoiser."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.metrics import psnr, spectral_error, ssim
from sfumato.data.folder import FolderSource
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Source, to_float
from sfumato.errors import DataError, InputError
from sfumato.families import family_named
from sfumato.generate import load
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import autocast, fast_dtype, pick_device
from sfumato.storage import load_tensors, save_tensors, tensors_hash, write_json
from sfumato.text import Tokenizer, learn_words
from sfumato.train.autoencoder import latent_statistics
from sfumato.train.denoiser import Examples
from sfumato.train.loop import Event, OnEvent, World, fit
from sfumato.train.recipe import Recipe, read_recipe
from sfumato.train.state import has_state, tensorboard
from sfumato.train.tasks import AutoencoderTask, DenoiserTask

HELD_OUT_SCENES = 256  # of the val split, to measure the autoencoder on
LATENT_STATISTICS_PICTURES = (
    2048  # pictures whose latents give the normalisation; held-out ones: that are measured
)
PATIENCE = 48  # hours that processes wait for the one that renders and encodes
DRAWS = 2  # to be raised whenever training takes other noise for the same recipe
VOLATILE = {"steps", "save_every", "sheet_every"}  # may change between two starts of one run


def run(
    recipe: str | Path | Recipe,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    device: str | None = None,
    on_event: OnEvent | None = None,
) -> Path:
    """Train what `recipe` describes, or go on from where it stopped; return the run's folder, which `load` opens, or
    the file of a LoRA.

    overrides: dotted keys of a recipe file, such as {"denoiser.train.steps": 100}.
    Under `torchrun` every process calls this; they share each batch, and rank 0 alone writes. Raises `InputError`
    for a bad recipe or a run folder of another recipe, `DataError` for unusable data.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise InputError("overrides change a recipe file; give a Recipe as it shall be", argument="overrides")
    if not isinstance(recipe, Recipe):
        from sfumato.train import control  # which needs this module

        if control.is_control(recipe):
            more = {"overrides": overrides, "device": device, "on_event": on_event}
            return control.run(recipe, data=data, out=out, **more)
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    read = with_data(read, data)
    folder = Path(out or read.out or Path("runs") / read.name)
    place, joined = _join_world(pick_device(device))
    listener = on_event or (lambda event: None)
    try:
        if read.lora:
            from sfumato.train.lora import LoraRun  # which needs this module

            return LoraRun(read, folder, place, listener).whole()
        return Run(read, folder, place, listener).whole()
    finally:
        if joined:
            dist.destroy_process_group()


def with_data(recipe: Recipe, data: str | Path | None) -> Recipe:
    """The recipe with its pictures from the folder `data`, whatever they are by its own words; as it is without one."""
    if data is None:
        return recipe
    return replace(recipe, data=replace(recipe.data, kind="folder", path=str(data)))


def source_of(
    recipe: Recipe, multiple: int, part: str = "all", cache: str | Path | None = None
) -> SceneSource | FolderSource:
    """The pictures of a recipe, their sides multiples of `multiple`.

    part: all, or what the autoencoder sees (train) or is measured on (held_out). cache: a folder for what is made of
    them once; None keeps nothing but the scenes of a recipe that names a cache itself. Raises `InputError` when the
    recipe names no pictures, `DataError` for unusable ones.
    """
    d = recipe.data
    if d.kind == "scenes":
        split = "val" if part == "held_out" else d.split
        count = HELD_OUT_SCENES if part == "held_out" else d.count
        kept = d.cache or (None if cache is None else Path(cache) / "scenes")
        return SceneSource(count, d.seed, split, d.size, cache=kept)
    if not d.path:
        raise InputError(
            "no pictures were named: give --data DIR, or data.path in the recipe", argument="data"
        )
    return FolderSource(
        d.path,
        d.size,
        multiple=multiple,
        seed=d.seed,
        flip=d.flip,
        part=part,
        held_out=d.held_out,
        cache=None if cache is None else Path(cache) / "pictures",
    )


def training_pictures(recipe: str | Path, data: str | Path | None, most: int) -> Tensor:
    """The first `most` pictures that a recipe trains on, of its commonest shape: (M, 3, H, W) in [-1, 1]."""
    read = with_data(read_recipe(recipe), data)
    source = source_of(read, multiple_of(read))
    members = max(source.buckets().values(), key=len)[:most]
    return to_float(source.pixels(members))[:, :, 0]


def multiple_of(recipe: Recipe) -> int:
    """What the sides of a recipe's pictures must be multiples of, by its autoencoder and its denoiser's family."""
    if recipe.autoencoder is None:
        raise InputError("the recipe has no [autoencoder]: give one with init = a model to take it from")
    if recipe.denoiser is None:
        return recipe.autoencoder.model.factor
    shape = recipe.autoencoder.model, recipe.denoiser.model
    return family_named(recipe.family).configure(*shape, (), recipe.preset).multiple


def _join_world(device: torch.device) -> tuple[torch.device, bool]:
    """Join torchrun's processes, if this is one of them: the device of this one, and whether it has joined here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device, False
    cuda = device.type == "cuda"
    if cuda:  # numbered: a thread that makes batches would take the first GPU for the current one
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=PATIENCE))
    return device, True


@dataclass
class Run:
    """One recipe in one folder, in this process. `whole` does all of it; the other methods are its parts."""

    recipe: Recipe
    folder: Path
    device: torch.device
    listener: OnEvent

    def __post_init__(self) -> None:
        self.world = World.current()
        self.family = family_named(self.recipe.family)
        self.peak = 0.0

    def tell(self, event: Event) -> None:
        if self.world.leads:
            self.listener(event)

    def note(self, stage: str, text: str) -> None:
        self.tell(Event("note", stage, text=text))

    def progress(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.tell(Event("prepare", stage, done, total))

    def whole(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.recipe.seed)
        multiple = multiple_of(self.recipe)
        if self.recipe.denoiser:  # what does not fit together shall be said before anything is made
            has_state(self.folder / "denoiser" / "state", self.identity("denoiser"))
            _ = self._initial
        source = self.source(multiple)
        self.note("data", f"{len(source):,} pictures in {len(source.buckets())} sizes")
        if problems := getattr(source, "problems", ()):
            first = problems[0]
            self.note("data", f"{len(problems):,} set aside, the first {first.path}: {first.reason}")
        self.peak = matmul_peak(self.device, fast_dtype(self.device), 0.6)
        autoencoder = self.autoencoder(multiple)
        if self.recipe.denoiser is None:
            return self.folder
        return self.denoiser(source, autoencoder)

    # --- data ----------------------------------------------------------------------------------------------

    def source(self, multiple: int, part: str = "all") -> Source:
        """The pictures to learn from, as `source_of` says; scenes are rendered. All processes call this together."""
        source = source_of(self.recipe, multiple, part, self.folder)
        if isinstance(source, SceneSource):
            if self.world.leads:
                source.prepare(on_progress=self.progress("rendering"))
            self.world.wait()
        return source

    # --- autoencoder -----------------------------------------------------------------------------------------

    def autoencoder(self, multiple: int) -> Autoencoder:
        """Train the autoencoder, or read the finished one; statistics included, and measured on held-out pictures."""
        recipe = self.recipe.autoencoder
        assert recipe is not None
        place = self.folder / "autoencoder"
        identity = self.identity("autoencoder")
        finished = place / f"final-{identity[:12]}-{recipe.train.steps}.safetensors"
        model = self._fresh_autoencoder()
        done = finished.exists()
        self.world.wait()  # all have looked before one writes it
        if done:
            self.note("autoencoder", f"finished, after {recipe.train.steps:,} steps")
        else:
            source, unseen = self.source(multiple, "train"), self._held_out(multiple)
            if recipe.train.steps and model.factor > 1:
                task = AutoencoderTask(self.recipe, self.folder, self.device, model, source)
                with tensorboard(self.recipe.log, self.world.leads, place) as log:
                    model.load_state_dict(fit(task, place, identity, self.device, self.tell, self.peak, log))
            if self.world.leads:
                self._finish(model.to(self.device).eval(), source, unseen, place, finished)
            self.world.wait()
        model.load_state_dict(load_tensors(finished))
        return model.to(self.device).eval()

    def _held_out(self, multiple: int) -> Source | None:
        """Pictures that the autoencoder does not see, if any were held out."""
        try:
            return self.source(multiple, "held_out")
        except DataError as error:
            self.note("autoencoder", f"not measured on held-out pictures: {error}")
            return None

    def _finish(
        self, model: Autoencoder, source: Source, unseen: Source | None, place: Path, finished: Path
    ) -> None:
        """Set the statistics of the latents, measure, and keep the result."""
        batches = self._picture_batches(source)
        with torch.no_grad(), autocast(self.device, fast_dtype(self.device)):
            model.set_statistics(*(value.to(self.device) for value in latent_statistics(model, batches)))
        if unseen is not None:
            self._measure(model, unseen, place / "held-out.json")
        save_tensors(finished, model.state_dict())

    @torch.no_grad()
    def _measure(self, model: Autoencoder, source: Source, path: Path) -> None:
        """Write PSNR (dB), SSIM and spectral error of held-out pictures."""
        sums: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "spectral_error": []}
        for pixels in self._picture_batches(source):
            with autocast(self.device, fast_dtype(self.device)):
                rebuilt = model.decode(model.encode(pixels).mode()).float().clamp(-1, 1)
            for name, measure in (("psnr", psnr), ("ssim", ssim), ("spectral_error", spectral_error)):
                sums[name].append(measure(rebuilt, pixels).double().cpu())
        means = {name: torch.cat(values).mean(0).tolist() for name, values in sums.items()}
        measured = sum(map(len, sums["psnr"]))
        write_json(path, {"pictures": measured, **means})
        self.note(
            "autoencoder",
            f"held out: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} ({measured} pictures)",
        )

    def _fresh_autoencoder(self) -> Autoencoder:
        recipe = self.recipe.autoencoder
        assert recipe is not None
        if not recipe.init:
            torch.manual_seed(self.recipe.seed)
            return Autoencoder(recipe.model)
        model = load(recipe.init, "cpu").system.autoencoder
        for name in ("factor", "latent_channels"):
            if getattr(model.config, name) != getattr(recipe.model, name):
                raise InputError(
                    f"autoencoder.{name} is {getattr(recipe.model, name)} in the recipe, but {recipe.init} has "
                    f"{getattr(model.config, name)}; make them equal, or drop autoencoder.init",
                    argument=f"autoencoder.{name}",
                )
        return model.requires_grad_(True)

    def _picture_batches(self, source: Source, batch: int = 16) -> Iterator[Tensor]:
        """The first pictures of every bucket, as pixels on the device."""
        buckets = source.buckets()
        for members in buckets.values():
            chosen = members[: max(1, LATENT_STATISTICS_PICTURES * len(members) // max(1, len(source)))]
            for start in range(0, len(chosen), batch):
                yield to_float(source.pixels(chosen[start : start + batch])).to(self.device)

    # --- denoiser --------------------------------------------------------------------------------------------

    def denoiser(self, source: Source, autoencoder: Autoencoder) -> Path:
        """Encode, train the denoiser, and write the model folder."""
        recipe = self.recipe.denoiser
        assert recipe is not None
        place, identity = self.folder / "denoiser", self.identity("denoiser")
        self._forget(place, identity)
        cache = self.latents(source, autoencoder)
        initial = self._initial
        words = initial.config.words if initial else self.words(source, recipe.vocabulary)
        config = self.family.configure(autoencoder.config, recipe.model, words, self.recipe.preset)
        self._check_captions(source, Tokenizer(words, recipe.model.max_tokens))
        torch.manual_seed(self.recipe.seed)
        system = replace(self.family.build(config), autoencoder=autoencoder)
        if initial is not None:
            system.denoiser.load_state_dict(initial.denoiser.state_dict())
        labels = self.labels(source, config) if recipe.loss.labels else None
        examples = Examples(source, cache, system.tokenizer, recipe, self.recipe.seed, self.device, labels)
        task = DenoiserTask(self.recipe, self.folder, self.device, system, examples)
        with tensorboard(self.recipe.log, self.world.leads, place) as log:
            state = fit(task, place, identity, self.device, self.tell, self.peak, log)
        if self.world.leads:
            task.export(state, recipe.train.steps)
        self.world.wait()
        self.tell(Event("done", "denoiser", recipe.train.steps, recipe.train.steps, text=str(self.folder)))
        return self.folder

    @functools.cached_property
    def _initial(self) -> Any | None:
        """The system whose denoiser this one starts from, if the recipe names one; its shape must be the recipe's."""
        recipe, first = self.recipe.denoiser, self.recipe.autoencoder
        assert recipe is not None and first is not None
        if not recipe.init:
            return None
        system = load(recipe.init, "cpu").system
        theirs, ours = asdict(system.config.denoiser), asdict(recipe.model)
        theirs["latent_channels"], ours["latent_channels"] = (
            system.config.autoencoder.channels,
            first.model.channels,
        )
        for name, value in theirs.items():
            if ours[name] != value:
                raise InputError(
                    f"denoiser.{name} is {ours[name]} in the recipe, but {recipe.init} has {value}; make them equal, "
                    "or drop denoiser.init",
                    argument=f"denoiser.{name}",
                )
        return system

    def _forget(self, place: Path, identity: str) -> None:
        """Drop words and labels that no checkpoint goes with: a run stopped that early may have had another recipe."""
        if self.world.leads and not has_state(place / "state", identity):
            for kept in (place / "words.json", *place.glob("labels-*.safetensors")):
                kept.unlink(missing_ok=True)
        self.world.wait()

    def latents(self, source: Source, autoencoder: Autoencoder) -> LatentCache:
        digest = tensors_hash(autoencoder.state_dict())
        place = self.folder / "latents" / digest[:16]

        def encode(pixels: Tensor) -> Tensor:
            with autocast(self.device, fast_dtype(self.device)):
                return autoencoder.encode_normalized(pixels.to(self.device)).float()

        if self.world.leads:
            build_latents(source, encode, digest, place, 32, self.progress("encoding"))
        self.world.wait()
        return LatentCache(place, source, digest)

    def words(self, source: Source, limit: int) -> tuple[str, ...]:
        """The vocabulary, learnt once and kept with the run."""
        kept = self.folder / "denoiser" / "words.json"
        if self.world.leads and not kept.exists():
            texts = (source.caption(i, epoch) for epoch in range(2) for i in range(min(len(source), 20_000)))
            write_json(kept, learn_words(texts, limit))
        self.world.wait()
        return tuple(json.loads(kept.read_text(encoding="utf-8")))

    def _check_captions(self, source: Source, tokenizer: Tokenizer) -> None:
        """Name the first caption that is too long, before hours are spent. Those of scenes never are."""
        if self.recipe.data.kind == "scenes":
            return
        for i in range(len(source)):
            try:
                tokenizer.encode(source.caption(i, 0))
            except InputError:
                raise InputError(
                    f"the caption of {source.name(i)} is longer than {tokenizer.max_tokens} tokens; shorten it, "
                    "or raise denoiser.max_tokens in the recipe",
                    argument="denoiser.max_tokens",
                ) from None

    def labels(self, source: Source, config: Any) -> Tensor:
        """What every cell of every picture shows, (N, A, H, W) uint8, worked out once and kept with the run."""
        kept = self.folder / "denoiser" / f"labels-{config.multiple}.safetensors"
        if self.world.leads and not kept.exists():
            parts = []
            for start in range(0, len(source), 256):
                indices = range(start, min(start + 256, len(source)))
                labels = source.labels(list(indices), config.multiple)
                if labels is None:
                    raise InputError("these pictures come without labels; set denoiser.loss.labels = 0")
                parts.append(labels.to(torch.uint8))
                self.tell(Event("prepare", "labels", indices.stop, len(source)))
            save_tensors(kept, {"labels": torch.cat(parts)})
        self.world.wait()
        return load_tensors(kept)["labels"]

    # --- shared ------------------------------------------------------------------------------------------------

    def identity(self, stage: str) -> str:
        """A hash of what in the recipe decides the weights of a stage at a given step, but for `VOLATILE`.

        `steps` is left out so that a finished run can be given more, though the rate's fall at the end depends on it:
        a run given more steps is another than one that had them from the start.
        """
        parts: dict[str, Any] = {"data": asdict(self.recipe.data) | {"cache": ""}, "seed": self.recipe.seed}
        if stage == "denoiser":
            parts["draws"] = DRAWS
        for name in ("autoencoder", "denoiser")[: 1 + (stage == "denoiser")]:
            part = asdict(getattr(self.recipe, name))
            volatile = VOLATILE if name == stage else VOLATILE - {"steps"}
            part["train"] = {key: value for key, value in part["train"].items() if key not in volatile}
            parts[name] = part
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
