"""The two things that are trained for clips, as the loop knows them: layers between frames, and a denoiser."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.autoencoder.causal import Causal
from sfumato.data.latents import LatentCache
from sfumato.diffusion.loss import flow_density, spread
from sfumato.flops import count_flops
from sfumato.generate import Model, to_image
from sfumato.runtime import autocast, fast_dtype
from sfumato.sampling.noise import mixed
from sfumato.storage import atomic_directory
from sfumato.train.loop import Loss, Player, seeded
from sfumato.train.tasks import save_sheet
from sfumato.train.video_data import ClipBatch, Clips, Frames, changed
from sfumato.train.video_recipe import VideoRecipe
from sfumato.types import Request

if TYPE_CHECKING:
    from sfumato.train.video import VideoJob

SHEET = 4  # clips of a sheet


class CodecTask:
    """The layers between frames as the loop knows them: what comes back of a window against what went in."""

    stage = "temporal"

    def __init__(self, job: VideoJob, model: Causal, frames: LatentCache):
        self.job, self.model = job, model
        self.recipe, self.weight = job.own.codec, job.own.loss.residual
        self.examples = Frames(frames, job.own, job.recipe.seed, job.device)
        self.players = [Player("temporal", model, self.recipe, self.examples.part, self.loss)]
        one = self.examples.part(1, 0)[:1]
        self.flops = float(count_flops(lambda: self.loss(model, one, 1, 0)[0].backward()))
        model.zero_grad(set_to_none=True)

    def loss(self, net: nn.Module, frames: Tensor, step: int, part: int) -> Loss:
        """Mean squared error of the frames' latents, and the square of what is added to every fourth one."""
        back, latent = net(frames)
        error = (back.float() - frames)[:, :, 1:].square().mean()
        added = (latent.float() - frames[:, :, ::4]).square().mean()
        loss = error + self.weight * added
        return loss, {"loss": loss, "error": error, "added": added}

    @torch.no_grad()
    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Frames of a window above what comes back of them, by the averaged weights."""
        twin = Causal(self.model.config).to(self.job.device).eval()
        twin.load_state_dict(average)
        frames = self.examples.part(1, 0)[:1]
        rows = []
        for latent in (frames, twin(frames)[0]):
            with autocast(self.job.device, fast_dtype(self.job.device)):
                pixels = self.job.base.autoencoder.decode_normalized(latent).float().clamp(-1, 1)
            rows.append([to_image(frame[:, None]) for frame in pixels[0].unbind(1)])
        return save_sheet(rows, self.job.folder / "sheets" / f"temporal-{step:07d}.png")


class FilmNetwork(nn.Module):
    """The denoiser of clips and the frozen text encoder, as one network: (x, time, ids, mask) → prediction.

    seen: tokens, as of `DiT`.
    """

    def __init__(self, animator: nn.Module, text: nn.Module):
        super().__init__()
        self.animator, self.text = animator, text.requires_grad_(False)

    def forward(
        self, x: Tensor, time: Tensor, ids: Tensor, mask: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        return self.animator.dit(x, time, self.animator.read(self.text, ids, mask), seen=seen)


class VideoTask:
    """Noisy latents of clips, windows and pictures against the flow."""

    stage = "video"

    def __init__(self, job: VideoJob, system: Any, clips: Clips):
        self.job, self.system, self.clips = job, system, clips
        self.recipe, self.seed, self.own = job.own.train, job.recipe.seed, job.own
        system.video.animator.to(job.device).requires_grad_(True)
        network = FilmNetwork(system.video.animator, system.denoiser.text.to(job.device))
        self.players = [Player("video", network, self.recipe, clips.part, self.loss, apart=True)]
        middle = clips.part(1, self.recipe.parts // 2).first()
        self.flops = float(count_flops(lambda: self.loss(network, middle, 1, 0)[0].backward()))
        network.zero_grad(set_to_none=True)
        known = list(self.own.samples)
        self.prompts = known or [clips.source.caption(i, 0) for i in range(min(SHEET, len(clips.source)))]

    def loss(self, net: nn.Module, batch: ClipBatch, step: int, part: int) -> Loss:
        """Squared error of the flow over frames that are not known."""
        generator = seeded("cpu", self.seed, "noise", step, part)
        loss = film_loss(net, batch, self.own, generator)
        return loss, {"loss": loss}

    def sheet(self, average: dict[str, Tensor], step: int) -> str:
        """Prompts drawn by the averaged weights, a row of frames each; the model folder is brought up to date too."""
        model = Model(self.export(average, step), self.job.device)
        rows = []
        for prompt in self.prompts[:SHEET]:
            drawn = model.generate(Request(prompt, frames=self.own.frames, steps=12)).clips[0]
            rows.append(list(drawn.frames[::2]))
        return save_sheet(rows, self.job.folder / "sheets" / f"video-{step:07d}.png")

    def export(self, average: dict[str, Tensor], step: int) -> Any:
        """Write the averaged weights as a model folder, and return them as a system."""
        fresh = self.job.family.fresh_video(self.job.base, self.system.config.video)
        own = {k.removeprefix("animator."): v for k, v in average.items() if k.startswith("animator.")}
        fresh.video.animator.load_state_dict(own)
        animator = fresh.video.animator.to(self.job.device).eval().requires_grad_(False)
        system = replace(
            fresh, video=replace(fresh.video, temporal=self.system.video.temporal, animator=animator)
        )
        with atomic_directory(self.job.folder / "model") as staging:
            extra = {"trained": {"recipe": self.job.recipe.name, "steps": step}}
            self.job.family.save_folder(system, staging, extra)
        return system


def film_loss(net: nn.Module, batch: ClipBatch, recipe: VideoRecipe, generator: torch.Generator) -> Tensor:
    """Mean squared error of the flow noise − x0 over what is seen of the frames that are not known; chance is of
    `generator` alone."""
    x0, loss = batch.latents, recipe.loss
    B, _, T, *_ = x0.shape
    noise = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0.device)
    if T > 1:
        common = torch.randn(x0[:, :, :1].shape, generator=generator, device=generator.device)
        noise = mixed(noise, common.to(x0.device), recipe.shared)
    u = spread(torch.rand(B, generator=generator, device=generator.device))
    u = u[torch.randperm(B, generator=generator, device=generator.device)].to(x0.device)
    sigma = flow_density(mean=loss.mean, std=loss.std)(u)  # (B,)
    if T == 1:
        x = (1 - sigma.view(-1, 1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1, 1) * noise
        prediction = net(x, sigma.float(), batch.ids, batch.mask)
        return (prediction.float() - (noise - x0)).square().mean()
    unknown = torch.arange(T, device=x0.device) >= batch.known[:, None]  # (B, T)
    times = sigma[:, None] * unknown
    level = times[:, None, :, None, None]
    prediction = net((1 - level) * x0 + level * noise, times.float(), batch.ids, batch.mask, batch.seen)
    errors = (prediction.float() - (noise - x0)).square().mean(1)  # (B, T, H, W)
    weight = (1 + loss.moving * changed(x0)) * unknown[:, :, None, None]
    if batch.shown is not None:
        weight = weight * batch.shown
    return (errors * weight).sum() / weight.sum()
