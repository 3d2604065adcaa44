"""What is sent to /v1/files, told by its first bytes: pictures, clips, and LoRAs, which go to the disk as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from sfumato import pictures
from sfumato.checkpoint.header import read_header
from sfumato.checkpoint.numbers import check_numbers
from sfumato.errors import CheckpointError
from sfumato.families.lora import described
from sfumato.serve.books import Books, no_room
from sfumato.serve.desk import Desk
from sfumato.serve.keys import Key
from sfumato.serve.ledger import Upload
from sfumato.serve.refusals import Refused, bad
from sfumato.serve.store import LORA, UPLOADS
from sfumato.serve.web.answers import Gone
from sfumato.serve.web.body import form_body, kind_of_body, look_at_file, upload_of
from sfumato.serve.web.guard import FORM
from sfumato.storage import HEADER_LIMIT, PICKLES, length_in
from sfumato.video import formats

TOLD = 64  # bytes by which a file is known
BLOCK = 2**20  # bytes that are written together
MOST_HEADER = 16 * 2**20  # bytes: ten times what a LoRA's notes and names are, and little to parse


async def kept(desk: Desk, key: Key, request: Request) -> Upload:
    """The file of a body, or of the form that it is, when it is kept. `Refused` for what is none, or has no place."""
    chunks = _blocks(await _sent(desk.books, key, request))
    start = await anext(chunks, b"")
    if _is_checkpoint(start):
        return await _kept_lora(desk, key, start, chunks)
    data, most = bytearray(start), desk.settings.body
    while len(data) <= most and (more := await anext(chunks, b"")):
        data += more
    if len(data) > most:
        raise Refused(413, "too_large", f"a picture or clip may have {most:,} bytes")
    whole = bytes(data)
    upload = await look_at_file(desk.books, key, whole, "file")
    await desk.books.keep(upload, whole)
    return upload


def _is_checkpoint(start: bytes) -> bool:
    """Whether a file of weights begins so, and nothing that is a picture or a clip."""
    if pictures.sniff(start[:12]) is not None or formats.sniff(start[:TOLD]) is not None:
        return False
    return start[8:9] == b"{" or start[:2] in PICKLES


async def _kept_lora(desk: Desk, key: Key, start: bytes, rest: AsyncIterator[bytes]) -> Upload:
    most = desk.settings.lora_size
    if not most:
        raise Refused(403, "forbidden", "this server takes no LoRAs from its clients", param="file")

    async def whole() -> AsyncIterator[bytes]:
        yield start
        async for more in rest:
            yield more

    try:
        length = length_in(start[:9], HEADER_LIMIT, "the file")
        if length > MOST_HEADER:
            raise bad(f"the file's header has {length:,} bytes, and a LoRA's {MOST_HEADER:,} at most", "file")
        return await desk.books.receive(key.id, LORA, whole(), most, _look)
    except CheckpointError as error:
        raise Refused(400, error.code, str(error), param="file") from None


def _look(path: Path) -> None:
    """`CheckpointError` for what no model could draw with."""
    try:
        header = read_header(path)
        described(path, header)
        check_numbers(path, header)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), "the file")) from None


async def _sent(books: Books, key: Key, request: Request) -> AsyncIterator[bytes]:
    """The bytes of the one file that was sent, in pieces. `Refused` for a form without one."""
    if kind_of_body(request) in UPLOADS.values():
        return _pieces(request)
    if kind_of_body(request) != "multipart/form-data":
        ways = "send the file itself, with a Content-Type such as image/png, or a form with it, called file"
        raise Refused(415, "unsupported_media_type", f"{ways}: multipart/form-data")
    room = FORM + await books.room(key.id)

    async def receive() -> Message:
        """A form lies on a temporary disk before its file can be looked at: no more of it than could be kept."""
        nonlocal room
        message = await request.receive()
        room -= len(message.get("body", b""))
        if room < 0:
            raise no_room()
        return message

    file = upload_of(await form_body(Request(request.scope, receive)), "file")
    if file is None:
        raise bad('the form must have one file, called "file"', "file")
    return _read(file)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise Gone from None


async def _read(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(BLOCK):
        yield piece


async def _blocks(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces that are not small."""
    block = bytearray()
    async for piece in pieces:
        block += piece
        if len(block) >= BLOCK:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
