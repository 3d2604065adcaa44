"""Clips as files: what is written comes back, says how it was made, and what is no clip is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from PIL import Image

from sfumato.errors import DataError, InputError, SfumatoError
from sfumato.receipts import provenance
from sfumato.receipts.clips import check_output, read_recipe, save_clips
from sfumato.types import Clip, Result
from sfumato.video import read, write
from sfumato.video.formats import format_of, sniff
from sfumato.video.frames import Frames
from sfumato.video.read import read_clip
from sfumato.video.xmp import into_gif

SIZE = (64, 48)
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
RECIPE = {
    "sfumato": "0", "model": "m", "weights": {"unet": "a" * 64}, "seconds": 1.0,
    "request": {"prompt": "é <&> \"quoted\"\n", "seed": 7, "count": 2, "fps": 7.0, "size": [64, 48]},
}  # fmt: skip


def moving(count: int = 6, size: tuple[int, int] = SIZE, fps: float = 7.0) -> Clip:
    """A smooth picture that drifts, with few colours, as codecs like it."""
    ys, xs = np.mgrid[: size[1], : size[0]]
    frames = []
    for t in range(count):
        red, green = (xs * 2 + 12 * t) % 200, np.full_like(xs, 30 + 20 * t)
        frames.append(Image.fromarray(np.stack([red, green, ys * 3], -1).astype(np.uint8)))
    return Clip(tuple(frames), fps)


def written(clip: Clip, path: Path, **notes: str) -> Path:
    with write.staged(path) as place:
        write.write_clip(clip, place, format_of(path), notes)
    return path


def difference(a: Clip, b: Clip) -> float:
    """Mean over all pixels, of 255."""
    pairs = zip(a.frames, b.frames, strict=True)
    return float(
        np.mean([np.abs(np.asarray(x, np.int16) - np.asarray(y, np.int16)).mean() for x, y in pairs])
    )


@pytest.mark.parametrize(
    ("name", "bound"), [("a.mp4", 3.0), ("a.webm", 3.0), ("a.webp", 0.0), ("a.gif", 12.0), ("a", 0.0)]
)
@pytest.mark.parametrize("fps", [7.0, 24.0, 29.97])
def test_a_clip_comes_back(name, bound, fps, tmp_path):
    clip = moving(fps=fps)
    path = written(clip, tmp_path / name, sfumato="{}")
    found = read_clip(path, fps=fps)
    assert len(found.frames) == 6 and found.size == SIZE
    assert difference(found, clip) <= bound
    assert found.fps == pytest.approx(fps, rel=0.1 if name == "a.gif" else 0.01)
    assert read_clip(path, frames=2, fps=fps).frames[1].tobytes() == found.frames[1].tobytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_colours_are_tagged_and_true(tmp_path):
    """Other players convert by the tags: the numbers must be those of BT.709 in the limited range."""
    flat = Clip(tuple(Image.new("RGB", SIZE, (255, 0, 0)) for _ in range(3)), 10)
    for name in ("a.mp4", "a.webm"):
        path = written(flat, tmp_path / name)
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert (frame.colorspace, frame.color_range) == (1, 1)
            luma = np.asarray(frame.to_ndarray())[: SIZE[1]].mean()
        assert luma == pytest.approx(16 + 219 * 0.2126, abs=2)
        assert np.asarray(read_clip(path).frames[0]).mean((0, 1)) == pytest.approx([255, 0, 0], abs=6)


def test_frames_on_the_disk_are_a_sequence_of_pictures(tmp_path, monkeypatch):
    clip = moving(5)
    found = Frames(frame for frame in clip.frames)
    assert len(found) == 5 and all(np.array_equal(a, b) for a, b in zip(found, clip.frames, strict=True))
    assert np.array_equal(found[-1], clip.frames[4]) and found[1:3] == clip.frames[1:3]
    assert list(reversed(found)) == list(reversed(clip.frames))
    with pytest.raises(IndexError):
        found[5]
    assert replace(clip, frames=found).validate().size == SIZE
    written(replace(clip, frames=found), tmp_path / "a.webp")
    assert difference(read_clip(tmp_path / "a.webp"), clip) == 0

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(SfumatoError, match="No space left on device; TMPDIR names another folder"):
        Frames(clip.frames)


def test_times_of_frames_add_up():
    assert write.durations(7, 14, 1000) == [143, 143, 143, 142, 143, 143, 143] * 2
    assert sum(write.durations(29.97, 100, 100)) == round(100 * 100 / 29.97)
    assert write.durations(1e-9, 1, 1000) == [write.LONGEST]


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.webp", "a.gif", "a"])
def test_every_clip_says_how_it_was_made(name, tmp_path):
    result = Result((), RECIPE, (moving(), moving(4)))
    files = save_clips(result, tmp_path / name)
    assert [file.stem for file in files] == ["a-0", "a-1"]
    for k, file in enumerate(files):
        found = read_recipe(file)
        found.pop("frame", None)
        assert found.pop("drawn").keys() == {"pixels", "recipe"}
        assert found == provenance.recipe_of(RECIPE, k)
        assert found["request"]["seed"] == 7 + k and found["request"]["count"] == 1
    notes = read.notes(files[0])
    if name in ("a.mp4", "a.webm"):
        assert notes["digitalsourcetype"] == provenance.SOURCE_TYPE and "Seed: 7" in notes["comment"]
    if name in ("a.webp", "a"):
        assert "trainedAlgorithmicMedia" in notes["xmp"]
    if name == "a":
        assert [read_recipe_of_picture(file)["frame"] for file in sorted(files[0].iterdir())] == list(
            range(6)
        )


def boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """(type, content) of an mp4's top level."""
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        assert size >= 8
        found.append((data[at + 4 : at + 8], data[at + 8 : at + size]))
        at += size
    assert at == len(data)
    return found


@pytest.mark.parametrize("began", [None, "image", "clip"])
def test_gif_and_mp4_have_the_mark_in_xmp(began, tmp_path):
    """Read by what is not ours: a GIF block by block, and FFmpeg for the mp4."""
    request = RECIPE["request"] | {"count": 1} | ({} if began is None else {began: {"sha256": "a"}})
    result = Result((), RECIPE | {"request": request}, (moving(),))
    wanted = provenance.SOURCE_TYPE if began is None else provenance.COMPOSITE_TYPE
    (film,) = save_clips(result, tmp_path / "a.mp4")
    with av.open(str(film), options={"export_xmp": "1"}) as container:
        packet = container.metadata["xmp"]
    kind, content = boxes(film.read_bytes())[-1]
    assert kind == b"uuid" and content[16:].decode() == packet
    (gif,) = save_clips(result, tmp_path / "a.gif")
    data = gif.read_bytes()
    start = data.index(b"XMP DataXMP") + 11
    end = data.index(b"\x01\xff\xfe\xfd", start)
    assert data[start:end].decode() == packet
    assert data[end + 257 : end + 260] in (
        b"\x00\x21\xff",
        b"\x00\x21\xfe",
        b"\x00\x21\xf9",
    )  # the next block
    for text in (packet, data[start:end].decode()):
        (told,) = ElementTree.fromstring(text.strip("\ufeff")).iter(f"{{{IPTC}}}DigitalSourceType")
        assert told.text == wanted


def test_the_mark_moves_nothing_in_a_gif(tmp_path):
    """Its frames, times and comment are those of the file without it, for Pillow and for FFmpeg."""
    plain, marked = written(moving(), tmp_path / "a.gif", sfumato="{}"), tmp_path / "b.gif"
    marked.write_bytes(plain.read_bytes())
    into_gif(marked, provenance.xmp().encode())
    one, other = read_clip(plain), read_clip(marked)
    assert one.fps == other.fps and [f.tobytes() for f in one.frames] == [f.tobytes() for f in other.frames]
    assert read.notes(plain) == read.notes(marked)
    with av.open(str(marked)) as container:
        assert len(list(container.decode(video=0))) == 6


def read_recipe_of_picture(file: Path) -> dict:
    return provenance.read_recipe(file)


def test_a_result_saves_what_it_holds(tmp_path):
    assert Result((), RECIPE, (moving(),)).save(tmp_path / "a.mp4") == [tmp_path / "a.mp4"]
    assert Result((moving().frames[0],), RECIPE).save(tmp_path / "a.png") == [tmp_path / "a.png"]
    with pytest.raises(InputError, match=r"must end in \.mp4"):
        Result((), RECIPE, (moving(),)).save(tmp_path / "a.png")


def test_outputs_that_cannot_be_written_are_told_beforehand(tmp_path):
    for path, words in (
        (tmp_path / "a.avi", r"must end in \.mp4, \.webm, \.webp, \.gif, or no ending"),
        (tmp_path / "none" / "a.mp4", "does not exist; create it first"),
        (tmp_path / "a\0.mp4", "characters no file name can have"),
    ):
        with pytest.raises(InputError, match=words):
            check_output(path)
    (tmp_path / "there").mkdir()
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(InputError, match="exists; name a folder that does not"):
        check_output(tmp_path / "there")
    with pytest.raises(InputError, match="is a folder; name a file in it"):
        check_output(tmp_path / "d.mp4")
    (tmp_path / "there-1").mkdir()
    check_output(tmp_path / "new", 2)
    with pytest.raises(InputError, match="there-1"):
        check_output(tmp_path / "there", 2)


def test_without_pyav_one_line_says_what_to_do(tmp_path):
    """In a process of its own, in which the package is not there."""
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from sfumato.receipts.clips import check_output\nfrom sfumato.errors import InputError\n"
        f"check_output({str(tmp_path / 'a.gif')!r})\n"
        f"try: check_output({str(tmp_path / 'a.mp4')!r})\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "mp4 and webm need PyAV: pip install av; .webp, .gif and folders of pictures do without"
    )


def test_what_no_file_can_hold(tmp_path):
    odd = moving(2, (33, 20))
    with pytest.raises(InputError, match="needs even sides, not 33x20"):
        written(odd, tmp_path / "a.mp4")
    assert read_clip(written(odd, tmp_path / "a.webp")).size == (33, 20)
    with pytest.raises(InputError, match="at least one frame"):
        written(Clip((), 7), tmp_path / "b.mp4")
    mixed = Clip((moving().frames[0], Image.new("RGB", (8, 8))), 7)
    with pytest.raises(InputError, match="must have one size"):
        written(mixed, tmp_path / "b.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["a.webp"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_a_failure_leaves_nothing(name, tmp_path, monkeypatch):
    """Two clips, and the disk is full at the second."""
    done = write.write_clip

    def fails(clip, place, *more, **options):
        done(clip, place, *more, **options)
        if "a-1" in str(place):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_clip", fails)
    with pytest.raises(SfumatoError, match="could not be written: No space left on device"):
        save_clips(Result((), RECIPE, (moving(2), moving(2))), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# --- reading what nobody vouches for -------------------------------------------------------------------------------


def encoded(
    path: Path, times: list[int], rate: int = 10, sizes: tuple = (SIZE,), sound: bool = False
) -> Path:
    """An mp4 whose frames are shown at these times, in tenths of a second."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(Image.new("RGB", sizes[0], (number * 20 % 256, 0, 0)))
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def speech(path: Path) -> Path:
    """Sound alone."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_clip(path, **options)
    message = str(caught.value)
    assert "\n" not in message and (path.name in message) and message.startswith("clip ")
    return message


def test_clips_that_are_refused_in_one_line(tmp_path):
    good = written(moving(), tmp_path / "good.mp4")
    data = good.read_bytes()

    def made(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert "does not exist" in refusal(tmp_path / "none.mp4")
    assert "is an empty file" in refusal(made("empty.mp4", b""))
    assert "is filled with zero bytes" in refusal(made("zeros.mp4", bytes(5000)))
    assert "is no clip" in refusal(made("text.mp4", b"hello, this is no clip"))
    assert "is damaged or cut off" in refusal(made("head.mp4", data[:40]))
    long = written(moving(30), tmp_path / "long.mp4").read_bytes()
    cut = made("cut.mp4", long[: 3 * len(long) // 4])
    assert "seconds are announced" in refusal(cut) and "seconds are announced" in refusal(cut, frames=30)
    assert len(read_clip(cut, frames=2).frames) == 2
    long = written(moving(30), tmp_path / "long.webm").read_bytes()
    assert "seconds are announced" in refusal(made("cut.webm", long[: len(long) // 2]))
    assert "is damaged or cut off" in refusal(made("noise.mp4", data[:32] + os.urandom(4000)))
    assert "is damaged or cut off" in refusal(made("noise.webm", b"\x1a\x45\xdf\xa3" + os.urandom(4000)))
    assert "is damaged or cut off" in refusal(made("noise.gif", b"GIF89a" + bytes(range(200))))
    assert "has only sound" in refusal(speech(tmp_path / "sound.mp4"))
    assert "is a PNG picture" in refusal(made("still.png", _png(moving().frames[0], tmp_path)))
    still = written(moving(1), tmp_path / "still.gif")
    assert "a picture that does not move" in refusal(still)
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "is neither a file nor a folder" in refusal(tmp_path / "pipe.mp4")


def _png(picture: Image.Image, folder: Path) -> bytes:
    picture.save(folder / "x.png")
    return (folder / "x.png").read_bytes()


@pytest.mark.parametrize("ending", ["avi", "mkv", "webm"])
def test_a_clip_that_is_cut_off_is_no_shorter_one(tmp_path, ending):
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    rng = np.random.default_rng(0)
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("libvpx-vp9" if ending == "webm" else "mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for _ in range(40):
            pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    assert len(read_clip(whole).frames) == 40
    with av.open(str(whole)) as container:
        starts = [packet.pos for packet in container.demux(video=0) if packet.pos]
    for kept in (1, 2, 12, 30):
        cut.write_bytes(whole.read_bytes()[: starts[kept]])
        assert "is cut off" in refusal(cut) and "is cut off" in refusal(cut, frames=39)
        assert len(read_clip(cut, frames=1).frames) == 1


def test_damage_in_the_middle_never_leaves_one_line(tmp_path):
    """A decoder may conceal it; else it is said."""
    data = bytearray(written(moving(12), tmp_path / "good.mp4").read_bytes())
    rng = np.random.default_rng(0)
    for trial in range(30):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 40):
            damaged[at] = int(rng.integers(256))
        path = tmp_path / f"{trial}.mp4"
        path.write_bytes(bytes(damaged[: int(rng.integers(20, len(data)))] if trial % 2 else damaged))
        try:
            read_clip(path)
        except InputError as error:
            assert "\n" not in str(error) and path.name in str(error)


def test_a_variable_rate_is_refused_with_the_way_to_make_it_even(tmp_path):
    message = refusal(encoded(tmp_path / "uneven.mp4", [0, 1, 2, 6, 7, 8]))
    assert "variable frame rate, from 2.5 to 10 frames a second" in message and "ffmpeg -i" in message
    assert read_clip(encoded(tmp_path / "even.mp4", [0, 1, 2, 3])).fps == pytest.approx(10)
    assert read_clip(encoded(tmp_path / "slow.mp4", [0, 5, 10, 15])).fps == pytest.approx(2, rel=0.02)
    frames = [frame.convert("RGB") for frame in moving(4).frames]
    frames[0].save(
        tmp_path / "uneven.gif", save_all=True, append_images=frames[1:], duration=[100, 500, 100, 100]
    )
    assert "variable frame rate" in refusal(tmp_path / "uneven.gif")
    frames[0].save(
        tmp_path / "end.gif", save_all=True, append_images=frames[1:], duration=[100, 100, 100, 900]
    )
    assert read_clip(tmp_path / "end.gif").fps == pytest.approx(10)


def test_limits(tmp_path, monkeypatch):
    path = written(moving(12), tmp_path / "a.mp4")
    monkeypatch.setattr(read, "MAX_FRAMES", 8)
    assert "more than 8 frames" in refusal(path)
    assert len(read_clip(path, frames=8).frames) == 8
    assert "more than 8 frames" in refusal(written(moving(12), tmp_path / "a.gif"))
    monkeypatch.setattr(read, "MAX_CLIP_PIXELS", SIZE[0] * SIZE[1] * 3)
    assert "pixels in its frames together" in refusal(path)
    assert len(read_clip(path, frames=3).frames) == 3
    monkeypatch.setattr(read, "MAX_BYTES", 100)
    assert "at most 100 are read" in refusal(path)
    monkeypatch.setattr("sfumato.pictures.MAX_PIXELS", 1000)
    monkeypatch.setattr(read, "MAX_BYTES", 10**9)
    assert "frames of 64x48 pixels; at most 1,000 are read" in refusal(path)


def test_folders_of_pictures(tmp_path):
    place = written(moving(), tmp_path / "frames")
    assert "give `fps`" in refusal(place)
    (place / "notes.txt").write_text("not a picture")
    assert difference(read_clip(place, fps=5), moving()) == 0
    Image.new("RGB", (8, 8)).save(place / "9999.png")
    assert "several sizes: 9999.png differs" in refusal(place, fps=5)
    (place / "9999.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match="9999"):
        read_clip(place, fps=5)
    (tmp_path / "none").mkdir()
    assert "holds no .png, .jpg or .webp pictures" in refusal(tmp_path / "none", fps=5)


def test_a_clip_held_sideways_is_turned(tmp_path):
    """A display matrix of 90 degrees, as phones write it, set in the file by hand: the track header's."""
    data = bytearray(written(moving(), tmp_path / "a.mp4").read_bytes())
    at = (
        data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    )  # version, times, identifiers, reserved, layer and volume
    identity = bytes.fromhex("00010000" + "00" * 12 + "00010000" + "00" * 12 + "40000000")
    assert data[at : at + 36] == identity
    data[at : at + 36] = bytes.fromhex(
        "00000000" + "00010000" + "00" * 4 + "ffff0000" + "00" * 16 + "40000000"
    )
    (tmp_path / "turned.mp4").write_bytes(bytes(data))
    straight, turned = read_clip(tmp_path / "a.mp4"), read_clip(tmp_path / "turned.mp4")
    assert turned.size == SIZE[::-1]
    expected = straight.frames[2].transpose(Image.Transpose.ROTATE_270)
    assert turned.frames[2].tobytes() == expected.tobytes()


def test_kinds_are_told_by_content(tmp_path):
    """A false ending changes nothing."""
    path = written(moving(), tmp_path / "a.webm")
    path.rename(tmp_path / "a.mp4")
    assert len(read_clip(tmp_path / "a.mp4").frames) == 6
    assert sniff(b"RIFF\0\0\0\0AVI LIST") == "avi" and sniff(b"MZ\0\0\0\0\0\0\0\0\0\0") is None
    recipe = {**RECIPE, "request": {}}
    files = save_clips(Result((), recipe, (moving(),)), tmp_path / "b.gif")
    found = json.loads(read.notes(files[0])["comment"])
    assert found == provenance.recipe_of(recipe, 0) | {"drawn": found["drawn"]}
    with pytest.raises(InputError, match="carries no recipe of ours"):
        read_recipe(written(moving(), tmp_path / "c.mp4"))
