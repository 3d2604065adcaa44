"""The latent cache: right rows, whole files, refused when it belongs to something else."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sfumato.data.folder import FolderSource
from sfumato.data.latents import LatentCache, build_latents
from sfumato.data.source import to_float
from sfumato.errors import Cancelled, DataError, InputError, SfumatoError, StaleCacheError

WEIGHTS = torch.linspace(-1, 1, 4)[:, None] * torch.tensor([1.0, 0.5, -0.25])


def encode(pixels):
    """A linear encoder of factor 8 with 4 channels: exact, so that every row can be checked."""
    small = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))
    return torch.einsum("kc,bcthw->bkthw", WEIGHTS, small)


def fill(folder, count=10, seed=0):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        shape = (32, 32, 3) if number % 3 else (24, 40, 3)
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"p{number:03d}.png")
        (folder / f"p{number:03d}.txt").write_text(f"picture {number}")
    return folder


def read(folder, **options):
    return FolderSource(folder, 32, multiple=8, **options)


def shards(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("latents-*"))}


@pytest.mark.parametrize("ram_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_the_latents_of_their_pictures(tmp_path, dtype, ram_bytes):
    source = read(fill(tmp_path / "set", 20), flip=True)
    build_latents(source, encode, "aa", tmp_path / "cache", batch=3, dtype=dtype, shard_rows=4)
    cache = LatentCache(tmp_path / "cache", source, "aa", ram_bytes=ram_bytes)
    assert len(cache) == len(source) == 40 and cache.dtype == dtype
    assert cache.buckets() == source.buckets() and len(cache.buckets()) == 2
    generator = np.random.default_rng(1)
    for (height, width), members in cache.buckets().items():
        assert cache.shape((height, width)) == (4, 1, height // 8, width // 8)
        picked = generator.choice(members, 17)
        want = encode(to_float(source.pixels(picked)))
        got = cache.batch(picked)
        assert got.dtype == torch.float32
        tolerance = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
        assert torch.all((got - want).abs() <= tolerance * want.abs() + 1e-7)


def test_equal_pictures_are_stored_once(tmp_path):
    folder = fill(tmp_path / "7_set", 6)
    for number in range(6):
        os.link(folder / f"p{number:03d}.png", folder / f"q{number}.png")
        (folder / f"q{number}.txt").write_text("the same again")
    source = read(tmp_path)
    assert len(source) == 84
    cache = build_latents(source, encode, "aa", tmp_path / "cache")
    rows = 0
    for path in (tmp_path / "cache").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            rows += len(file.get_tensor("latents"))
    assert rows == 6
    for members in cache.buckets().values():
        assert torch.equal(cache.batch(members), encode(to_float(source.pixels(members))).half().float())


def test_only_what_is_missing_is_encoded(tmp_path):
    folder = fill(tmp_path / "set", 9)
    seen = []

    def counting(pixels):
        seen.append(len(pixels))
        return encode(pixels)

    progress = []
    build_latents(read(folder), counting, "aa", tmp_path / "cache", 4, lambda *p: progress.append(p))
    assert sum(seen) == 9 and progress[-1] == (9, 9) and progress == sorted(progress)
    seen.clear()
    build_latents(read(folder), counting, "aa", tmp_path / "cache", 4)
    assert seen == []
    (folder / "p004.png").write_bytes((folder / "p005.png").read_bytes())
    Image.new("RGB", (32, 32), "teal").save(folder / "p001.png")
    build_latents(read(folder), counting, "aa", tmp_path / "cache", 4)
    assert seen == [1]  # p004 now equals p005, which is there


class TestStale:
    def test_another_autoencoder(self, tmp_path):
        source = read(fill(tmp_path / "set"))
        build_latents(source, encode, "a" * 64, tmp_path / "cache")
        before = shards(tmp_path / "cache")
        for attempt in (
            lambda: LatentCache(tmp_path / "cache", source, "b" * 64),
            lambda: build_latents(source, encode, "b" * 64, tmp_path / "cache"),
        ):
            with pytest.raises(
                StaleCacheError, match="autoencoder aaaaaaaaaaaa, but this one is bbbbbbbbbbbb"
            ):
                attempt()
        assert shards(tmp_path / "cache") == before

    def test_changed_new_and_differently_cropped_pictures(self, tmp_path):
        folder = fill(tmp_path / "set", 9)
        build_latents(read(folder), encode, "aa", tmp_path / "cache")
        Image.new("RGB", (32, 32), "teal").save(folder / "p004.png")
        with pytest.raises(
            StaleCacheError, match=r"lacks 1 of 9 .* 1 changed or cropped differently \(first: p004.png\)"
        ):
            LatentCache(tmp_path / "cache", read(folder), "aa")
        Image.new("RGB", (32, 32), "lime").save(folder / "z.png")
        (folder / "z.txt").write_text("new")
        with pytest.raises(StaleCacheError, match=r"p004.png\), 1 new \(first: z.png\)"):
            LatentCache(tmp_path / "cache", read(folder), "aa")
        (folder / "z.png").unlink()
        build_latents(read(folder), encode, "aa", tmp_path / "cache")
        with pytest.raises(StaleCacheError, match=r"lacks 3 of 9 .* 3 changed or cropped differently"):
            LatentCache(tmp_path / "cache", FolderSource(folder, 32, multiple=8, max_ratio=1.5), "aa")

    def test_another_dtype_or_format(self, tmp_path):
        source = read(fill(tmp_path / "set"))
        build_latents(source, encode, "aa", tmp_path / "cache")
        with pytest.raises(StaleCacheError, match="stores float16, but bfloat16 is asked for"):
            build_latents(source, encode, "aa", tmp_path / "cache", dtype="bfloat16")
        index = tmp_path / "cache" / "cache.json"
        whole = index.read_text()
        for damaged in ("", "[]", "{}"):
            index.write_text(damaged)
            with pytest.raises(StaleCacheError, match="cache"):
                LatentCache(tmp_path / "cache", source, "aa")
        index.write_text(whole.replace("latents 1", "latents 9"))
        with pytest.raises(StaleCacheError, match="sfumato latents 9"):
            LatentCache(tmp_path / "cache", source, "aa")

    def test_no_cache_at_all(self, tmp_path):
        source = read(fill(tmp_path / "set"))
        with pytest.raises(DataError, match=r"holds no cached latents"):
            LatentCache(tmp_path, source, "aa")

    def test_a_damaged_shard_is_named(self, tmp_path):
        source = read(fill(tmp_path / "set"))
        build_latents(source, encode, "aa", tmp_path / "cache")
        path = next((tmp_path / "cache").glob("latents-*"))
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(DataError, match=f"{path.name} is damaged"):
            LatentCache(tmp_path / "cache", source, "aa")
        path.write_bytes(path.read_bytes()[:4])
        with pytest.raises(DataError, match=f"{path.name} is .*; remove it and encode again"):
            LatentCache(tmp_path / "cache", source, "aa")


class TestRefused:
    @pytest.mark.parametrize(
        ("bad", "dtype"), [(float("nan"), "float16"), (float("inf"), "bfloat16"), (1e6, "float16")]
    )
    def test_a_latent_that_is_not_finite_names_its_picture(self, tmp_path, bad, dtype):
        source = read(fill(tmp_path / "set", 9))
        target = source.pixels([4])

        def broken(pixels):
            latents = encode(pixels)
            for row, picture in enumerate(pixels):
                if picture.shape[-2:] == (32, 32) and torch.equal(picture, to_float(target)[0]):
                    latents[row, 2, 0, 1, 1] = bad
            return latents

        with pytest.raises(DataError, match=r"latent of p004\.png is not finite"):
            build_latents(source, broken, "aa", tmp_path / "cache", dtype=dtype)
        build_latents(source, encode, "aa", tmp_path / "cache", dtype=dtype)

    def test_batches_of_mixed_buckets_and_unknown_indices(self, tmp_path):
        source = read(fill(tmp_path / "set", 9))
        cache = build_latents(source, encode, "aa", tmp_path / "cache")
        with pytest.raises(InputError, match="share a bucket"):
            cache.batch([0, 1])
        for indices in ([9], [-1], []):
            with pytest.raises(InputError, match=r"indices must lie in 0 … 8"):
                cache.batch(indices)

    def test_dtype_and_shape(self, tmp_path):
        source = read(fill(tmp_path / "set", 3))
        with pytest.raises(InputError, match="not int8"):
            build_latents(source, encode, "aa", tmp_path / "cache", dtype="int8")
        with pytest.raises(SfumatoError, match="the encoder gave shape"):
            build_latents(source, lambda x: encode(x)[:, :, 0], "aa", tmp_path / "cache")


CHILD = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
import test_data_latents as t
from sfumato.data.latents import build_latents
limit = {limit}
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def told(done, total):
    sys.stdout.write(f"{{done}}\\n")
    sys.stdout.flush()
build_latents(t.read(Path({folder!r})), t.encode, "aa", Path({cache!r}), batch=2, on_progress=told, shard_rows={rows})
"""


def child(folder, cache, limit=0, rows=6):
    path = [os.path.dirname(__file__), *sys.path]
    code = CHILD.format(path=path, limit=limit, folder=str(folder), cache=str(cache), rows=rows)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_continued_is_the_same_to_the_bit(tmp_path):
    folder = fill(tmp_path / "set", 40)
    build_latents(read(folder), encode, "aa", tmp_path / "whole", batch=2, shard_rows=6)
    process = child(folder, tmp_path / "killed")
    for line in process.stdout:
        if int(line) >= 23:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    held = shards(tmp_path / "killed")
    (tmp_path / "killed" / ".latents-32x32-00009.safetensors.x.safetensors").write_bytes(b"left by a kill")
    assert 0 < len(held) < len(shards(tmp_path / "whole"))
    build_latents(read(folder), encode, "aa", tmp_path / "killed", batch=2, shard_rows=6)
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".latents*"))


def test_a_cancel_keeps_whole_shards(tmp_path):
    source = read(fill(tmp_path / "set", 30))

    def stop(done, total):
        if done >= 14:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        build_latents(source, encode, "aa", tmp_path / "cache", 2, stop, shard_rows=5)
    assert len(shards(tmp_path / "cache")) == 2
    build_latents(source, encode, "aa", tmp_path / "whole", 2, shard_rows=5)
    build_latents(source, encode, "aa", tmp_path / "cache", 2, shard_rows=5)
    assert shards(tmp_path / "cache") == shards(tmp_path / "whole")


def test_a_full_disk_leaves_the_old_cache_whole(tmp_path):
    folder = fill(tmp_path / "set", 6)
    build_latents(read(folder), encode, "aa", tmp_path / "cache")
    before = shards(tmp_path / "cache")
    old = read(folder)
    fill(folder, 60)
    process = child(folder, tmp_path / "cache", limit=2500, rows=1000)  # the limit stands in for a full disk
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "SfumatoError" in errors.splitlines()[-1] and "what it held before is intact" in errors
    assert shards(tmp_path / "cache") == before and not list((tmp_path / "cache").glob(".latents*"))
    fill(folder, 6)
    cache = LatentCache(tmp_path / "cache", old, "aa")
    assert torch.isfinite(cache.batch(cache.buckets()[32, 32])).all()
