"""A recipe from its first line to a model folder: autoencoder, its statistics, cached latents, denoiser."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.metrics import psnr, spectral_error, ssim
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.source import Source, to_float
from sfumato.errors import DataError, InputError
from sfumato.families import family_named
from sfumato.generate import load
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import autocast, fast_dtype
from sfumato.storage import load_tensors, save_tensors, tensors_hash, write_json
from sfumato.text import Tokenizer, learn_words
from sfumato.train.autoencoder import latent_statistics
from sfumato.train.denoiser import Examples
from sfumato.train.job import VOLATILE, Job, data_identity, fingerprint, multiple_of
from sfumato.train.loop import Event, fit
from sfumato.train.state import has_state, tensorboard
from sfumato.train.tasks import AutoencoderTask, DenoiserTask

LATENT_STATISTICS_PICTURES = (
    2048  # pictures whose latents give the normalisation; held-out ones: that are measured
)
DRAWS = 2  # to be raised whenever training takes other noise for the same recipe


@dataclass
class ModelJob(Job):
    """A recipe with [autoencoder], and perhaps [denoiser]. `whole` does all of it; the other methods are its parts."""

    stage = "data"
    peak = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.family = family_named(self.recipe.family)

    def whole(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.recipe.seed)
        multiple = multiple_of(self.recipe)
        if self.recipe.denoiser:  # what does not fit together shall be said before anything is made
            has_state(self.folder / "denoiser" / "state", self.identity("denoiser"))
            _ = self._initial
        source = self.source(multiple)
        self.describe(source)
        self.peak = matmul_peak(self.device, fast_dtype(self.device), 0.6)
        autoencoder = self.autoencoder(multiple)
        if self.recipe.denoiser is None:
            return self.folder
        return self.denoiser(source, autoencoder)

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
            self.note(f"finished, after {recipe.train.steps:,} steps", "autoencoder")
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
            self.note(f"not measured on held-out pictures: {error}", "autoencoder")
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
            f"held out: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} ({measured} pictures)",
            "autoencoder",
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
            write_json(kept, vocabulary(source, limit))
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

    def identity(self, stage: str) -> str:
        """A hash of what in the recipe decides the weights of a stage at a given step, but for `VOLATILE`.

        `steps` is left out so that a finished run can be given more, though the rate's fall at the end depends on it:
        a run given more steps is another than one that had them from the start.
        """
        parts: dict[str, Any] = {"data": data_identity(self.recipe.data), "seed": self.recipe.seed}
        if stage == "denoiser":
            parts["draws"] = DRAWS
        for name in ("autoencoder", "denoiser")[: 1 + (stage == "denoiser")]:
            part = asdict(getattr(self.recipe, name))
            volatile = VOLATILE if name == stage else VOLATILE - {"steps"}
            part["train"] = {key: value for key, value in part["train"].items() if key not in volatile}
            parts[name] = part
        return fingerprint(parts)


def vocabulary(source: Source, limit: int) -> tuple[str, ...]:
    """The most frequent words of a source's captions that get a token of their own."""
    texts = (source.caption(i, epoch) for epoch in range(2) for i in range(min(len(source), 20_000)))
    return tuple(learn_words(texts, limit))
