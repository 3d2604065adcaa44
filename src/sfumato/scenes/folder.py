"""Scenes as a captioned folder on disk, with their truth beside the pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from sfumato.errors import InputError
from sfumato.scenes.captions import describe
from sfumato.scenes.graph import Scene, relations, scene_hash, scene_to_dict
from sfumato.scenes.render import Render, render
from sfumato.scenes.sample import sample_scene
from sfumato.storage import atomic_directory

BATCH = 16
DEPTH_SCALE = (
    1000  # steps of a 16-bit depth picture per world unit; anything beyond 65.535 units is stored as that
)


def write_folder(
    out: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    size: int = 128,
    split: str = "train",
    style: str = "mixed",
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write scenes `seed` … `seed + count - 1` of a split; the folder appears whole or not at all.

    00000.png (RGB), 00000.txt (caption), mask/00000.png (0 floor, k object k - 1), depth/00000.png (16 bits,
    thousandths of a world unit along the view axis), graphs/00000.json (the scene with what is said of it).
    on_progress(done, total) may raise to stop, which leaves nothing. Raises `InputError` if `out` is in use.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder; name a new one", argument="out")
    if count < 1:
        raise InputError(f"count must be at least 1, not {count}", argument="count")
    sample_scene(seed, split=split)  # an unknown split fails before anything is written
    digits = max(5, len(str(count - 1)))
    with atomic_directory(target) as staging:
        for name in ("mask", "depth", "graphs"):
            (staging / name).mkdir()
        for start in range(0, count, BATCH):
            seeds = range(seed + start, seed + min(start + BATCH, count))
            scenes = [sample_scene(s, split=split) for s in seeds]
            made = render(scenes, size=size, device=device)
            for k, (scene, scene_seed) in enumerate(zip(scenes, seeds, strict=True)):
                _write(staging, f"{start + k:0{digits}d}", scene, scene_seed, split, style, made, k)
            if on_progress:
                on_progress(start + len(seeds), count)


def _write(
    folder: Path, name: str, scene: Scene, seed: int, split: str, style: str, made: Render, k: int
) -> None:
    caption, statement = describe(scene, seed, style)
    rgb = made.rgb[k, :, 0].mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    depth = made.depth[k, 0].mul(DEPTH_SCALE).round().clamp(0, 65535).cpu().numpy().astype(np.uint16)
    Image.fromarray(rgb).save(folder / f"{name}.png")
    Image.fromarray(made.instances[k, 0].cpu().numpy()).save(folder / "mask" / f"{name}.png")
    Image.fromarray(depth).save(folder / "depth" / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    graph = {
        "scene": scene_to_dict(scene),
        "caption": caption,
        "statement": asdict(statement),
        "relations": relations(scene),
        "hash": scene_hash(scene),
        "split": split,
        "seed": seed,
    }
    (folder / "graphs" / f"{name}.json").write_text(json.dumps(graph, indent=1) + "\n", encoding="utf-8")
