"""A recipe with [video], from its first line to a model folder: a model of pictures learns to draw clips.

The base stays as it is. Its frames' latents are made once; layers between frames learn to keep every fourth of them
(`autoencoder/causal.py`), and a second denoiser, which begins as the one of pictures, learns clips and pictures
together on what these give. What is known of a clip's beginning is shown to it without noise.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.autoencoder.causal import Causal, latents_of
from sfumato.autoencoder.metrics import psnr
from sfumato.data.clips import ClipFolder
from sfumato.data.latents import LatentCache, Shard, build_latents, write_shard
from sfumato.data.scenes import SceneSource
from sfumato.data.source import Source, to_float
from sfumato.data.turned import MirroredFrames, TurnedClips
from sfumato.errors import InputError
from sfumato.families import family_named
from sfumato.generate import load
from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import autocast, fast_dtype
from sfumato.storage import load_tensors, save_tensors, tensors_hash, write_json
from sfumato.text import learn_words
from sfumato.train.job import VOLATILE, Job, fingerprint
from sfumato.train.loop import Event, fit
from sfumato.train.state import tensorboard
from sfumato.train.video_data import Clips, ClipSource
from sfumato.train.video_recipe import VideoRecipe
from sfumato.train.video_tasks import CodecTask, VideoTask

HELD_OUT = 32  # clips of the val split that the layers between frames are measured on
RENDERED, SHARD = 8, 256  # clips rendered and encoded at a time, and what a kill can cost
JOINED = 64  # clips of which latents are joined at a time
WORDS_FROM = 4_000  # captions that words are learnt from
LATER = (
    "init",
    "plain",
    "turned",
    "rows",
)  # what recipes say since runs have names; the default is what they were without it


@dataclass
class VideoJob(Job):
    """A recipe with [video]. `whole` does all of it; the other methods are its parts."""

    stage = "video"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.recipe.video is not None
        self.own: VideoRecipe = self.recipe.video

    def whole(self) -> Path:
        """The run's folder, in which the model is."""
        torch.manual_seed(self.recipe.seed)
        source = self.clips(self.recipe.data.split, self.recipe.data.count, self.own.turned)
        self.note(f"{len(source):,} clips of {self.own.frames} frames")
        system = self.begun(source)
        self.folder.mkdir(parents=True, exist_ok=True)
        frames = self.frames(source)
        peak = matmul_peak(self.device, fast_dtype(self.device), 0.6)
        temporal = self.codec(system.video.temporal, frames, peak)
        system = replace(system, video=replace(system.video, temporal=temporal))
        latents = self.latents(temporal, frames, source)
        place = self.folder / "video"
        patch = self.base.config.denoiser.patch
        clips = Clips(source, latents, system.clip_tokenizer, self.own, self.recipe.seed, self.device, patch)
        task = VideoTask(self, system, clips)
        with tensorboard(self.recipe.log, self.world.leads, place) as log:
            state = fit(task, place, self.identity("video"), self.device, self.tell, peak, log)
        if self.world.leads:
            task.export(state, self.own.train.steps)
        self.world.wait()
        steps = self.own.train.steps
        self.tell(Event("done", "video", steps, steps, text=str(self.folder)))
        return self.folder

    @functools.cached_property
    def base(self) -> Any:
        """The model that learns, as it is opened, without parts for clips."""
        system = load(self.own.base, str(self.device)).system
        if not hasattr(self.family, "fresh_video") or not hasattr(system, "video"):
            raise InputError(
                f"{self.own.base!r} cannot learn clips; give a model of our own", argument="video.base"
            )
        if system.config.denoiser.prediction != "flow":
            raise InputError("a model that learns clips must predict the flow", argument="video.base")
        return system

    @functools.cached_property
    def first(self) -> Any:
        """The model that the recipe's `init` names, as it is opened."""
        return load(self.own.init, str(self.device)).system

    def begun(self, source: ClipSource) -> Any:
        """The system that learns, at its start: of the recipe's `init`, or the base with fresh parts."""
        if not self.own.init:
            return self.family.fresh_video(self.base, self.config(source))
        given = self.first
        if getattr(given, "video", None) is None or given.hashes() != self.base.hashes():
            raise InputError(
                f"{self.own.init!r} is no model of clips of {self.own.base!r}; give one of the same base, or none",
                argument="video.init",
            )
        return self.family.continued_video(given, replace(given.config.video, **self.drawn))

    @property
    def context(self) -> int:
        """Latents that are known where a film goes on, as many as training showed at most."""
        return max(1, min(len(self.own.loss.known) - 1, latents_of(self.own.frames) - 1))

    @property
    def drawn(self) -> dict[str, Any]:
        """How the model draws clips, as it was shown them: fields of its card."""
        return {
            "frames": self.own.frames,
            "fps": self.own.fps,
            "window": latents_of(self.own.frames),
            "context": self.context,
            "shared": self.own.shared,
            "first_alone": self.own.first_alone,
        }

    @property
    def family(self) -> Any:
        return family_named(self.recipe.family)

    def clips(self, split: str, count: int, turned: bool = False) -> ClipSource:
        """The clips of the recipe: scenes of a split, which are rendered as they are asked for, perhaps with all that
        they are when turned, or a folder's."""
        d, own = self.recipe.data, self.own
        if d.kind == "scenes":
            options = {"objects": list(d.objects)}
            if own.fps != 8.0:
                options["fps"] = own.fps
            device = self.device.type
            if own.plain:
                options["plain"] = own.plain
            scenes = SceneSource(count, d.seed, split, d.size, own.frames, device=device, options=options)
            return TurnedClips(MirroredFrames(scenes)) if turned else scenes
        if not d.path:
            raise InputError(
                "no clips were named: give --data DIR, or data.path in the recipe", argument="data"
            )
        return ClipFolder(d.path, d.size, own.frames, multiple=self.base.config.multiple)

    def config(self, source: ClipSource) -> Any:
        """What the parts for clips are, with the words that captions have besides the model's."""
        texts = (source.caption(i, 0) for i in range(min(len(source), WORDS_FROM)))
        known = set(self.base.config.words)
        words = [word for word in learn_words(texts, len(known) + self.own.vocabulary) if word not in known]
        temporal = replace(self.own.temporal, channels=self.base.config.autoencoder.channels)
        return self.family.VideoConfig(temporal, tuple(words[: self.own.vocabulary]), **self.drawn)

    # --- latents of frames -----------------------------------------------------------------------------------

    def frames(self, source: ClipSource) -> LatentCache:
        """Every frame's latent, made once: (C, frames, H, W) of each clip, those that run backwards aside."""
        rendered: Source = source.base if isinstance(source, TurnedClips) else source
        digest = tensors_hash(self.base.autoencoder.state_dict())
        place = self.folder / "frames" / digest[:16]
        if self.world.leads:
            build_latents(
                rendered,
                self.encode,
                digest,
                place,
                RENDERED,
                self.progress("rendering"),
                shard_rows=SHARD,
                write=functools.partial(self._side_by_side, rendered) if self.device.type == "cpu" else None,
            )
        self.world.wait()
        return LatentCache(place, rendered, digest)

    def _side_by_side(
        self, source: Source, shards: Sequence[Shard], batch: int, told: Callable[[int], None]
    ) -> Iterator[None]:
        """Render and encode as many shards at a time as there are threads: a renderer's steps are short."""
        gate = threading.Lock()

        def hear(rows: int) -> None:
            with gate:
                told(rows)

        with ThreadPoolExecutor(torch.get_num_threads(), "clips") as pool:
            futures = [pool.submit(write_shard, source, self.encode, shard, batch, hear) for shard in shards]
            try:
                for future in futures:
                    future.result()
                    yield
            finally:
                for future in futures:
                    future.cancel()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) → normalised latents of each frame."""
        with autocast(self.device, fast_dtype(self.device)):
            return self.base.autoencoder.encode_normalized(pixels.to(self.device)).float()

    # --- layers between frames -------------------------------------------------------------------------------

    def codec(self, model: Causal, frames: LatentCache, peak: float) -> Causal:
        """Train the layers between frames, or read the finished ones; measured on clips not seen."""
        if self.own.init:
            self.note(f"as they are in {self.own.init}", "temporal")
            return model.to(self.device).eval().requires_grad_(False)
        place, identity, train = self.folder / "temporal", self.identity("temporal"), self.own.codec
        finished = place / f"final-{identity[:12]}-{train.steps}.safetensors"
        done = finished.exists()
        self.world.wait()
        if done:
            self.note(f"finished, after {train.steps:,} steps", "temporal")
        else:
            if train.steps:
                task = CodecTask(self, model, frames)
                with tensorboard(self.recipe.log, self.world.leads, place) as log:
                    model.load_state_dict(fit(task, place, identity, self.device, self.tell, peak, log))
            if self.world.leads:
                save_tensors(finished, {k: v.bfloat16() for k, v in model.state_dict().items()})
            self.world.wait()
        model.load_state_dict({name: value.float() for name, value in load_tensors(finished).items()})
        model.to(self.device).eval().requires_grad_(False)
        if not done and self.world.leads and self.recipe.data.kind == "scenes":
            self.measure(model, place / "held-out.json")
        return model

    @torch.no_grad()
    def measure(self, model: Causal, path: Path) -> None:
        """Write PSNR (dB) of clips not seen: by the autoencoder of pictures alone, with these layers between, and with
        the straight way from one fourth frame to the next in their place.
        """
        source = self.clips("val", HELD_OUT)
        straight = Causal(model.config).to(self.device).eval()
        found: dict[str, list[Tensor]] = {"pictures": [], "clips": [], "straight": []}
        for start in range(0, HELD_OUT, RENDERED):
            pixels = to_float(source.pixels(list(range(start, start + RENDERED)))).to(self.device)
            latent = self.encode(pixels)
            for name, through in (
                ("pictures", latent),
                ("clips", model(latent)[0]),
                ("straight", straight(latent)[0]),
            ):
                with autocast(self.device, fast_dtype(self.device)):
                    back = self.base.autoencoder.decode_normalized(through).float().clamp(-1, 1)
                found[name].append(psnr(back, pixels).double().cpu())
        means = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        write_json(path, {"clips_measured": HELD_OUT, **means})
        self.note(
            f"held out: PSNR {means['clips']:.2f} dB, frame by frame {means['pictures']:.2f}, straight "
            f"{means['straight']:.2f}",
            "temporal",
        )

    @torch.no_grad()
    def latents(self, temporal: Causal, frames: LatentCache, source: ClipSource) -> Tensor:
        """(M, C, 1 + k, H, W) float16 of all clips, joined by the layers between frames."""
        rows = source.rows if isinstance(source, TurnedClips) else [(k, False) for k in range(len(frames))]
        parts = []
        told = self.progress("joining")
        for start in range(0, len(rows), JOINED):
            some = rows[start : start + JOINED]
            held = frames.batch([index for index, _ in some])
            back = torch.tensor([back for _, back in some])
            held = torch.where(back[:, None, None, None, None], held.flip(2), held)
            with autocast(self.device, fast_dtype(self.device)):
                joined = temporal.encode(held.to(self.device))
            parts.append(joined.to("cpu", torch.float16))
            told(start + len(some), len(rows))
        return torch.cat(parts)

    def identity(self, stage: str) -> str:
        """A hash of what decides the weights of a stage at a given step."""
        own = asdict(self.own)
        volatile = {"samples"} | {name for name in LATER if own[name] == getattr(VideoRecipe, name)}
        if not own["loss"]["moving"]:
            del own["loss"]["moving"]
        if stage == "temporal":
            volatile |= {"train", "mix", "vocabulary", "shared", "rows"}
            own["loss"] = {"residual": own["loss"]["residual"]}
        own["train"] = {name: value for name, value in own["train"].items() if name not in VOLATILE}
        codec = VOLATILE if stage == "temporal" else VOLATILE - {"steps"}
        own["codec"] = {name: value for name, value in own["codec"].items() if name not in codec}
        kept = {name: value for name, value in own.items() if name not in volatile}
        data = asdict(self.recipe.data) | {"cache": ""}
        start = [self.first.clip_hashes()] if self.own.init else []
        return fingerprint([stage, data, self.recipe.seed, kept, self.base.hashes(), *start])
