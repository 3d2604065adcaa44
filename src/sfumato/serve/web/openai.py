"""What OpenAI's image clients speak: /v1/images/generations, /v1/images/edits, /v1/models.

Fields that mean nothing here are refused by name, unless they have the value that asks for nothing. Beside OpenAI's
own, the plain fields of a `sfumato.Request` may be given, as `extra_body` in its Python client.
"""

from __future__ import annotations

import base64
import io
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import FormData
from starlette.responses import Response

from sfumato import checks
from sfumato.serve.desk import Ask, Brought, Desk
from sfumato.serve.job import Live
from sfumato.serve.keys import Key
from sfumato.serve.ledger import Record
from sfumato.serve.refusals import Refused, bad
from sfumato.serve.store import MEDIA
from sfumato.serve.web.answers import Answer, ended, event, streamed, succeeded
from sfumato.serve.web.body import (
    digest_of,
    file_of,
    form_body,
    idempotency_of,
    is_retry,
    json_body,
    look_at_picture,
    may_retry,
)
from sfumato.serve.web.schema import BINARY, described, sends
from sfumato.storage import strict_json

MOST = 10  # pictures
QUALITY = {
    "low": 0.5,
    "standard": 1.0,
    "medium": 1.0,
    "auto": 1.0,
    "high": 2.0,
    "hd": 2.0,
}  # of the model's steps
IGNORED = {"user", "safety_identifier", "moderation"}  # nothing here is moderated, and users are keys
NEUTRAL = {  # field → values that ask for nothing we do not do
    "background": ("auto", "opaque"),
    "response_format": ("b64_json",),
    "output_compression": (100,),
    "input_fidelity": ("low",),
    "style": ("natural", "vivid"),
}
OURS = {  # plain fields of a request
    "seed": int, "steps": int, "guidance": float, "sampler": str, "schedule": str, "negative": str, "strength": float,
    "fit": str, "eta": float, "clip_skip": int, "reuse": int, "loras": list,
}  # fmt: skip
EXAMPLE = {"prompt": "a red metal sphere behind a small blue cube", "n": 2, "size": "128x128"}
EDIT = {"prompt": "two yellow spheres", "image": "start.png"}


@dataclass(frozen=True)
class Wanted:
    """What a body of OpenAI's asks for, of text to image or of an edit."""

    model: str
    request: dict[str, Any]
    format: str
    size: str
    quality: str
    stream: bool
    partial: int
    brought: Brought = field(default_factory=dict)


def routes(desk: Desk) -> APIRouter:
    """All of them, on one desk."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    ours = {
        name: {"type": {int: "integer", float: "number", str: "string", list: "array"}[kind]}
        for name, kind in OURS.items()
    }
    fields = {
        "prompt": {"type": "string", "maxLength": checks.MAX_PROMPT},
        "model": {"type": "string"},
        "n": {"type": "integer", "minimum": 1, "maximum": MOST},
        "size": {"type": "string", "pattern": r"^(auto|\d+x\d+)$"},
        "quality": {"type": "string", "enum": list(QUALITY)},
        "output_format": {"type": "string", "enum": list(MEDIA)},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
        **ours,
        **{name: {"enum": list(values)} for name, values in NEUTRAL.items()},
        **{name: {"type": "string"} for name in sorted(IGNORED)},
    }
    schema = {"type": "object", "required": ["prompt"], "properties": fields}
    files = dict.fromkeys(("image", "mask"), BINARY)
    form = {"type": "object", "required": ["prompt", "image"], "properties": {**fields, **files}}
    both = sends("application/json", "text/event-stream")

    @router.get("/models", summary="The models that are served")
    async def models() -> Response:
        return Answer({"object": "list", "data": [_model(desk, facts) for facts in desk.facts]})

    @router.get("/models/{model}", summary="One model: its preset, LoRAs and ControlNets")
    async def model(model: str) -> Response:
        for facts in desk.facts:
            if facts["name"] == model:
                return Answer(_model(desk, facts))
        raise Refused(404, "model_not_found", f"there is no model {checks.shown(model)}", param="model")

    @router.post(
        "/images/generations",
        summary="Pictures from a prompt",
        openapi_extra=described(schema, EXAMPLE),
        **both,
    )
    async def generations(request: Request) -> Response:
        body, digest = await json_body(request)
        return await _drawn(desk, request, _wanted(desk, body), digest, "image_generation")

    @router.post("/images/edits", summary="A picture drawn over, or inside a mask",
                 openapi_extra=described(form, EDIT, "multipart/form-data"), **both)  # fmt: skip
    async def edits(request: Request) -> Response:
        body = await form_body(request)
        image, mask = await file_of(body, "image", "image[]"), await file_of(body, "mask")
        if image is None:
            raise bad("an edit needs an image", "image")
        text = _texts(body)
        wanted = _wanted(desk, text)
        digest = digest_of(text, image, mask or b"")
        key: Key = request.state.key
        hole = await desk.books.work(_hole, image, mask)
        request_, brought = dict(wanted.request), {}
        for name, data in (("image", image), ("mask", hole)):
            if data is not None:
                upload = await look_at_picture(desk.books, key, data, name)
                request_[name], brought[upload.id] = upload.id, (upload, data)
        if "size" in request_:
            request_.setdefault("fit", "cover")
        wanted = replace(wanted, request=request_, brought=brought)
        return await _drawn(desk, request, wanted, digest, "image_edit")

    return router


def _model(desk: Desk, facts: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's clients read it, with all that is known. lora_bytes: of the largest LoRA that may be sent for it."""
    known = {"id": facts["name"], "object": "model", "created": 0, "owned_by": "sfumato", **facts}
    takes = known.pop("takes_loras", False)
    return {**known, "lora_bytes": desk.settings.lora_size if takes else 0}


def _texts(form: FormData) -> dict[str, Any]:
    """The text fields of a form as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str):
            if name not in ("image", "image[]", "mask"):
                raise bad(f"unknown file {checks.shown(name)}; an edit has image and mask", name)
            continue
        if name in found:
            raise bad(f"give one {checks.shown(name)}, not several", name)
        if name == "stream":
            found[name] = _flag(name, value)
            continue
        if name == "loras":
            found[name] = _list(name, value)
            continue
        kind = OURS.get(name, int if name in ("n", "partial_images", "output_compression") else str)
        try:
            found[name] = kind(value)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise bad(f"{name} must be {number}, not {checks.shown(value)}", name) from None
    return found


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise bad(f"{name} must be true or false, not {checks.shown(text)}", name)
    return text.lower() == "true"


def _list(name: str, text: str) -> list[Any]:
    """What a field of a form holds as JSON."""
    try:
        found = strict_json(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise bad(f"{name} must be a list as JSON, not {checks.shown(text)}", name)
    return found


def _wanted(desk: Desk, body: dict[str, Any]) -> Wanted:
    """The fields of a body, each checked and none passed over."""
    body = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    model = body.pop("model", desk.settings.models[0].name)
    if not isinstance(model, str):
        raise bad("model must be a name", "model")
    prompt = body.pop("prompt", None)
    if not isinstance(prompt, str):
        raise bad("prompt must be text", "prompt")
    count = body.pop("n", 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise bad(f"n must be between 1 and {MOST}, not {checks.shown(count)}", "n")
    request: dict[str, Any] = {"prompt": prompt, "count": count}
    size = body.pop("size", "auto")
    if size != "auto":
        match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", size, re.ASCII) if isinstance(size, str) else None
        if match is None:
            raise bad(f"size must be auto or such as 512x512, not {checks.shown(size)}", "size")
        request["size"] = [int(match[1]), int(match[2])]
    quality = _one_of(body, "quality", QUALITY, "auto")
    kind = _one_of(body, "output_format", MEDIA, "png")
    partial, stream = body.pop("partial_images", 0), body.pop("stream", False)
    if isinstance(partial, bool) or not isinstance(partial, int) or not 0 <= partial <= 3:
        raise bad(f"partial_images must be between 0 and 3, not {checks.shown(partial)}", "partial_images")
    if not isinstance(stream, bool):
        raise bad("stream must be true or false", "stream")
    for name, values in NEUTRAL.items():
        if name in body and (given := body.pop(name)) not in values:
            allowed = (
                checks.either([*map(str, values[:-1]), str(values[-1])]) if len(values) > 1 else values[0]
            )
            raise bad(f"{name} can only be {allowed} here, not {checks.shown(given)}", name)
    for name in [name for name in body if name in OURS]:
        request[name] = body.pop(name)
    if body:
        name = sorted(body)[0]
        raise bad(f"unknown field {checks.shown(name)}", name)
    if QUALITY[quality] != 1 and "steps" not in request:
        facts = next((facts for facts in desk.facts if facts["name"] == model), None)
        if facts is not None:
            request["steps"] = max(1, round(facts["preset"]["steps"] * QUALITY[quality]))
    # who gives no seed wants another picture each time; it is kept with the job, which can be drawn again
    request.setdefault("seed", secrets.randbelow(2**53))
    return Wanted(model, request, kind, size, quality, stream, partial if stream else 0)


def _one_of(body: dict[str, Any], name: str, known: dict[str, Any], default: str) -> str:
    value = body.pop(name, default)
    if not isinstance(value, str) or value not in known:
        raise bad(f"{name} must be {checks.either(known)}, not {checks.shown(value)}", name)
    return value


async def _drawn(desk: Desk, request: Request, wanted: Wanted, digest: str, kind: str) -> Response:
    key: Key = request.state.key
    idempotency = idempotency_of(request)
    ask = Ask(
        wanted.model,
        wanted.request,
        digest,
        wanted.format,
        looks=wanted.partial,
        look_format=wanted.format,
        idempotency=idempotency,
        retry=is_retry(request.headers),
        keep=idempotency is not None,
        # a stream that is broken off is not taken up again by any client
        grace=desk.settings.grace if may_retry(request.headers) and not wanted.stream else 0.0,
        brought=wanted.brought,
        forget=True,
    )
    record, live = await desk.submit(key, ask)
    if wanted.stream:
        return streamed(_stream(desk, record, live, wanted, kind))
    record = succeeded(await ended(request, desk.floor, record, live))
    pictures = [{"b64_json": text} for text in await _base64(desk, record)]
    answer = {"created": int(record.made), "data": pictures, **_about(record), "usage": _usage(record)}
    if not await request.is_disconnected():
        await desk.answered(record)
    return Answer(answer)


async def _stream(
    desk: Desk, record: Record, live: Live | None, wanted: Wanted, kind: str
) -> AsyncIterator[bytes]:
    """Partial pictures as they form, then each that is done."""
    if live is not None:
        async with desk.floor.held(live):
            with live.listening() as listener:
                while not (live.ended.is_set() and listener.empty()):
                    happened = await listener.get()
                    if happened.picture is None:
                        continue
                    yield event(f"{kind}.partial_image", {
                        "type": f"{kind}.partial_image",
                        "b64_json": base64.b64encode(happened.picture).decode(),
                        "partial_image_index": happened.data["number"],
                        "created_at": int(live.record.made),
                        **_about(live.record, wanted),
                    })  # fmt: skip
        record = live.record
    try:
        record = succeeded(record)
        texts = await _base64(desk, record)
    except Refused as error:
        yield event("error", {"type": "error", "error": {
            "message": str(error), "type": "server_error", "param": error.param, "code": error.code,
        }})  # fmt: skip
        return
    for text in texts:
        yield event(f"{kind}.completed", {
            "type": f"{kind}.completed",
            "b64_json": text,
            "created_at": int(record.made),
            **_about(record, wanted),
            "usage": _usage(record),
        })  # fmt: skip
    await desk.answered(record)


async def _base64(desk: Desk, record: Record) -> list[str]:
    found = []
    for number in range(record.pictures):
        path = await desk.books.work(desk.store.output, record.id, number)
        if path is None:
            raise Refused(410, "gone", "these pictures are not kept any more")
        found.append(await desk.books.work(lambda path=path: base64.b64encode(path.read_bytes()).decode()))  # type: ignore[misc]
    return found


def _about(record: Record, wanted: Wanted | None = None) -> dict[str, Any]:
    width, height = record.options["expected"]["size"]
    quality = "auto" if wanted is None or wanted.quality not in ("low", "medium", "high") else wanted.quality
    return {
        "background": "opaque",
        "output_format": record.options["format"],
        "size": f"{width}x{height}",
        **({} if wanted is None else {"quality": quality}),
    }


def _usage(record: Record) -> dict[str, Any]:
    """Nothing is billed by tokens here: they are 0, and the receipt says what was."""
    details = {"text_tokens": 0, "image_tokens": 0}
    receipt = {name: value for name, value in (record.receipt or {}).items() if name != "recipe"}
    return {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "input_tokens_details": details,
        "receipt": receipt,
    }


def _hole(image: bytes, mask: bytes | None) -> bytes | None:
    """Our mask, white where to paint, from OpenAI's, transparent where to paint; of an image without one its own.

    A mask without transparency is taken as ours. None where nothing says where to paint. `DataError` for no picture.
    """
    from PIL import Image

    from sfumato import pictures

    data, name = (image, "image") if mask is None else (mask, "mask")
    try:
        pictures.decode(data, f"the {name}")
        opened = Image.open(io.BytesIO(data))
        clear = "A" in opened.getbands() or "transparency" in opened.info
    except Exception as error:
        raise bad(str(error) if error.args else f"the {name} cannot be read", name) from None
    if not clear:
        return mask
    alpha = opened.convert("RGBA").getchannel("A")
    if mask is None and not alpha.histogram()[0]:
        return None
    stream = io.BytesIO()
    alpha.point(lambda value: 255 if value == 0 else 0).save(stream, "PNG")
    return stream.getvalue()
