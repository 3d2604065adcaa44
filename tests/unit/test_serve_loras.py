"""LoRAs that clients send: what is kept, whose it is, and how it reaches who draws."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import zipfile
from io import BytesIO

import pytest
import torch
from safetensors.torch import save

from asgi import ask, asked, desk_of, scope_of
from helpers import noise
from hostile_weights import HOSTILE
from serving import png
from sfumato.checkpoint.header import read_header
from sfumato.checkpoint.layer import finite
from sfumato.checkpoint.numbers import BITS, check_numbers
from sfumato.checkpoint.source import DTYPES
from sfumato.errors import CheckpointError, InputError
from sfumato.serve import books, keys
from sfumato.serve.asked import files_of, loras_of
from sfumato.serve.job import now
from sfumato.serve.ledger import FAILED, LedgerError, Upload
from sfumato.serve.refusals import Refused
from sfumato.serve.store import LORA, new_id
from sfumato.serve.web import files
from sfumato.serve.web.answers import succeeded
from sfumato.serve.web.app import build
from shop import in_shop, record

EDGE = "xyzzy"
JSON = {"content_type": "application/json"}
FORM = {"content_type": f"multipart/form-data; boundary={EDGE}"}
RAW = {"content_type": "application/octet-stream"}
CPU = torch.device("cpu")
NAME = "dit.blocks.0.attention.to_q"


def tensors(value: float = 1.0, module: str = NAME, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{module}.lora_A.weight": torch.full((2, 8), value),
        f"{module}.lora_B.weight": torch.ones(8, 2),
        **more,
    }


LORA_FILE = save(tensors(), {"ss_output_name": "ink"})


def pickled() -> bytes:
    stream = BytesIO()
    torch.save(tensors(), stream)
    return stream.getvalue()


def zipped() -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", "b")
    return stream.getvalue()


NO_LORAS = {
    "a pickle": (pickled(), "a pickled checkpoint, which can run code"),
    "an old pickle": (b"\x80\x02}q\x00." + bytes(100), "a pickled checkpoint, which can run code"),
    "an archive": (zipped(), "a pickled checkpoint, which can run code"),
    "cut short": (LORA_FILE[:-1], "the file is damaged: it is cut short"),
    "cut in its header": (LORA_FILE[:100], "cut short in its header"),
    "no LoRA": (save({"a": torch.ones(3)}), "the file is no LoRA: none of its 1 tensors is a part of one"),
    "only alphas": (save({"a.alpha": torch.ones(())}), "the file is no LoRA"),
    "another kind": (save({"a.oft_blocks": torch.ones(3)}), "the file is of OFT, a kind of adapter that is not read"),
    "NaN": (save(tensors(float("nan"))), f"the file: {NAME}.lora_A.weight holds NaN or infinite values"),
    "infinity": (save(tensors(b=torch.tensor([1e9]).bfloat16() * 1e38)), "the file: b holds NaN or infinite values"),
    "a header too long": ((17 * 2**20).to_bytes(8, "little") + b"{" + bytes(99), "header has 17,825,792 bytes"),
}  # fmt: skip


@pytest.fixture
def desk(tmp_path):
    with desk_of(tmp_path) as found:
        yield found


def kept(desk) -> list[str]:
    return [path.name for path in (desk.settings.data / "uploads").iterdir()]


def sent(app, data: bytes = LORA_FILE, **headers) -> str:
    status, _, body = asked(app, "POST", "/v1/files", data, **(headers or RAW))
    assert status == 201, body
    return json.loads(body)["id"]


def form(*files: bytes) -> bytes:
    head = f'--{EDGE}\r\ncontent-disposition: form-data; name="file"; filename="ink.safetensors"\r\n\r\n'
    return b"".join(head.encode() + data + b"\r\n" for data in files) + f"--{EDGE}--\r\n".encode()


def refusal(app, path: str, body: bytes, **headers) -> tuple[int, dict]:
    status, _, answer = asked(app, "POST", path, body, **(headers or RAW))
    return status, json.loads(answer)["error"]


def wanting(request: dict) -> bytes:
    return json.dumps({"request": request}).encode()


# --- sent ----------------------------------------------------------------------------------------------------------


def test_a_lora_is_kept_listed_fetched_and_forgotten(desk):
    app = build(desk)
    names = [sent(app), sent(app, form(LORA_FILE), **FORM)]
    listed = json.loads(asked(app, "GET", "/v1/files")[2])["data"]
    assert [(each["id"], each["format"], each["bytes"]) for each in reversed(listed)] == [
        (name, "lora", len(LORA_FILE)) for name in names
    ]
    assert "width" not in listed[0]
    assert asked(app, "GET", f"/v1/files/{names[1]}")[2] == LORA_FILE
    for name in names:
        assert asked(app, "DELETE", f"/v1/files/{name}")[0] == 200
    assert kept(desk) == []


@pytest.mark.parametrize("case", [*NO_LORAS, *HOSTILE])
def test_of_what_is_no_lora_nothing_stays(desk, case):
    data, words = NO_LORAS[case] if case in NO_LORAS else (HOSTILE[case][0], "")
    status, error = refusal(build(desk), "/v1/files", data)
    assert status == 400 and words in error["message"], error
    assert (
        error["param"] == "file"
        and "\n" not in error["message"]
        and str(desk.settings.data) not in error["message"]
    )
    assert kept(desk) == [] and desk.ledger.uploads_of(keys.LOCAL, 9) == []


def test_who_takes_them_in_needs_no_torch(tmp_path):
    """The front stays small, whatever is sent."""
    for name, (data, _) in NO_LORAS.items():
        (tmp_path / name).write_bytes(data)
    script = (
        "import pathlib, sys\nfrom sfumato.errors import CheckpointError\nfrom sfumato.serve.web import app, files\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n    try:\n        files._look(path)\n"
        "    except CheckpointError:\n        pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == 0


def test_numbers_are_told_from_their_bits_as_by_torch(tmp_path):
    for name in BITS:
        dtype = DTYPES[name]
        for value in (1.0, torch.finfo(dtype).max, torch.inf, torch.nan):
            tensor = torch.full((5,), 1.0).to(dtype)
            tensor[3] = value
            (tmp_path / "a").write_bytes(save({"first": torch.ones(3), "it": tensor}))
            header = read_header(tmp_path / "a")
            if finite(tensor):
                check_numbers(tmp_path / "a", header)
            else:
                with pytest.raises(CheckpointError, match="it holds NaN"):
                    check_numbers(tmp_path / "a", header)


def test_sizes_have_limits(tmp_path, monkeypatch):
    big = save(tensors(padding=torch.zeros(2**18)))
    with desk_of(tmp_path, lora_size=2**20, body=2**16) as desk:
        app = build(desk)
        assert refusal(app, "/v1/files", big)[1]["code"] == "too_large"
        assert kept(desk) == []
        assert sent(app, save(tensors(padding=torch.zeros(2**17))))  # more than another body may have
        assert (
            refusal(app, "/v1/files", png(noise(256, 256)))[1]["message"]
            == "a picture or clip may have 65,536 bytes"
        )
        monkeypatch.setattr(books, "MOST_KEPT", 2**20)
        status, error = refusal(app, "/v1/files", save(tensors(padding=torch.zeros(2**17))))
        assert (status, error["code"]) == (413, "storage_quota")
        assert len(kept(desk)) == 1 and desk.books._arriving == {}


def test_a_whole_file_with_a_long_header_is_told_to_be_too_large(tmp_path):
    with desk_of(tmp_path, lora_size=2**20) as desk:
        data = save(tensors(), {"note": "x" * 2**21})
        assert refusal(build(desk), "/v1/files", data) == (
            413,
            {
                "message": "such a file may have 1,048,576 bytes",
                "type": "invalid_request_error",
                "param": None,
                "code": "too_large",
            },
        )
        assert kept(desk) == []


def test_a_form_has_one_file(desk):
    app = build(desk)
    text = f'--{EDGE}\r\ncontent-disposition: form-data; name="file"\r\n\r\nx\r\n--{EDGE}--\r\n'.encode()
    for body, words in (
        (form(), 'the form must have one file, called "file"'),
        (form(LORA_FILE, LORA_FILE), "give one file, not 2"),
        (text, "file must be a file"),
    ):
        status, error = refusal(app, "/v1/files", body, **FORM)
        assert (status, error["param"], error["message"]) == (400, "file", words)


def test_of_a_form_no_more_is_taken_than_may_be_kept(desk, monkeypatch):
    monkeypatch.setattr(books, "MOST_KEPT", 2**20)
    sent(build(desk), save(tensors(padding=torch.zeros(2**17))))
    data = form(save(tensors(padding=torch.zeros(2**20))))
    pieces, heard = [data[k : k + 2**16] for k in range(0, len(data), 2**16)], []

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        heard.append(message)

    asyncio.run(build(desk)(scope_of("POST", "/v1/files", **FORM), receive, send))
    assert heard[0]["status"] == 413 and json.loads(heard[1]["body"])["error"]["code"] == "storage_quota"
    assert len(data) - 2**16 * len(pieces) < 2**20 and len(kept(desk)) == 1


def test_a_temporary_disk_that_is_full_is_told_as_such(desk, monkeypatch):
    async def full(*args):
        raise OSError(28, "no space left")

    monkeypatch.setattr("starlette.datastructures.UploadFile.write", full)
    status, error = refusal(build(desk), "/v1/files", form(LORA_FILE), **FORM)
    assert (status, error["code"]) == (503, "storage_full") and kept(desk) == []


def test_a_server_may_take_none(tmp_path):
    with desk_of(tmp_path, lora_size=0) as desk:
        assert refusal(build(desk), "/v1/files", LORA_FILE)[0] == 403 and kept(desk) == []


def test_nothing_stays_where_the_ledger_or_the_disk_fails(desk, monkeypatch):
    def locked(*args):
        raise LedgerError("locked")

    monkeypatch.setattr(desk.ledger, "add_upload", locked)
    for data in (LORA_FILE, png(noise(64, 64))):
        assert refusal(build(desk), "/v1/files", data)[1]["code"] == "ledger_unavailable" and kept(desk) == []

    def full(*args):
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.replace", full)
    assert refusal(build(desk), "/v1/files", LORA_FILE)[1]["code"] == "storage_full" and kept(desk) == []


@pytest.mark.parametrize("size", [10, 3 * 2**20])
def test_of_a_client_that_goes_away_nothing_stays(desk, size):
    """Its body comes in pieces, and the last one never."""
    data = save(tensors(padding=torch.zeros(2**20)))[:size]
    pieces = [data[k : k + 2**16] for k in range(0, len(data), 2**16)]
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.disconnect"})
    seen = []

    async def receive():
        seen.append(len(kept(desk)))
        return messages.pop(0)

    async def send(message):
        pass

    asyncio.run(build(desk)(scope_of("POST", "/v1/files", **RAW), receive, send))
    assert max(seen) == (size > 2**20) and kept(desk) == [] and desk.books._arriving == {}


def waits(call, began, going):
    """The same, which does not return before `going`."""

    def run(*args):
        found = call(*args)
        began.release()
        assert going.wait(60)
        return found

    return run


async def acquired(began) -> None:
    async with asyncio.timeout(60):
        while not began.acquire(blocking=False):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("slow", ["replace", "add_upload"])
@pytest.mark.parametrize("data", [LORA_FILE, png(noise(64, 64))], ids=["lora", "picture"])
def test_of_a_request_that_is_cancelled_in_the_end_all_is_kept(desk, monkeypatch, slow, data):
    """The file under its name, and whose it is."""
    app, began, going = build(desk), threading.Semaphore(0), threading.Event()
    owner = os if slow == "replace" else desk.ledger
    monkeypatch.setattr(owner, slow, waits(getattr(owner, slow), began, going))

    async def story():
        task = asyncio.create_task(ask(app, "POST", "/v1/files", data, **RAW))
        await acquired(began)
        task.cancel()
        asyncio.get_running_loop().call_later(0.1, going.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(20):
            while not (found := await desk.books.write(desk.ledger.uploads_of, keys.LOCAL, 9)):
                await asyncio.sleep(0.01)
        assert [each.id for each in found] == kept(desk)

    asyncio.run(story())


def test_while_large_files_are_looked_at_others_go_on(desk, monkeypatch):
    app, began, going = build(desk), threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(files, "_look", waits(files._look, began, going))

    async def story():
        tasks = [asyncio.create_task(ask(app, "POST", "/v1/files", LORA_FILE, **RAW)) for _ in range(2)]
        await acquired(began)
        await asyncio.sleep(0.1)
        try:
            async with asyncio.timeout(20):
                status, *_ = await ask(app, "POST", "/v1/files", png(noise(64, 64)), **RAW)
        finally:
            going.set()
        assert [status, *[(await task)[0] for task in tasks]] == [201, 201, 201]

    asyncio.run(story())


# --- asked for -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/v1/jobs", "/v1/estimate", "/v1/videos", "/v1/videos/estimate", "/v1/preflight"]
)
def test_a_lora_of_another_key_is_not_there(desk, path):
    app, theirs = build(desk), new_id("file")
    desk.books.ledger.add_upload(Upload(theirs, "other", LORA, 1, 0, 0, now()))
    names = (theirs, new_id("file"))
    told = [refusal(app, path, wanting({"loras": [{"name": name}]}), **JSON) for name in names]
    for name, (status, error) in zip(names, told, strict=True):
        assert (status, error["param"]) == (400, "loras") and name in error["message"]
        error["message"] = error["message"].replace(name, "ID")
    assert told[0] == told[1]


def test_a_file_counts_where_it_belongs(desk):
    app = build(desk)
    lora, picture = sent(app), sent(app, png(noise(64, 64)))
    for field, request in (("image", {"image": lora}), ("loras", {"loras": [picture]})):
        status, error = refusal(app, "/v1/jobs", wanting(request), **JSON)
        assert (status, error["param"]) == (400, field) and "of the format" in error["message"]


@pytest.mark.parametrize(
    "loras",
    [None, 3, "file_" + "0" * 32, {"name": "x"}, [3, None, [], {"name": 3}, {}, "ink", {"name": "file_x"}]],
)
def test_what_names_no_file_is_left_to_the_request(loras):
    assert loras_of({"loras": loras}) == []


@pytest.mark.parametrize("pictures", [17, 16, 3])
def test_of_too_many_files_the_field_of_the_first_too_many_is_told(pictures):
    names = [new_id("file") for _ in range(17)]
    controls = [{"name": "canny", "image": name} for name in names[:pictures]]
    with pytest.raises(InputError, match="at most 16 files") as error:
        files_of({"controls": controls, "loras": names[pictures:]})
    assert error.value.argument == ("controls" if pictures == 17 else "loras")


@pytest.mark.parametrize(
    "door",
    [
        "/v1/jobs",
        "/v1/videos",
        "/v1/estimate",
        "/v1/preflight",
        "/sdapi/v1/txt2img",
        "/v1/images/generations",
    ],
)
def test_who_draws_is_told_where_it_lies(desk, monkeypatch, door):
    """By every door; and no byte of it is carried there."""
    app, heard = build(desk), []
    name = sent(app)
    facts = {"name": "pocket", "preset": {"size": [64, 64], "steps": 4}, "schedules": [], "eta_samplers": []}

    class Device:
        async def check(self, message, parts):
            heard.append((message, parts))
            raise InputError("enough")

    async def device():
        return Device()

    desk.floor.devices[0].facts = [facts]
    monkeypatch.setattr(desk.floor, "some_device", device)
    named = {"loras": [{"name": name}]}
    body = {"prompt": f"a cat <lora:{name}:0.8>"} if "sdapi" in door else {"request": named}
    body = {"prompt": "a cat", **named} if "images" in door else body
    assert refusal(app, door, json.dumps(body).encode(), **JSON)[1]["message"] == "enough"
    [(message, parts)] = heard
    assert message["loras"] == {name: str(desk.settings.data / "uploads" / name)}
    assert message["files"] == [] == parts
    asked(app, "DELETE", f"/v1/files/{name}")
    assert refusal(app, door, json.dumps(body).encode(), **JSON)[1]["param"] in ("loras", "prompt")


def test_a_job_goes_to_its_worker_with_its_loras_and_ends_where_one_is_gone(tmp_path):
    there, gone = new_id("file"), new_id("file")

    async def story(shop):
        await shop.books.keep(Upload(there, "a", LORA, 1, 0, 0, now()), b"x")
        told = []
        shop.workers[-1].send = lambda message, parts=(): told.append((message, list(parts)))
        first = shop.accept(1)
        first.record.request["loras"] = [there]
        await shop.draws(first)
        while not told:
            await asyncio.sleep(0.01)
        [(message, parts)] = told
        assert message["loras"] == {there: str(tmp_path / "uploads" / there)} and parts == []
        second = shop.accept(2)
        second.record.request["loras"] = [{"name": gone, "weight": 2}]
        async with asyncio.timeout(60):
            await second.ended.wait()
        assert second.record.state == FAILED and second.record.error["code"] == "file_gone"

    in_shop(tmp_path, story)


def test_what_an_open_job_needs_outlives_its_time(tmp_path):
    names = [new_id("file") for _ in range(3)]

    async def story(shop):
        for name, kind in zip(names, (LORA, "png", LORA), strict=True):
            await shop.books.keep(Upload(name, "a", kind, 1, 0, 0, now() - 1000), b"x")
            os.utime(tmp_path / "uploads" / name, (now() - 1000,) * 2)
        live = shop.accept(1)
        live.record.request["loras"] = [names[0]]
        live.record.options["files"] = [names[1]]
        await shop.books.sweep(500, live.needs)
        assert [shop.books.store.upload(name) is not None for name in names] == [True, True, False]
        assert {each.id for each in shop.books.ledger.uploads_of("a", 9)} == set(names[:2])

    in_shop(tmp_path, story)


def test_one_that_overflows_is_its_client_s_fault():
    for param, status in (("loras", 400), (None, 500)):
        error = {"code": "bad_checkpoint", "message": "with file_… at weight 1", "param": param}
        with pytest.raises(Refused) as refused:
            succeeded(record(1, state=FAILED, error=error))
        assert (refused.value.status, refused.value.param) == (status, param)
