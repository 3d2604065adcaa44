"""`sfumato chart` and `sfumato preflight`: what they write, say and refuse."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from helpers import tiny_folder
from sfumato.cli.app import run
from sfumato.fidelity import ocr, room
from sfumato.fidelity.words import font
from sfumato.pictures import decode_mask


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def poster(tmp_path) -> str:
    image = Image.new("RGB", (200, 120), "white")
    ImageDraw.Draw(image).text((10, 40), "small print here", fill="black", font=font("regular", 11))
    image.save("poster.png")
    return "poster.png"


def refused(arguments: list[str], capsys) -> str:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_a_chart_comes_as_page_picture_document_and_numbers(capsys):
    assert run(["chart", "--cached", "-o", "charts"]) == 0
    assert sorted(os.listdir("charts")) == ["chart.html", "chart.json", "chart.pdf", "chart.png"]
    with Image.open("charts/chart.png") as image:
        assert image.width > 1000
    with open("charts/chart.pdf", "rb") as stream:
        assert stream.read(5) == b"%PDF-"
    with open("charts/chart.html", encoding="utf-8") as stream:
        page = stream.read()
    assert not re.search(r"(src|href)=['\"]?https?:", page)  # it needs nothing else
    with open("charts/chart.json", encoding="utf-8") as stream:
        assert json.load(stream)["limits"]["text"] > 10
    assert "words are read from" in capsys.readouterr().out


@pytest.mark.full
def test_charts_side_by_side_measured_without_an_engine_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ocr, "find_reader", lambda: None)
    tiny = str(tiny_folder(tmp_path / "tiny"))
    assert run(["chart", "-m", tiny, "--json"]) == 0
    out, err = capsys.readouterr()
    measured = json.loads(out)
    assert (measured["channels"], measured["reader"]) == (4, "")
    assert err == f"note: {ocr.MISSING}\n"  # named, and the chart goes on
    assert run(["chart", "-m", "pocket", "-m", tiny, "--cached", "--json", "-o", "both.png"]) == 0
    both = json.loads(capsys.readouterr().out)["charts"]
    assert [each["channels"] for each in both] == [8, 4]
    assert both[1]["sections"] == measured["sections"]
    assert os.path.getsize("both.png") > 10_000


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["-o", "chart.gif"], "must be a folder or end in .html, .png, .pdf, .json"),
        (["-m", "nowhere"], "there is no model 'nowhere'"),
        (["-m", "pocket", "-m", "pocket", "--vae", "x.safetensors"], "--vae goes with one model"),
        (["--vae", "x.safetensors"], "vae is for checkpoints"),
        (["--dtype", "fp7"], "dtype must be one of"),
        (["--device", "tpu"], "device 'tpu' is unknown"),
    ],
)
def test_charts_refuse_by_one_line(arguments, said, capsys):
    assert said in refused(["chart", *arguments], capsys)


def test_a_file_without_an_autoencoder_is_named(capsys):
    import torch

    from sfumato.storage import save_tensors

    save_tensors(
        "lora.safetensors", {"x.lora_down.weight": torch.zeros(2, 2), "x.lora_up.weight": torch.zeros(2, 2)}
    )
    assert "a LoRA" in refused(["chart", "-m", "lora.safetensors"], capsys)


def test_a_picture_is_told_and_the_exit_code_says_below(poster, capsys):
    assert run(["preflight", poster, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == [200, 120] and report["lost"] == 1
    region = report["regions"][0]
    assert region["kind"] == "text" and region["measured_loss"] > 0.5 and region["predicted_loss"] > 0.5
    assert run(["preflight", poster, "--require", "90", "--html", "r.html", "--mask", "keep.png"]) == 3
    out, err = capsys.readouterr()
    assert "line of text" in out and "below the 90" in err
    with open("keep.png", "rb") as stream:
        mask = np.asarray(decode_mask(stream.read()))
    assert mask.shape == (120, 200) and 0 < (mask == 0).mean() < 0.5
    assert os.path.getsize("r.html") > 1000
    assert run(["preflight", poster, "--require", "0", "--foretell", "--size", "800x480", "--json"]) == 0
    larger = json.loads(capsys.readouterr().out)
    assert larger["size"] == [800, 480] and larger["regions"][0]["measured_loss"] is None


def test_a_folder_is_a_table_that_leaves_out_what_cannot_be_read(poster, capsys):
    os.mkdir("many")
    os.rename(poster, "many/<b>.png")
    Image.new("RGB", (64, 64), "teal").save("many/plain.png")
    with open("many/broken.png", "wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\nnothing")
    assert run(["preflight", "many", "--json", "--html", "many.html"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [os.path.basename(each["picture"]) for each in answer["pictures"]] == ["<b>.png", "plain.png"]
    assert "broken.png" in answer["unreadable"][0]["picture"]
    with open("many.html", encoding="utf-8") as stream:
        page = stream.read()
    assert "<b>.png" not in page and "&lt;b&gt;.png" in page and "data-sort" in page
    assert "broken.png" in page and "cannot be read" in page
    assert run(["preflight", "many"]) == 0
    out, err = capsys.readouterr()
    assert "3 pictures, worst first" in out and "cannot be read" in out and "broken.png" in err


def test_what_cannot_be_read_does_not_reach_what_is_required(capsys):
    """Nor does a link that leads nowhere; and one picture in a folder is a table all the same."""
    os.mkdir("many")
    Image.new("RGB", (64, 64), "teal").save("many/plain.png")
    assert run(["preflight", "many", "--foretell", "--require", "90", "--html", "one.html"]) == 0
    assert "1 picture, worst first" in capsys.readouterr().out
    with open("one.html", encoding="utf-8") as stream:
        assert "data-sort" in stream.read()
    assert run(["preflight", "many", "--foretell", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 1
    os.symlink("nowhere.png", "many/link.png")
    assert run(["preflight", "many", "--foretell", "--require", "90"]) == 3
    out, err = capsys.readouterr()
    assert "link.png" in out and "1 of 2 pictures cannot be read" in err
    assert run(["preflight", "many", "--foretell"]) == 0


def test_what_does_not_fit_in_memory_is_refused_with_what_would(poster, capsys, monkeypatch):
    monkeypatch.setattr(room, "available", lambda device: room.resident() + 4 * 10**9)
    said = refused(["preflight", poster, "--size", "16384x8192", "--foretell"], capsys)
    assert "at 16384x8192 takes 29.8 GB of memory, of which 4.0 GB are free; " in said
    width, height = (int(side) for side in re.search(r"(\d+)x(\d+) would fit", said).groups())
    assert room.needed(width, height) <= 4 * 10**9 < room.needed(width + 64, height + 64)
    assert width == pytest.approx(2 * height, abs=32)
    monkeypatch.setattr(room, "available", lambda device: room.resident())
    assert "0.0 GB are free\n" in refused(["preflight", poster], capsys)


def test_a_prompt_is_told(capsys):
    assert (
        run(["preflight", "--prompt", 'a sign "free parking behind the old town hall"', "--require", "80"])
        == 3
    )
    out, _ = capsys.readouterr()
    assert "pocket at 128x128" in out and "told wrong" in out
    assert run(["preflight", "--prompt", "a red cube", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 100


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give a picture, a folder of them, or --prompt TEXT"),
        (["a.png", "--prompt", "x"], "one of them"),
        (["none.png"], "does not exist"),
        (["."], "holds no PNG, JPEG or WebP"),
        (["text.png"], "is not a picture"),
        (["--prompt", "x", "--require", "120"], "require must lie between 0 and 100"),
        (["--prompt", "x", "--require", "nan"], "require must lie between 0 and 100"),
        (["--prompt", "x", "--require", "much"], "require must be a number"),
        (["--prompt", "x", "--size", "4x4"], "size must lie between 16 and 4096"),
        (["--prompt", "50 birds", "--size", "8192x8192"], "size must lie between 16 and 4096"),
        (["--prompt", "x", "--size", "64x64", "--foretell"], "foretell is for pictures"),
        (["--prompt", "x", "--size", "wide"], "size must be like 128 or 128x96"),
        (["--prompt", "x", "--html", "report.txt"], "must end in .html"),
        (["--prompt", "x", "--mask", "m.png"], "a mask is of one picture"),
        (["--prompt", "x" * 100_001], "at most 100,000"),
        (["--prompt", "x", "-m", "nowhere"], "there is no model"),
    ],
)
def test_preflight_refuses_by_one_line(arguments, said, capsys):
    with open("text.png", "w", encoding="utf-8") as stream:
        stream.write("no picture")
    if arguments == ["."]:
        os.remove("text.png")
    assert said in refused(["preflight", *arguments], capsys)


def png(mode: str, size: tuple[int, int], **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG", **options)
    return buffer.getvalue()


def of_kind(mode: str, size: tuple[int, int], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header says that it has more, with the checksum of the lie."""
    data = bytearray(png("L", (1, 1)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "data, found",
    [
        pytest.param(b"", "an empty file", id="empty"),
        pytest.param(png("RGB", (64, 64))[:60], "is cut short", id="cut"),
        pytest.param(b"no picture at all", "is not a picture", id="text"),
        pytest.param(of_kind("L", (8, 8), "GIF"), "a GIF", id="gif"),
        pytest.param(of_kind("L", (8, 8), "BMP"), "a BMP", id="bmp"),
        pytest.param(claims(60_000, 60_000), "60000×60000 pixels; at most", id="huge"),
        pytest.param(claims(0, 9), "", id="nothing"),
        pytest.param(claims(900, 900), "", id="too little"),
        pytest.param(None, "does not exist", id="dangling link"),
        pytest.param(of_kind("CMYK", (40, 30), "JPEG"), (40, 30), id="CMYK"),
        pytest.param(png("I;16", (40, 40)), (40, 40), id="16 bits"),
        pytest.param(png("RGBA", (33, 17)), (33, 17), id="alpha"),
        pytest.param(png("LA", (9, 70)), (9, 70), id="grey and alpha"),
        pytest.param(png("P", (640, 3), transparency=0), (640, 3), id="palette"),
        pytest.param(png("1", (50, 20)), (50, 20), id="1 bit"),
        pytest.param(png("L", (1, 1)), (1, 1), id="1x1"),
        pytest.param(png("RGB", (20_000, 2)), (20_000, 2), id="20000x2"),
        pytest.param(of_kind("RGB", (30, 60), "WEBP"), (30, 60), id="WebP"),
    ],
)
def test_any_picture_is_read_or_refused_by_one_line(data, found, capsys):
    """Whatever the name says; what is refused alone is named in a folder."""
    os.mkdir("odd")
    if data is None:
        os.symlink("nowhere.png", "odd/odd.png")
    else:
        with open("odd/odd.png", "wb") as stream:
            stream.write(data)
    if isinstance(found, tuple):
        assert run(["preflight", "odd/odd.png", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["size"] == list(found)
    else:
        said = refused(["preflight", "odd/odd.png"], capsys)
        assert found in said and "odd.png" in said
        assert "none of 1 pictures can be read" in refused(["preflight", "odd"], capsys)
