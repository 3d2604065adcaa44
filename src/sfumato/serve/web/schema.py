"""A request as JSON schema, made from the dataclass that all of Sfumato shares, so that the two cannot differ."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from starlette.responses import Response

from sfumato import parts
from sfumato.types import Request

FILE = {
    "type": "string",
    "pattern": "^file_[0-9a-f]{32}$",
    "description": "the id of an uploaded picture, or clip",
}
PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
}
EXAMPLE = {"prompt": "a red metal sphere behind a small blue cube", "seed": 7, "steps": 12}


class _Picture:
    """Stands for a PIL picture in the annotations."""


def request_schema() -> dict[str, Any]:
    """Of `sfumato.Request`, where pictures and the clip are ids of uploads."""
    return {**_object(Request), "example": EXAMPLE}


def _object(kind: type) -> dict[str, Any]:
    names = {**vars(parts), "Image": _Picture, "Any": Any}
    hints = typing.get_type_hints(kind, localns=names)
    fields = dataclasses.fields(kind)
    answer: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {f.name: _schema(hints[f.name]) for f in fields},
    }
    required = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return answer | ({"required": required} if required else {})


def _schema(hint: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        found = [_schema(each) for each in inner if each is not type(None)]
        return {"anyOf": [*found, {"type": "null"}]} if type(None) in inner else {"anyOf": found}
    if hint is _Picture or hint is parts.Clip:
        return FILE
    if hint in PLAIN:
        return dict(PLAIN[hint])
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        if typing.get_origin(inner[0]) is tuple:  # names with factors, which JSON has as an object
            return {"type": "object", "additionalProperties": {"type": "number"}}
        return {"type": "array", "items": _schema(inner[0])}
    if origin is tuple:
        return {
            "type": "array",
            "items": _schema(inner[0]),
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if hint is parts.LoraUse:
        use = _object(parts.LoraUse)
        use["properties"]["name"]["description"] = "of /v1/models, or the id of an uploaded LoRA"
        return use
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint))
    return {}


BINARY = {"type": "string", "format": "binary"}


def sends(*kinds: str, status: int = 200) -> dict[str, Any]:
    """Options of a route that answers with one of these media types, of which only JSON is told by itself."""
    found = {
        kind: {"schema": {"type": "object"} if kind == "application/json" else _plain(kind)} for kind in kinds
    }
    return {"response_class": Response, "responses": {status: {"content": found}}}


def _plain(kind: str) -> dict[str, Any]:
    return {"type": "string"} if kind.startswith("text/") else BINARY


def described(schema: dict[str, Any], example: Any, kind: str = "application/json") -> dict[str, Any]:
    """What a route says of its body in the OpenAPI document."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema, "example": example}}}}
