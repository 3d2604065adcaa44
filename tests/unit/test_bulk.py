"""Files of prompts drawn and folders encoded: once, and only what is missing when begun again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from helpers import array, noise, tiny_folder
from sfumato import Request, load
from sfumato.bulk.prompts import read_prompts
from sfumato.cli.app import run
from sfumato.data.folder import FolderSource
from sfumato.data.latents import LatentCache
from sfumato.errors import DataError, InputError
from sfumato.families.autoencoders import open_autoencoder
from sfumato.pictures import decode
from sfumato.receipts.provenance import read_recipe


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("tiny") / "model"))


def requests(tmp_path, name: str, text: str, **common) -> list[Request]:
    file = tmp_path / name
    file.write_text(text)
    return [line.request for line in read_prompts(file, common)]


# --- files of prompts ------------------------------------------------------------------------------------------------


def test_each_line_of_a_text_is_a_prompt(tmp_path):
    found = requests(tmp_path, "a.txt", "\ufeffa red cube\n\n  a ball \n", seed=2**64 - 1, steps=3)
    assert found == [Request("a red cube", seed=2**64 - 1, steps=3), Request("a ball", seed=0, steps=3)]


def test_lines_of_json_and_csv_say_the_same(tmp_path):
    said = requests(
        tmp_path,
        "a.jsonl",
        '{"prompt": "a, b", "seed": 7, "size": [64, 32], "hires": {"scale": 2, "steps": 3}}\n{"prompt": "c"}\n',
        guidance=2.0,
        steps=9,
    )
    same = requests(
        tmp_path,
        "a.csv",
        'prompt,seed,size,hires.scale,hires.steps\n"a, b",7,64x32,2,3\nc,,,,\n',
        guidance=2.0,
        steps=9,
    )
    assert said == same and said[0].size == (64, 32) and said[0].seed == 7 and said[1].seed == 1
    assert said[0].steps == 9 and said[0].hires.steps == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}', "line 2 .*prompt"), ("a.jsonl", "[]", "line 1 .*object"),
     ("a.jsonl", '{"prompt": "a"\n', "line 1 .*JSON"), ("a.jsonl", '{"promt": "a"}', "line 1 .*promt"),
     ("a.jsonl", '{"prompt": "a", "image": "x.png"}', "line 1 .*image"), ("a.txt", "\n \n", "holds no prompts"),
     ("a.csv", "seed\n3\n", "prompt among them"), ("a.csv", "prompt,seed\na,x\n", "line 2 .*seed"),
     ("a.csv", "prompt,seed\na\n", "line 2 .*1 cells"), ("a.csv", "prompt,size\na,64\n", "line 2 .*size"),
     ("a.csv", "", "prompt among them"), ("a.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1 ")],
)  # fmt: skip
def test_what_is_no_file_of_prompts_is_refused_by_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name, {})


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts(tmp_path / "a.txt", {})
    for file in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError):
            read_prompts(file, {})


# --- drawn -----------------------------------------------------------------------------------------------------------


def bulk(capsys, *arguments: str) -> dict:
    code = run([*arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def test_a_file_of_prompts_is_drawn_once(tmp_path, tiny, capsys):
    file, place = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    lines = [{"prompt": "a cube"}, {"prompt": "a ball", "count": 2}, {"prompt": "a cube", "seed": 9}]
    file.write_text("\n".join(map(json.dumps, lines)))
    order = [
        "generate",
        "--prompts",
        str(file),
        "-o",
        str(place),
        "-m",
        tiny,
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    first = bulk(capsys, *order)
    assert (first["lines"], first["drawn"], first["there_before"]) == (3, 3, 0)
    pictures = sorted(place.glob("*.png"))
    assert [p.name[:6] for p in pictures] == ["000001", "000002", "000002", "000003"]
    here = load(tiny, "cpu").generate(Request("a ball", seed=1, steps=2, count=2)).images
    for path, picture in zip(pictures[1:3], here, strict=True):
        assert (array(decode(path.read_bytes())) == array(picture)).all()
    assert read_recipe(pictures[3])["request"]["seed"] == 9 and read_recipe(pictures[0])["receipt"]["flops"]
    bill = json.loads((place / "bill.json").read_text())
    assert bill == first["bill"] and bill["pictures"] == 4 and bill["total_seconds"] > 0 and bill["flops"] > 0

    kept = {path: path.stat().st_mtime_ns for path in pictures}
    pictures[2].unlink()  # as if it had been stopped within a line
    again = bulk(capsys, *order)
    assert (again["drawn"], again["there_before"]) == (1, 2) and again["bill"]["pictures"] == 6
    assert sorted(place.glob("*.png")) == pictures
    assert pictures[0].stat().st_mtime_ns == kept[pictures[0]]
    lines[0]["steps"] = 3
    file.write_text("\n".join(map(json.dumps, lines)))
    assert bulk(capsys, *order)["drawn"] == 1 and len(list(place.glob("*.png"))) == 5


@pytest.mark.parametrize(
    "more",
    [["a prompt"], ["--like", "x.png"], ["-o", "x.png"], ["--image", "x.png"], ["--prompts", "none.txt"]],
    ids=str,
)
def test_what_does_not_go_with_a_file_of_prompts(tmp_path, tiny, capsys, more, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a cube")
    noise(8, 8).save(tmp_path / "x.png")
    code = run(["generate", "--prompts", "a.txt", "-o", "pictures", "-m", tiny, *more])
    assert code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "pictures").exists()


def test_a_line_that_the_model_cannot_draw_is_named_before_any_is_drawn(tmp_path, tiny, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "size": [33, 32]}')
    code = run(["generate", "--prompts", str(tmp_path / "a.jsonl"), "-o", str(tmp_path / "p"), "-m", tiny])
    assert code == 2 and "line 2" in capsys.readouterr().err and not list(tmp_path.glob("p/*"))


# --- encoded ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_encoded_once(tmp_path, tiny, capsys):
    photos, place = tmp_path / "photos", tmp_path / "latents"
    photos.mkdir()
    for k in range(5):
        noise(64, 48 if k % 2 else 64, seed=k).save(photos / f"{k}.png")
    order = ["encode", str(photos), "-o", str(place), "-m", tiny, "--size", "64", "--store", "fp32", "--shard", "2",
             "--device", "cpu", "--dtype", "fp32"]  # fmt: skip
    first = bulk(capsys, *order)
    assert (first["pictures"], first["encoded"], first["set_aside"]) == (5, 5, 0)
    assert json.loads((place / "cache.json").read_text())["autoencoder"] == first["autoencoder"]
    assert json.loads((place / "receipt.json").read_text())["encoded"] == 5
    shards = sorted(place.glob("*.safetensors"))
    with safe_open(shards[0], "pt") as shard:
        assert shard.get_tensor("latents").shape[0] <= 2
    found = open_autoencoder(tiny, torch.device("cpu"), torch.float32)
    source = FolderSource(photos, 64, multiple=found.factor, captions=False)
    cache = LatentCache(place, source, found.digest)
    for size, members in source.buckets().items():
        pixels = torch.from_numpy(source.pixels(members)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
        with torch.no_grad():
            assert torch.allclose(cache.batch(members), found.encode(pixels), atol=1e-5), size

    kept = [(path, path.stat().st_mtime_ns) for path in shards]
    noise(64, 64, seed=9).save(photos / "9.png")
    again = bulk(capsys, *order)
    assert (again["pictures"], again["encoded"]) == (6, 1)
    assert [(path, path.stat().st_mtime_ns) for path, _ in kept] == kept


def test_latents_of_another_autoencoder_are_not_mixed_in(tmp_path, tiny, capsys):
    noise(64, 64).save(tmp_path / "1.png")
    order = ["encode", str(tmp_path), "-o", str(tmp_path / "l"), "--size", "64"]
    assert run([*order, "-m", tiny]) == 0
    assert run([*order, "-m", "pocket"]) != 0
    assert "another folder" in capsys.readouterr().err
