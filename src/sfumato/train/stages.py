"""A recipe from its first line to a model folder: autoencoder, its statistics, cached latents, denoiser."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.discriminator import Discriminator
from sfumato.autoencoder.metrics import psnr, spectral_error, ssim
from sfumato.data.buckets import Order, raw_bits
from sfumato.data.folder import FolderSource
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Source, to_float
from sfumato.errors import DataError, InputError
from sfumato.families import family_named
from sfumato.generate import Model, load, to_image
from sfumato.receipts.flops import count_flops
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import autocast, fast_dtype, pick_device
from sfumato.storage import (
    atomic_directory,
    atomic_file,
    load_tensors,
    save_tensors,
    tensors_hash,
    write_json,
)
from sfumato.text import Tokenizer, learn_words
from sfumato.train.autoencoder import autoencoder_loss, discriminator_loss, latent_statistics
from sfumato.train.denoiser import Batch, Examples, denoiser_loss, denoiser_player
from sfumato.train.loop import Event, Loss, OnEvent, Player, World, fit, seeded
from sfumato.train.recipe import Recipe, TrainRecipe, read_recipe

HELD_OUT_SCENES = 256  # of the val split, to measure the autoencoder on
LATENT_STATISTICS_PICTURES = 2048  # pictures whose latents give the normalisation
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
    """Train what `recipe` describes, or go on from where it stopped; return the model folder.

    Under `torchrun` every process calls this; they share each batch, and rank 0 alone writes. Raises `InputError`
    for a bad recipe or a run folder of another recipe, `DataError` for unusable data.
    """
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, overrides)
    if data is not None:
        read = replace(read, data=replace(read.data, kind="folder", path=str(data)))
    folder = Path(out or read.out or Path("runs") / read.name)
    joined = _join_world(device)
    try:
        return _Run(read, folder, pick_device(device), on_event or (lambda event: None)).whole()
    finally:
        if joined:
            dist.destroy_process_group()


def _join_world(device: str | None) -> bool:
    """Join torchrun's processes, if this is one of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    dist.init_process_group("nccl" if pick_device(device).type == "cuda" else "gloo")
    if pick_device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return True


@dataclass
class _Run:
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
        if self.recipe.autoencoder is None:
            raise InputError("the recipe has no [autoencoder]: give one with init = a model to take it from")
        multiple = self.recipe.autoencoder.model.factor
        multiple *= self.recipe.denoiser.model.patch if self.recipe.denoiser else 1
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
        """The pictures to learn from. part: all, or what the autoencoder sees (train) or is measured on (held_out)."""
        d = self.recipe.data
        if d.kind == "scenes":
            split = "val" if part == "held_out" else d.split
            count = HELD_OUT_SCENES if part == "held_out" else d.count
            source = SceneSource(count, d.seed, split, d.size, cache=d.cache or self.folder / "scenes")
            if self.world.leads:
                source.prepare(on_progress=self.progress("rendering"))
            self.world.wait()
            return source
        if not d.path:
            raise InputError(
                "no pictures were named: give --data DIR, or data.path in the recipe", argument="data"
            )
        return FolderSource(
            d.path, d.size, multiple=multiple, seed=d.seed, flip=d.flip, part=part, held_out=d.held_out
        )

    # --- autoencoder -----------------------------------------------------------------------------------------

    def autoencoder(self, multiple: int) -> Autoencoder:
        """Train the autoencoder, or read the finished one; statistics included, and measured on held-out pictures."""
        recipe = self.recipe.autoencoder
        assert recipe is not None
        place = self.folder / "autoencoder"
        identity = self.identity("autoencoder")
        finished = place / f"final-{identity[:12]}-{recipe.train.steps}.safetensors"
        model = self._fresh_autoencoder()
        if finished.exists():
            model.load_state_dict(load_tensors(finished))
            return model.to(self.device).eval()
        source = self.source(multiple, "train")
        if recipe.train.steps and model.factor > 1:
            task = _AutoencoderTask(self, model, source)
            model.load_state_dict(
                fit(task, place, identity, self.device, self.tell, self.peak, self._logger(place))
            )
        model.to(self.device).eval()
        batches = self._picture_batches(source)
        with torch.no_grad(), autocast(self.device, fast_dtype(self.device)):
            model.set_statistics(*(value.to(self.device) for value in latent_statistics(model, batches)))
        if self.world.leads:
            self._measure(model, multiple, place / "held-out.json")
            save_tensors(finished, model.state_dict())
        self.world.wait()
        return model

    @torch.no_grad()
    def _measure(self, model: Autoencoder, multiple: int, path: Path) -> None:
        """Write PSNR (dB), SSIM and spectral error of held-out pictures, if any were held out."""
        try:
            source = self.source(multiple, "held_out")
        except DataError as error:
            self.note("autoencoder", f"not measured on held-out pictures: {error}")
            return
        sums: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "spectral_error": []}
        for pixels in self._picture_batches(source):
            with autocast(self.device, fast_dtype(self.device)):
                rebuilt = model.decode(model.encode(pixels).mode()).float().clamp(-1, 1)
            for name, measure in (("psnr", psnr), ("ssim", ssim), ("spectral_error", spectral_error)):
                sums[name].append(measure(rebuilt, pixels).double().cpu())
        means = {name: torch.cat(values).mean(0).tolist() for name, values in sums.items()}
        write_json(path, {"pictures": len(source), **means})
        self.note(
            "autoencoder",
            f"held out: PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} ({len(source)} pictures)",
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

    def _picture_batches(self, source: Source, batch: int = 16) -> Any:
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
        place = self.folder / "denoiser"
        cache = self._latents(source, autoencoder)
        words = self._words(source, recipe.vocabulary)
        config = self.family.configure(autoencoder.config, recipe.model, words, self.recipe.preset)
        self._check_captions(source, Tokenizer(words, recipe.model.max_tokens))
        torch.manual_seed(self.recipe.seed)
        system = replace(self.family.build(config), autoencoder=autoencoder)
        labels = self._labels(source, config) if recipe.loss.labels else None
        task = _DenoiserTask(
            self,
            system,
            Examples(source, cache, system.tokenizer, recipe, self.recipe.seed, self.device, labels),
        )
        state = fit(
            task, place, self.identity("denoiser"), self.device, self.tell, self.peak, self._logger(place)
        )
        if self.world.leads:
            task.export(state, recipe.train.steps)
        self.world.wait()
        self.tell(Event("done", "denoiser", recipe.train.steps, recipe.train.steps, text=str(self.folder)))
        return self.folder

    def _latents(self, source: Source, autoencoder: Autoencoder) -> LatentCache:
        digest = tensors_hash(autoencoder.state_dict())
        place = self.folder / "latents" / digest[:16]

        def encode(pixels: Tensor) -> Tensor:
            with autocast(self.device, fast_dtype(self.device)):
                return autoencoder.encode_normalized(pixels.to(self.device)).float()

        if self.world.leads:
            build_latents(source, encode, digest, place, 32, self.progress("encoding"))
        self.world.wait()
        return LatentCache(place, source, digest)

    def _words(self, source: Source, limit: int) -> tuple[str, ...]:
        """The vocabulary, learnt once and kept with the run."""
        kept = self.folder / "denoiser" / "words.json"
        if self.world.leads and not kept.exists():
            texts = (source.caption(i, epoch) for epoch in range(2) for i in range(min(len(source), 20_000)))
            with atomic_file(kept) as temporary:
                temporary.write_text(
                    json.dumps(learn_words(texts, limit), ensure_ascii=False), encoding="utf-8"
                )
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

    def _labels(self, source: Source, config: Any) -> Tensor:
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
        """A hash of everything in the recipe that decides the weights of a stage at a given step."""
        parts: dict[str, Any] = {"data": asdict(self.recipe.data) | {"cache": ""}, "seed": self.recipe.seed}
        for name in ("autoencoder", "denoiser")[: 1 + (stage == "denoiser")]:
            part = asdict(getattr(self.recipe, name))
            volatile = VOLATILE if name == stage else VOLATILE - {"steps"}
            part["train"] = {key: value for key, value in part["train"].items() if key not in volatile}
            parts[name] = part
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _logger(self, place: Path) -> Callable[[int, dict[str, float]], None] | None:
        if self.recipe.log != "tensorboard" or not self.world.leads:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "log = tensorboard needs the package tensorboard: pip install 'sfumato[logs]'"
            ) from None
        writer = SummaryWriter(place / "tensorboard")

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return write


class _AutoencoderTask:
    """Pictures, or random crops of them, against their reconstructions."""

    stage = "autoencoder"

    def __init__(self, run: _Run, model: Autoencoder, source: Source):
        recipe = run.recipe.autoencoder
        assert recipe is not None
        self.run, self.model, self.source = run, model, source
        self.recipe: TrainRecipe = recipe.train
        self.order = Order(source.buckets(), recipe.train.batch, run.recipe.seed)
        self.parts = recipe.train.batch // (recipe.train.microbatch or recipe.train.batch)
        seed, losses = run.recipe.seed, recipe.loss
        discriminator = Discriminator() if losses.adversarial else None

        def loss(net: Any, pixels: Tensor, step: int, part: int) -> Loss:
            generator = seeded("cpu", seed, "autoencoder", step, part)
            return autoencoder_loss(net, pixels, losses, generator, step, discriminator)

        self.players = [Player("autoencoder", model, self.recipe, self.pixels, loss)]
        if discriminator is not None:

            def judge(net: Any, pixels: Tensor, step: int, part: int) -> Loss:
                generator = seeded("cpu", seed, "discriminator", step, part)
                return discriminator_loss(model, net, pixels, losses, generator, step)

            self.players.append(Player("discriminator", discriminator, self.recipe, self.pixels, judge))
        sample = self.pixels(1, 0)[:1]
        self.flops = float(
            count_flops(lambda: autoencoder_loss(model, sample, losses, seeded("cpu", 0), 1)[0].backward())
        )
        model.zero_grad(set_to_none=True)

    def pixels(self, step: int, part: int) -> Tensor:
        """(B, 3, T, H, W) of one microbatch, cropped at places that depend on (seed, step, part) alone."""
        batch = self.order.batch_at(step - 1, part, self.parts)
        pixels = to_float(self.source.pixels(batch.indices.tolist()))
        crop = self.recipe.crop
        if crop and crop < min(pixels.shape[-2:]):
            spare = [side - crop + 1 for side in pixels.shape[-2:]]
            places = raw_bits(2 * len(pixels), self.run.recipe.seed, "crop", step, part).reshape(-1, 2)
            pixels = torch.stack(
                [
                    p[..., y : y + crop, x : x + crop]
                    for p, (y, x) in zip(
                        pixels, [(int(a % spare[0]), int(b % spare[1])) for a, b in places], strict=True
                    )
                ]
            )
        return pixels.to(self.run.device)

    @torch.no_grad()
    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Pictures above their reconstructions by the averaged weights."""
        twin = Autoencoder(self.model.config).to(self.run.device).eval()
        twin.load_state_dict(average)
        members = next(iter(self.source.buckets().values()))[:8]
        pixels = to_float(self.source.pixels(members)).to(self.run.device)
        with autocast(self.run.device, fast_dtype(self.run.device)):
            rebuilt = twin.decode(twin.encode(pixels).mode()).float().clamp(-1, 1)
        rows = [[to_image(p) for p in pixels], [to_image(p) for p in rebuilt]]
        return save_sheet(rows, self.run.folder / "sheets" / f"autoencoder-{step:07d}.png")


class _DenoiserTask:
    """Noisy latents and captions against velocities."""

    stage = "denoiser"

    def __init__(self, run: _Run, system: Any, examples: Examples):
        recipe = run.recipe.denoiser
        assert recipe is not None
        self.run, self.system, self.recipe = run, system, recipe.train
        self.players = [
            denoiser_player(system.denoiser, examples, system.parameterization, recipe, run.recipe.seed)
        ]
        parts = recipe.train.batch // (recipe.train.microbatch or recipe.train.batch)
        whole = examples.part(1, parts // 2)  # prompts of middle length
        labels = None if whole.labels is None else whole.labels[:1]
        one = Batch(whole.latents[:1], whole.ids[:1], whole.mask[:1], labels)
        self.flops = float(
            count_flops(
                lambda: denoiser_loss(
                    system.denoiser, one, system.parameterization, recipe.loss, seeded("cpu", 0)
                )[0].backward()
            )
        )
        system.denoiser.zero_grad(set_to_none=True)
        source = examples.source
        self.prompts = [source.caption(i, 0) for i in range(0, len(source), max(1, len(source) // 16))][:16]

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Sixteen captions of the data drawn by the averaged weights; the model folder is brought up to date too."""
        model = Model(self.export(average, step), self.run.device)
        short = [p if len(p) < 2000 else "" for p in self.prompts]
        pixels = model.generate_pixels(short, list(range(len(short))))
        images = [to_image(p[:, None]) for p in pixels]
        rows = [images[i : i + 8] for i in range(0, len(images), 8)]
        return save_sheet(rows, self.run.folder / "sheets" / f"denoiser-{step:07d}.png")

    def export(self, average: dict[str, Tensor], step: int) -> Any:
        """Write the averaged weights as a model folder, and return them as a system."""
        system = replace(self.run.family.build(self.system.config), autoencoder=self.system.autoencoder)
        system.denoiser.load_state_dict(average)
        system.denoiser.to(self.run.device).eval()
        with atomic_directory(self.run.folder / "model") as staging:
            trained = {"recipe": self.run.recipe.name, "steps": step}
            self.run.family.save_folder(system, staging, {"trained": trained})
        return system


def save_sheet(rows: list[list[Image.Image]], path: Path) -> str:
    """Pictures in rows on one canvas, written atomically."""
    width = max(sum(image.width for image in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(max(image.height for image in row) for row in rows)), "white")
    y = 0
    for row in rows:
        x = 0
        for image in row:
            sheet.paste(image, (x, y))
            x += image.width
        y += max(image.height for image in row)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
    return str(path)
