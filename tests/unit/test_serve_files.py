"""Files to begin with: which are kept, for how long, and how their owner finds and forgets them."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace

import pytest

from asgi import asked, desk_of
from helpers import noise
from serving import png
from sfumato.serve import keys
from sfumato.serve.books import RETRY_WINDOW
from sfumato.serve.job import now
from sfumato.serve.ledger import LedgerError, Upload
from sfumato.serve.refusals import Refused
from sfumato.serve.store import new_id
from sfumato.serve.web.app import build
from shop import Shop, ends, in_shop, record

EDGE = "xyzzy"
JSON = {"content_type": "application/json"}
FORM = {"content_type": f"multipart/form-data; boundary={EDGE}"}
PICTURE = png(noise(64, 64))


def form(**texts: str) -> bytes:
    """A picture and text fields."""
    head = f'--{EDGE}\r\ncontent-disposition: form-data; name="'.encode()
    parts = [head + f'{name}"\r\n\r\n{value}\r\n'.encode() for name, value in texts.items()]
    parts.append(head + b'image"; filename="a.png"\r\n\r\n' + PICTURE + b"\r\n")
    return b"".join(parts) + f"--{EDGE}--\r\n".encode()


BROUGHT = {
    "/v1/images/edits": (form(prompt="x"), FORM),
    "/sdapi/v1/img2img": (json.dumps({"init_images": [base64.b64encode(PICTURE).decode()]}).encode(), JSON),
    "/v1/videos": (form(request="{}"), FORM),
    "/v1/videos/estimate": (form(request="{}"), FORM),
}


@pytest.fixture
def desk(tmp_path):
    with desk_of(tmp_path) as found:
        found.floor.devices[0].facts = [{"name": "pocket", "preset": {"size": [64, 64], "steps": 4}}]
        yield found


def kept(desk) -> list[str]:
    return sorted(path.name for path in (desk.settings.data / "uploads").iterdir())


@pytest.mark.parametrize("path", BROUGHT)
def test_of_what_is_refused_nothing_is_kept(desk, path, monkeypatch):
    seen = []

    async def expected(ask, files, parts):
        seen.append(parts)
        raise Refused(400, "bad_input", "no")

    monkeypatch.setattr(desk, "expected", expected)
    body, kind = BROUGHT[path]
    assert asked(build(desk), "POST", path, body, **kind)[0] == 400
    assert seen == [[PICTURE]] and kept(desk) == []
    assert desk.ledger.uploads_of(keys.LOCAL, 9) == []


def test_what_is_wrong_with_a_file_is_told(desk):
    app = build(desk)

    def said(path: str, body: bytes, **headers: str) -> str:
        status, _, answer = asked(app, "POST", path, body, **headers)
        assert status in (400, 415)
        return json.loads(answer)["error"]["message"]

    def part(name: str, value: bytes, file: str = "") -> bytes:
        head = f'--{EDGE}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        return head + value + f"\r\n--{EDGE}--\r\n".encode()

    text = '; filename="a.txt"'
    assert said("/v1/videos", part("image", b"x"), **FORM) == "image must be a file"
    assert "is no clip; mp4" in said("/v1/videos", part("clip", b"x", text), **FORM)
    assert 'called "file"' in said("/v1/files", part("image", PICTURE, text), **FORM)
    assert "with a Content-Type such as image/png" in said("/v1/files", b"{}", **JSON)
    assert "no picture, clip or LoRA; PNG" in said("/v1/files", part("file", b"x", text), **FORM)
    assert "the file is empty; PNG" in said("/v1/files", part("file", b"", text), **FORM)


def test_what_is_a_job_s_alone_goes_with_it(tmp_path):
    names = [new_id("file") for _ in range(2)]

    async def story(shop: Shop) -> None:
        for name in names:
            await shop.books.keep(Upload(name, "a", "png", 1, 8, 8, now()), b"x", alone=name == names[0])
        live = shop.accept(1)
        live.record.options.update(files=names, forget=names[:1])
        worker = await shop.draws(live)
        worker.done(live.id)
        await ends(live)
        while shop.books.store.get(names[0]) is not None:
            await shop.books.work(lambda: None)
        assert shop.books.store.get(names[1]) == b"x"

    in_shop(tmp_path, story)


TAKES = {
    "expected": {"seconds": 1.0, "pictures": 1, "memory": 1, "pixel_steps": 4, "size": [64, 64]}, "sampler_steps": 4,
    "tune": [], "notes": [],
}  # fmt: skip


@pytest.fixture
def app(desk, monkeypatch):
    """It takes all that is asked of it, and draws nothing."""

    async def expected(ask, files, parts):
        return TAKES

    monkeypatch.setattr(desk, "expected", expected)
    return build(desk)


@pytest.mark.parametrize("path", ["/v1/images/edits", "/sdapi/v1/img2img"])
def test_nobody_but_the_job_that_it_came_with_knows_of_a_file(desk, app, path):
    body, kind = BROUGHT[path]
    asked(app, "POST", path, body, **kind, idempotency_key="once")
    asked(app, "POST", path, body, **kind, idempotency_key="once")
    [live] = desk.floor.live.values()
    assert kept(desk) == live.files == live.forget
    assert json.loads(asked(app, "GET", "/v1/files")[2])["data"] == []
    for method in ("GET", "DELETE"):
        assert asked(app, method, f"/v1/files/{live.files[0]}")[0] == 404
    again = json.dumps({"request": live.record.request}).encode()
    status, _, answer = asked(app, "POST", "/v1/jobs", again, **JSON)
    assert status == 400 and json.loads(answer)["error"]["param"] == "image"
    assert kept(desk) == live.files


@pytest.mark.parametrize("away", [("accept",), ("accept", "drop_upload")])
@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/videos"])
def test_nothing_is_kept_where_the_ledger_fails(desk, app, monkeypatch, path, away):
    def locked(*args):
        raise LedgerError("locked")

    for name in away:
        monkeypatch.setattr(desk.ledger, name, locked)
    body, kind = BROUGHT[path]
    status, _, answer = asked(app, "POST", path, body, **kind, idempotency_key="once")
    assert status == 503 and json.loads(answer)["error"]["code"] == "ledger_unavailable"
    assert kept(desk) == []


def test_a_key_finds_its_files_by_pages(desk):
    app = build(desk)
    sent = [
        json.loads(asked(app, "POST", "/v1/files", PICTURE, content_type="image/png")[2]) for _ in range(3)
    ]
    desk.ledger.add_upload(Upload(new_id("file"), "other", "png", 1, 8, 8, now()))
    page = json.loads(asked(app, "GET", "/v1/files?limit=2")[2])
    assert page["data"] == [sent[2], sent[1]] and page["has_more"]
    for place in (sent[1]["id"], sent[1]["created"]):
        rest = json.loads(asked(app, "GET", f"/v1/files?before={place}")[2])
        assert rest["data"] == [sent[0]] and not rest["has_more"]
    assert asked(app, "GET", "/v1/files?before=x")[0] == 400
    assert asked(app, "GET", f"/v1/files?before={new_id('file')}")[0] == 404
    assert asked(app, "DELETE", f"/v1/files/{sent[0]['id']}")[0] == 200
    assert len(json.loads(asked(app, "GET", "/v1/files")[2])["data"]) == 2 == len(kept(desk))


def test_a_sweep_forgets_who_was_answered_long_ago(desk):
    for number, age in ((1, 0), (2, RETRY_WINDOW + 1)):
        job = desk.ledger.accept(replace(record(number), made=now() - age))
        desk.ledger.answered(job.id)
    asyncio.run(desk.books.sweep(1000))
    with desk.ledger._transaction() as run:
        assert [row.job for row in run.execute(desk.ledger.answers.select())] == [record(1).id]


@pytest.mark.parametrize(
    "request_, field",
    [
        ({"mask": "file_x", "image": None}, "mask"),
        ({"clip": "file_x"}, "clip"),
        ({"controls": [{"name": "depth", "image": "file_x"}]}, "controls"),
        ({"image": "file_x"}, "image"),
    ],
)
def test_a_file_that_is_not_there_is_told_by_its_field(desk, request_, field):
    status, _, body = asked(
        build(desk), "POST", "/v1/jobs", json.dumps({"request": request_}).encode(), **JSON
    )
    assert status == 400 and json.loads(body)["error"]["param"] == field
