"""The OpenAPI document says what is so: who is let in, what is sent, what is refused, and bodies that are taken."""

from __future__ import annotations

import json
import re

import pytest

from asgi import asked, desk_of
from sfumato.sampling import SAMPLERS
from sfumato.serve import keys
from sfumato.serve.web.app import build
from sfumato.serve.web.document import REFUSALS
from sfumato.serve.web.guard import PUBLIC, SUBMISSIONS
from sfumato.serve.web.webui_body import Body
from sfumato.serve.web.webui_schema import GREY, fields

IDEMPOTENT = {path for path in SUBMISSIONS if path.startswith("/v1/")}
FACTS = [{
    "name": "pocket", "preset": {"size": [128, 128]}, "samplers": list(SAMPLERS), "schedules": ["karras"],
    "eta_samplers": [],
}]  # fmt: skip


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with desk_of(tmp_path_factory.mktemp("document")) as desk:
        yield build(desk)


@pytest.fixture(scope="module")
def document(app):
    return json.loads(asked(app, "GET", "/openapi.json")[2])


@pytest.fixture(scope="module")
def operations(document):
    """By method and path."""
    return {(m, path): op for path, item in document["paths"].items() for m, op in item.items()}


def test_what_is_never_sent_is_not_promised(document, operations):
    assert set(document["components"]["schemas"]) == {"Error"}
    promised = {path for (method, path), op in operations.items() if "422" in op["responses"]}
    assert promised == IDEMPOTENT
    for op in operations.values():
        for status, answer in op["responses"].items():
            if int(status) >= 400 and answer["description"] != "not now":
                assert answer["description"] == REFUSALS[int(status)]
                assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Error")


def test_submissions_declare_what_they_are_refused_with(operations):
    for path in SUBMISSIONS:
        found = set(operations["post", path]["responses"])
        assert {"400", "401", "402", "404", "408", "413", "415", "429", "503"} <= found, path
        assert operations["post", path]["responses"]["429"]["headers"].keys() == {"Retry-After"}
    assert not {"402", "422", "429"} & set(operations["get", "/v1/jobs"]["responses"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/jobs?limit=x", b"", 400),
        ("GET", "/v1/jobs?before=job_" + "0" * 32, b"", 404),
        ("GET", "/v1/jobs/job_" + "0" * 32, b"", 404),
        ("GET", "/v1/usage?since=x", b"", 400),
        ("DELETE", "/v1/files/file_" + "0" * 32, b"", 404),
        ("POST", "/v1/jobs", b"{", 400),
        ("POST", "/v1/preflight", b'{"request": {}, "model": "none"}', 404),
        ("POST", "/v1/files", b"", 415),
        ("GET", "/v1/models/none", b"", 404),
        ("GET", "/readyz", b"", 503),
    ],
)
def test_what_is_sent_is_declared(app, operations, method, path, body, status):
    if "model" in path and "preflight" not in path:
        with_facts(app)
    kind = {"content_type": "application/json"} if body else {}
    assert asked(app, method, path, body, **kind)[0] == status
    pattern = re.sub(r"(job|file)_0+", r"{\1}", path.partition("?")[0]).replace(
        "/models/none", "/models/{model}"
    )
    assert str(status) in operations[method.lower(), pattern]["responses"]


def with_facts(app) -> None:
    """As if a worker had said what it has."""
    app.full.__self__.floor.devices[0].facts = FACTS


def test_who_is_let_in_is_said(document, operations, tmp_path):
    schemes = document["components"]["securitySchemes"]
    assert {(each["type"], each["scheme"]) for each in schemes.values()} == {
        ("http", "bearer"),
        ("http", "basic"),
    }
    assert {} in document["security"], "without keys nobody needs one"
    for (_, path), op in operations.items():
        assert (op.get("security") == []) == (path in PUBLIC)
    keys.add(tmp_path / "keys.json", "a")
    with desk_of(tmp_path, keys=tmp_path / "keys.json") as desk:
        guarded = json.loads(asked(build(desk), "GET", "/openapi.json")[2])
    assert guarded["security"] == [{name: []} for name in schemes]


def test_pictures_clips_and_events_are_declared_as_what_they_are(operations):
    def kinds(path: str, method: str = "get", status: str = "200") -> set[str]:
        return set(operations[method, path]["responses"][status]["content"])

    pictures = {"image/png", "image/jpeg", "image/webp"}
    assert kinds("/v1/jobs/{job}/pictures/{number}") == pictures
    assert kinds("/v1/jobs/{job}/thumbs/{number}") == {"image/webp"}
    assert kinds("/v1/videos/{job}/clips/{number}") == {"video/mp4", "video/webm", "image/webp", "image/gif"}
    assert kinds("/v1/jobs/{job}/events") == kinds("/v1/videos/{job}/events") == {"text/event-stream"}
    assert kinds("/v1/files/{file}") > pictures and kinds("/metrics") == {"text/plain"}
    assert kinds("/v1/images/generations", "post") == {"application/json", "text/event-stream"}
    assert kinds("/v1/jobs", "post", "202") == {"application/json"}


def test_every_body_has_an_example_with_all_that_it_needs(operations):
    bodies = [
        (method, path, kind, body)
        for (method, path), op in operations.items() if "requestBody" in op
        for kind, body in op["requestBody"]["content"].items()
    ]  # fmt: skip
    assert {("post", "/v1/images/edits"), ("post", "/v1/files"), ("post", "/v1/videos")} <= {
        b[:2] for b in bodies
    }
    for _, path, kind, body in bodies:
        example, schema = body["example"], body["schema"]
        if schema.get("type") == "object":
            assert set(schema.get("required", ())) <= set(example) <= set(schema["properties"]), (path, kind)
    form = dict(operations["post", "/v1/images/edits"]["requestBody"]["content"])["multipart/form-data"]
    assert form["schema"]["required"] == ["prompt", "image"] and form["example"]["image"]
    assert (
        "image"
        in operations["post", "/v1/videos"]["requestBody"]["content"]["multipart/form-data"]["example"]
    )


# --- the web UI's fields ------------------------------------------------------------


class Watched(Body):
    """A body that remembers what it asks for."""

    def __init__(self, body: dict):
        self.taken: set[str] = set()
        super().__init__(FACTS, body, "pocket")

    def _take(self, name, default):
        self.taken.add(name)
        return super()._take(name, default)


@pytest.mark.parametrize("pictures", [False, True])
def test_the_fields_that_are_listed_are_those_that_are_taken(pictures):
    listed = set(fields(pictures)["properties"])
    start = {"init_images": [GREY]} if pictures else {}
    body = Watched({"prompt": "x", **start})
    body.request(pictures)
    assert body.taken <= listed, body.taken - listed
    for name in listed - set(start):
        Body(FACTS, {**start, name: None}, "pocket").request(pictures)  # null asks for nothing
    for name, value in (
        ("steps", 3),
        ("cfg_scale", 2),
        ("width", 64),
        ("s_noise", 1),
        ("send_images", False),
    ):
        assert name in listed
        Body(FACTS, {**start, name: value}, "pocket").request(pictures)
    assert ("init_images" in listed) == pictures == ("init_images" in fields(pictures).get("required", ()))
    assert ("enable_hr" in listed) != pictures
