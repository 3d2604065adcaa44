"""The two things that are trained, as the loop knows them: players, sample sheets, and the FLOPs of a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.autoencoder.discriminator import Discriminator
from sfumato.data.buckets import Order, raw_bits
from sfumato.data.source import Source, to_float
from sfumato.families import family_named
from sfumato.generate import Model, to_image
from sfumato.runtime import autocast, fast_dtype
from sfumato.storage import atomic_directory, atomic_file
from sfumato.train.autoencoder import autoencoder_loss, discriminator_loss, step_flops
from sfumato.train.denoiser import Examples, denoiser_player, picture_flops
from sfumato.train.loop import Loss, Player, seeded
from sfumato.train.recipe import Recipe

SHEET_WIDTH = 8  # pictures in a row
SHEET_PICTURES = 16
LONGEST_SHOWN = 2_000  # characters; a sheet leaves longer captions empty


class AutoencoderTask:
    """Pictures, or random crops of them, against their reconstructions."""

    stage = "autoencoder"

    def __init__(
        self, recipe: Recipe, folder: Path, device: torch.device, model: Autoencoder, source: Source
    ):
        own = recipe.autoencoder
        assert own is not None
        self.folder, self.device, self.source = folder, device, source
        self.model = model.to(device)
        self.recipe, self.seed = own.train, recipe.seed
        self.order = Order(source.buckets(), self.recipe.batch, self.seed)
        seed, losses = self.seed, own.loss
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
        height, width = self.pixels(1, 0).shape[-2:]
        parts = self.recipe.batch // self.recipe.parts
        self.flops = step_flops(model.config, losses, (parts, height, width))

    def pixels(self, step: int, part: int) -> Tensor:
        """(B, 3, T, H, W) of one microbatch, cropped at places that depend on (seed, step, part) alone."""
        batch = self.order.batch_at(step - 1, part, self.recipe.parts)
        pixels = to_float(self.source.pixels(batch.indices.tolist()))
        crop = self.recipe.crop
        if crop and crop < min(pixels.shape[-2:]):
            bits = raw_bits(2 * len(pixels), self.seed, "crop", step, part).reshape(-1, 2)
            tops, lefts = (
                (bits[:, axis] % (side - crop + 1)).tolist() for axis, side in enumerate(pixels.shape[-2:])
            )
            places = zip(pixels, tops, lefts, strict=True)
            pixels = torch.stack([p[..., y : y + crop, x : x + crop] for p, y, x in places])
        return pixels.to(self.device)

    @torch.no_grad()
    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Pictures above their reconstructions by the averaged weights."""
        twin = Autoencoder(self.model.config).to(self.device).eval()
        twin.load_state_dict(average)
        members = next(iter(self.source.buckets().values()))[:SHEET_WIDTH]
        pixels = to_float(self.source.pixels(members)).to(self.device)
        with autocast(self.device, fast_dtype(self.device)):
            rebuilt = twin.decode(twin.encode(pixels).mode()).float().clamp(-1, 1)
        rows = [[to_image(p) for p in pixels], [to_image(p) for p in rebuilt]]
        return save_sheet(rows, self.folder / "sheets" / f"autoencoder-{step:07d}.png")


class DenoiserTask:
    """Noisy latents and captions against what the parameterization asks for. `system` is one of the recipe's family."""

    stage = "denoiser"

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, system: Any, examples: Examples):
        own = recipe.denoiser
        assert own is not None
        self.folder, self.device, self.system = folder, device, system
        self.recipe, self.name = own.train, recipe.name
        self.family = family_named(recipe.family)
        system.denoiser.to(device)
        self.players = [denoiser_player(system.denoiser, examples, system.parameterization, own, recipe.seed)]
        middle = examples.part(1, self.recipe.parts // 2)  # prompts of middle length
        self.flops = picture_flops(system.denoiser, middle, system.parameterization, own.loss)
        source = examples.source
        spread = range(0, len(source), max(1, len(source) // SHEET_PICTURES))
        captions = [source.caption(i, 0) for i in spread[:SHEET_PICTURES]]
        self.prompts = [text if len(text) < LONGEST_SHOWN else "" for text in captions]

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Captions of the data drawn by the averaged weights; the model folder is brought up to date too."""
        model = Model(self.export(average, step), self.device)
        images = [to_image(p[:, None]) for p in model.generate_pixels(self.prompts, range(len(self.prompts)))]
        rows = [images[i : i + SHEET_WIDTH] for i in range(0, len(images), SHEET_WIDTH)]
        return save_sheet(rows, self.folder / "sheets" / f"denoiser-{step:07d}.png")

    def export(self, average: dict[str, Tensor], step: int) -> Any:
        """Write the averaged weights as a model folder, and return them as a system."""
        system = replace(self.family.build(self.system.config), autoencoder=self.system.autoencoder)
        system.denoiser.load_state_dict(average)
        system.denoiser.to(self.device).eval()
        with atomic_directory(self.folder / "model") as staging:
            self.family.save_folder(system, staging, {"trained": {"recipe": self.name, "steps": step}})
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
