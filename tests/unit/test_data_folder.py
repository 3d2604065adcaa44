"""Folders as people have them: every layout is found, every bad member named."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from folders import fill, picture, put, read, reasons, refusal
from sfumato.data.folder import FolderSource
from sfumato.data.source import Problem, Source, to_float
from sfumato.errors import DataError, InputError


class TestLayouts:
    def test_plain_folder(self, tmp_path):
        put(tmp_path, "a.png", "a red square")
        put(tmp_path, "b.jpg", "a caption\nof two  lines ", extension=".caption")
        put(tmp_path, "deep/c.webp", "\ufeffwith a byte-order mark")
        source = read(tmp_path)
        assert isinstance(source, Source)
        assert source.layout == "plain folder with caption files"
        assert [source.name(i) for i in range(3)] == ["a.png", "b.jpg", "deep/c.webp"]
        assert [source.caption(i, 7) for i in range(3)] == [
            "a red square",
            "a caption of two lines",
            "with a byte-order mark",
        ]
        assert source.labels([0], 8) is None
        assert source.problems == ()

    def test_a_folder_without_captions_inside_a_captioned_one_is_passed_over(self, tmp_path):
        fill(tmp_path)
        for number in range(9):
            put(tmp_path, f"masks/p{number}.png")
        source = read(tmp_path)
        assert len(source) == 4
        assert source.passed_over == (Problem("masks/", "9 pictures, none with a caption file"),)

    def test_metadata(self, tmp_path):
        put(tmp_path, "one.png", "not this")
        put(tmp_path, "sub/two.png")
        put(tmp_path, "unlisted.png")
        rows = [{"file_name": "sub/two.png", "text": "two", "x": 1}, {"file_name": "one.png", "text": "one"}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        source = read(tmp_path)
        assert source.layout == "metadata.jsonl"
        assert [(source.name(i), source.caption(i)) for i in range(2)] == [
            ("one.png", "one"),
            ("sub/two.png", "two"),
        ]

    def test_kohya(self, tmp_path):
        put(tmp_path, "3_sks dog/a.png", "a dog", colour=(1, 2, 3))
        put(tmp_path, "3_sks dog/b.png", colour=(4, 5, 6))
        put(tmp_path, "1_cat/c.png", "a cat", extension=".caption")
        put(tmp_path, "notes/d.png", "no repeats")
        source = read(tmp_path)
        assert source.layout == "kohya folders"
        captions = sorted(source.caption(i) for i in range(len(source)))
        assert captions == ["a cat"] + ["a dog"] * 3 + ["sks dog"] * 3
        assert source.passed_over[0].path == "notes/"
        assert len({source.digest(i) for i in range(len(source))}) == 3  # a repeat is the same picture

    def test_one_kohya_folder_alone_is_a_plain_folder(self, tmp_path):
        source = read(fill(tmp_path / "10_cat"))
        assert (len(source), source.layout) == (4, "plain folder with caption files")

    def test_class_folders(self, tmp_path):
        put(tmp_path, "golden retriever/a.png")
        put(tmp_path, "tabby/b.png")
        source = read(tmp_path)
        assert source.layout == "class folders"
        assert [source.caption(i) for i in range(2)] == ["golden retriever", "tabby"]

    def test_only_the_training_split_is_read(self, tmp_path):
        put(tmp_path, "train/tabby/a.png")
        put(tmp_path, "test/tabby/b.png")
        source = read(tmp_path)
        assert [source.name(i) for i in range(len(source))] == ["tabby/a.png"]

    def test_content_decides_and_not_the_extension(self, tmp_path):
        fill(tmp_path)
        picture().save(tmp_path / "photo.png.jpg", "PNG")
        (tmp_path / "photo.png.txt").write_text("a false extension")
        picture().save(tmp_path / "bare", "JPEG")
        (tmp_path / "bare.txt").write_text("no extension at all")
        source = read(tmp_path)
        assert {"a false extension", "no extension at all"} <= {source.caption(i) for i in range(len(source))}
        assert source.problems == ()


class TestBadMembers:
    def test_each_is_set_aside_with_its_reason(self, tmp_path):
        fill(tmp_path, 100)
        put(tmp_path, "no-caption.png")
        put(tmp_path, "empty.png", " \n\t")
        put(tmp_path, "latin.png")
        (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
        put(tmp_path, "nul.png", "a\0b")
        put(tmp_path, "cut.png", "cut short", size=(64, 64))
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
        (tmp_path / "zero.png").write_bytes(bytes(500))
        picture().save(tmp_path / "moving.gif")
        source = read(tmp_path, allow=0.1)
        assert len(source) == 100
        assert reasons(source) == {
            "no-caption.png": "has no caption (no-caption.txt or no-caption.caption beside it)",
            "empty.png": "the caption empty.txt is empty",
            "latin.png": "the caption latin.txt is not UTF-8 (byte 1)",
            "nul.png": "the caption nul.txt holds a NUL character",
            "cut.png": "is cut short",
            "zero.png": "is filled with zero bytes; PNG, JPEG and WebP are read",
            "moving.gif": "is a GIF; PNG, JPEG and WebP are read",
        }

    def test_a_huge_caption_is_not_read(self, tmp_path):
        fill(tmp_path)
        put(tmp_path, "z.png", "word " * 100_000)
        assert "at most" in reasons(read(tmp_path))["z.png"]

    def test_pictures_that_share_a_caption(self, tmp_path):
        fill(tmp_path)
        put(tmp_path, "a.png", "whose?")
        put(tmp_path, "a.jpg")
        assert reasons(read(tmp_path)) == {
            "a.png": "shares its caption a.txt with a.jpg; rename one of them",
            "a.jpg": "shares its caption a.txt with a.png; rename one of them",
        }

    def test_too_small_and_too_long(self, tmp_path):
        fill(tmp_path)
        put(tmp_path, "dot.png", "one pixel", size=(1, 1))
        put(tmp_path, "line.png", "a line", size=(10_000, 1))
        source = read(tmp_path)
        assert reasons(source)["dot.png"].startswith("is too small: 1×1 would be enlarged more than 4 times")
        assert reasons(source)["line.png"] == "has an aspect ratio of 1e+04:1 (10000×1); up to 4:1 is used"

    def test_many_corrupt_members_stop_with_the_first_ten(self, tmp_path):
        fill(tmp_path, 40)
        for number in range(12):
            (tmp_path / f"bad{number:02d}.png").write_bytes(b"")
        text = refusal(tmp_path)
        assert "12 of 52 members cannot be used, more than 5%" in text
        assert "bad09.png: is an empty file" in text and "bad10.png" not in text
        assert text.endswith("and 2 more")
        assert len(read(tmp_path, allow=0.5)) == 40

    def test_a_picture_that_changes_under_us_is_noticed(self, tmp_path):
        source = read(fill(tmp_path))
        put(tmp_path, "p001.png", colour=(0, 255, 0))
        with pytest.raises(DataError, match=r"p001\.png changed"):
            source.pixels([1])
        (tmp_path / "p002.png").unlink()
        with pytest.raises(DataError, match=r"p002\.png cannot be read"):
            source.pixels([2])


class TestNothingUsable:
    def test_absent(self, tmp_path):
        assert "does not exist" in refusal(tmp_path / "nowhere")
        (tmp_path / "file.zip").write_bytes(b"PK")
        assert "is a file" in refusal(tmp_path / "file.zip")

    def test_empty_and_foreign(self, tmp_path):
        assert "found no files" in refusal(tmp_path)
        (tmp_path / "a.gif").write_bytes(b"GIF89a")
        (tmp_path / "b.txt").write_text("x")
        assert "found 1 .gif, 1 .txt (a.gif: is a GIF" in refusal(tmp_path)

    def test_pictures_without_any_caption(self, tmp_path):
        for number in range(1200):
            os.link(tmp_path / "p0.png", tmp_path / f"p{number}.png") if number else put(tmp_path, "p0.png")
        text = refusal(tmp_path)
        assert "has 1,200 .png but no captions: looked for a .txt or .caption" in text
        assert "metadata.jsonl" in text and "<repeats>_<name>" in text

    def test_every_picture_bad(self, tmp_path):
        put(tmp_path, "a.png", "")
        assert "has no usable picture: a.png: the caption a.txt is empty" in refusal(tmp_path)
        put(tmp_path, "a.png", "fine", size=(1, 1))
        assert "has no usable picture: a.png: is too small" in refusal(tmp_path)


class TestPixels:
    def test_the_pixels_are_the_pictures(self, tmp_path):
        array = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("noise")
        source = read(tmp_path, flip=True)
        assert np.array_equal(source.pixels([0, 1]), [array, array[:, ::-1]])
        assert source.digest(0) != source.digest(1)
        floats = to_float(source.pixels([0]))
        assert floats.shape == (1, 3, 1, 32, 32)
        assert np.allclose((floats[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5, array, atol=1e-3)

    def test_shapes_go_to_buckets_of_equal_area(self, tmp_path):
        put(tmp_path, "square.png", "s", size=(300, 300))
        put(tmp_path, "wide.png", "w", size=(400, 220))
        put(tmp_path, "tall.png", "t", size=(220, 400))
        source = FolderSource(tmp_path, 128, multiple=16)
        assert source.buckets() == {(96, 176): [2], (128, 128): [0], (176, 96): [1]}
        assert source.pixels([1]).shape == (1, 176, 96, 3)
        square = FolderSource(tmp_path, 128, multiple=16, max_ratio=1.0)
        assert list(square.buckets()) == [(128, 128)]

    def test_random_crops_depend_on_the_seed_alone(self, tmp_path):
        ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
        Image.fromarray(ramp).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("a ramp")
        made = [FolderSource(tmp_path, 32, seed, multiple=32, crop="random") for seed in (1, 1, 2, 3)]
        assert np.array_equal(made[0].pixels([0]), made[1].pixels([0]))
        assert len({m.pixels([0]).tobytes() for m in made}) == 3
        assert len({m.digest(0) for m in made}) == 3

    def test_held_out_pictures_stay_apart_when_others_are_added(self, tmp_path):
        fill(tmp_path, 60)
        options = {"held_out": 0.3}

        def names(part):
            source = read(tmp_path, part=part, **options)
            return {source.name(i) for i in range(len(source))}

        train, held_out = names("train"), names("held_out")
        assert train.isdisjoint(held_out) and len(train | held_out) == 60
        assert 5 < len(held_out) < 35
        for number in range(60, 90):
            put(tmp_path, f"p{number:03d}.png", "more", colour=(number, 0, 9))
        assert train <= names("train") and held_out <= names("held_out")

    def test_arguments_are_checked(self, tmp_path):
        fill(tmp_path)
        with pytest.raises(InputError, match="size 100 is not a multiple of 8; the nearest is 96"):
            read(tmp_path, size=100)
        with pytest.raises(InputError, match="crop must be"):
            read(tmp_path, crop="left")
        with pytest.raises(InputError, match="part must be"):
            read(tmp_path, part="test")


class TestCache:
    def test_a_checked_folder_is_not_decoded_again(self, tmp_path, monkeypatch):
        folder = fill(tmp_path / "set", 30)
        put(folder, "cut.png", "cut")
        (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-9])
        first = read(folder, cache=tmp_path / "cache")
        plain = read(folder)
        assert first.problems == plain.problems and len(first) == len(plain) == 30
        decoded = []
        original = FolderSource._inspect
        monkeypatch.setattr(FolderSource, "_inspect", lambda s, e: decoded.append(e.name) or original(s, e))
        again = read(folder, cache=tmp_path / "cache")
        assert decoded == [] and again.problems == first.problems
        put(folder, "p004.png", colour=(0, 99, 0))
        os.utime(folder / "p004.png", ns=(1, 1))
        changed = read(folder, cache=tmp_path / "cache")
        assert decoded == ["p004.png"]
        assert [i for i in range(30) if changed.digest(i) != first.digest(i)] == [4]
        assert changed.pixels([4])[0, 0, 0].tolist() == [0, 99, 0]
        for damaged in ("", "{", "[]"):
            next((tmp_path / "cache").glob("checked-*")).write_text(damaged)
            assert len(read(folder, cache=tmp_path / "cache")) == 30

    def test_prepared_pixels_are_the_same_and_need_no_file(self, tmp_path):
        folder = fill(tmp_path / "set", 20)
        generator = np.random.default_rng(0)
        for number in range(20):
            size = (50, 30, 3) if number % 4 else (40, 40, 3)
            Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(
                folder / f"p{number:03d}.png"
            )
        options = {"flip": True, "crop": "random", "seed": 4}
        plain = read(folder, **options)
        want = {size: plain.pixels(members) for size, members in plain.buckets().items()}
        steps = []
        made = read(folder, cache=tmp_path / "cache", **options).prepare(lambda *p: steps.append(p))
        assert steps[-1] == (20, 20) and len(want) == 2
        for number in range(20):
            (folder / f"p{number:03d}.png").unlink()  # from here on only the cache can answer
        assert [made.digest(i) for i in range(40)] == [plain.digest(i) for i in range(40)]
        for size, members in plain.buckets().items():
            assert np.array_equal(made.pixels(members), want[size])
            with pytest.raises(DataError, match="cannot be read"):
                plain.pixels(members)
