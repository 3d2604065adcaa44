"""The OpenAPI document's end: what can be refused and how, who is let in, and what parameters hold.

The framework knows the routes. What stands before them (`guard.py`), and what becomes of errors (`app.py`), it does not
know, and it promises a 422 of its own that is never sent.
"""

from __future__ import annotations

from typing import Any

from sfumato.serve.web.guard import PUBLIC, SUBMISSIONS

REFUSALS = {  # status → when
    400: "what was sent is wrong; `param` names the field",
    401: "no key, or none that is in use",
    402: "the key's budget does not cover it",
    403: "not for this key; or not asked by this server's own address",
    404: "there is no such thing, or it is another's",
    408: "the body took too long",
    410: "it is not kept any more",
    413: "more bytes than a request may have, or a key may keep",
    415: "a body of another media type",
    422: "the idempotency key was used for another body; or the job was cancelled while it was waited for",
    429: "too many jobs, for now; Retry-After says when to come back",
    503: "not now: ledger, disk, worker or memory; Retry-After says when to come back",
    504: "the job was not done before its deadline",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field that it is about"},
                "code": {"type": "string", "description": "stable"},
            },
        }
    },
}
PARAMETERS: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "before": {"type": "string", "description": "the id of a job, or a time in seconds"},
    "since": {"type": "string", "format": "date"},
    "until": {"type": "string", "format": "date"},
    "number": {"type": "integer", "minimum": 0},
    "job": {"type": "string", "pattern": "^job_[0-9a-f]{32}$"},
    "file": {"type": "string", "pattern": "^file_[0-9a-f]{32}$"},
}
WAITED = ("/v1/images/", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")  # answered when the pictures are there
STATELESS = ("/v1/models", "/sdapi/v1/", "/metrics")  # told from memory, but for what is waited for
KEYS = {
    "key": {"type": "http", "scheme": "bearer", "description": "sfk_…, of `sfumato keys add`"},
    "password": {"type": "http", "scheme": "basic", "description": "any name, and the key as its password"},
}


def finished(document: dict[str, Any], guarded: bool) -> dict[str, Any]:
    """The framework's document with all of it. guarded: whether the server has keys."""
    parts = document.setdefault("components", {})
    parts["schemas"] = {"Error": ERROR}
    parts["securitySchemes"] = KEYS
    document["security"] = [{name: []} for name in KEYS] if guarded else [{}, *({name: []} for name in KEYS)]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path in PUBLIC:
                operation["security"] = []
            for parameter in operation.get("parameters", ()):
                known = PARAMETERS.get(parameter["name"])
                if known is not None:
                    parameter["schema"] = known
            answers = operation["responses"]
            answers.pop("422", None)
            for status in _refusals(path, method, operation):
                answers.setdefault(str(status), _answer(status))
            operation["responses"] = dict(sorted(answers.items()))
    return document


def _answer(status: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "description": REFUSALS[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    if status in (429, 503, 504):
        described = {"description": "seconds, at most 120", "schema": {"type": "integer"}}
        found["headers"] = {"Retry-After": described}
    return found


def _refusals(path: str, method: str, operation: dict[str, Any]) -> set[int]:
    """What an operation may say no with."""
    found = {403}
    waited = path.startswith(WAITED)
    if path in PUBLIC:
        return found
    found.add(401)
    if waited or not path.startswith(STATELESS):
        found.add(503)
    if "requestBody" in operation:
        found |= {400, 408, 413, 415}
    if any(each["in"] == "query" or each["name"] == "number" for each in operation.get("parameters", ())):
        found.add(400)
    if any(each["in"] == "path" for each in operation.get("parameters", ())):
        found.add(404)
    if path.endswith("/{number}"):
        found.add(410)
    if method == "post" and (path in SUBMISSIONS or path.endswith(("/estimate", "/preflight", "/options"))):
        found.add(404)  # no such model
    if path == "/v1/jobs":
        found.add(404)  # no such model; or no such job to go on from
    if path in SUBMISSIONS and method == "post":
        found |= {402, 429}
        if path.startswith("/v1/"):
            found.add(422)
    if waited:
        found |= {410, 504}
    if path == "/v1/files/{file}" and method == "get":
        found.add(400)
    return found
