"""Pictures to files that say how they were made, and back.

PNG: text chunks `parameters` (the form of AUTOMATIC1111's web UI) and `sfumato` (the whole recipe as JSON), and XMP.
JPEG, WebP: EXIF UserComment (the same `parameters`), and XMP, which then also holds the recipe.
XMP always marks the picture as made by a model: IPTC's DigitalSourceType `trainedAlgorithmicMedia`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from sfumato.errors import InputError, SfumatoError
from sfumato.storage import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

    from sfumato.types import Request, Result

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACE = "urn:sfumato:recipe:1"
JPEG_SEGMENT = 65_000  # bytes that one JPEG segment (EXIF or XMP) can hold, less room for its header
RECIPE_MARGIN = 8_000  # bytes of a recipe besides prompt and negative prompt, generously
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_SAMPLER_NAMES = {  # what the web UI calls them, so that its readers and those of image sites understand
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "unipc": "UniPC",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "lms": "LMS",
    "lcm": "LCM",
}


def targets(path: str | os.PathLike[str], count: int) -> list[Path]:
    """The files a request writes: `path` itself, or `name-0.png` … `name-(count-1).png`."""
    path = Path(path)
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(count)]


def check_output(path: str | os.PathLike[str], count: int = 1, request: Request | None = None) -> None:
    """Raise `InputError` now if `count` pictures could not be written to `path` later.

    Checked: the extension, the folder (there, and writable), what stands at the name already, and for a JPEG whether
    the recipe of `request` fits into it.
    """
    path = Path(path)
    shown = repr(str(path)[:200])
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"output {shown} must end in .png, .jpg, .jpeg or .webp", argument="output")
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError
    except ValueError:
        raise InputError(
            f"output {shown} holds characters no file name can have", argument="output"
        ) from None
    try:
        if not path.parent.is_dir():
            raise InputError(
                f"the folder {str(path.parent)!r} does not exist; create it first", argument="output"
            )
        for target in targets(path, count):
            if target.is_dir():
                raise InputError(f"output {shown} is a folder; name a file in it", argument="output")
            with contextlib.suppress(FileNotFoundError):
                if stat.S_IFMT(os.lstat(target).st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
                    raise InputError(f"output {shown} exists and is not a file", argument="output")
    except OSError as error:
        raise InputError(f"output {shown} cannot be written: {error.strerror}", argument="output") from None
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"the folder {str(path.parent)!r} cannot be written to: {error.strerror}", argument="output"
        ) from None
    if request is not None and FORMATS[path.suffix.lower()] == "JPEG":
        _check_segment(len(_xml_text(request.to_dict()).encode()) + RECIPE_MARGIN)


def save_images(result: Result, path: str | os.PathLike[str]) -> list[Path]:
    """Write every picture of `result` with its recipe; all appear, or on a failure none does. Returns the files.

    The recipe in file k is that of picture k alone: count 1 and its own seed.
    """
    check_output(path, len(result.images))
    files = targets(path, len(result.images))
    try:
        with contextlib.ExitStack() as stack:
            for k, (image, file) in enumerate(zip(result.images, files, strict=True)):
                _save(
                    image,
                    stack.enter_context(atomic_file(file)),
                    file.suffix.lower(),
                    recipe_of(result.recipe, k),
                )
    except OSError as error:
        raise SfumatoError(f"{path} could not be written: {error.strerror or error}") from error
    return files


def recipe_of(recipe: dict[str, Any], index: int) -> dict[str, Any]:
    """The recipe of picture `index` alone, from that of its whole request."""
    from sfumato.types import MAX_SEED

    if "request" not in recipe:
        return recipe
    request = dict(recipe["request"])
    request["seed"] = (request.get("seed", 0) + index) % (MAX_SEED + 1)
    request["count"] = 1
    return {**recipe, "request": request}


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe inside a picture written by `save_images`. Raises `InputError` if there is none or no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
            text = image.info.get("sfumato") if image.format == "PNG" else _xmp_recipe(image.info.get("xmp"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a PNG, JPEG or WebP picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(text, str):
        raise InputError(f"{path} carries no recipe of ours")
    try:
        recipe = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} carries a damaged recipe")
    return recipe


def parameters(recipe: dict[str, Any]) -> str:
    """The recipe in the form of AUTOMATIC1111's web UI: prompt, negative prompt, then one line of settings."""
    request = recipe.get("request", {})
    weights = "".join(recipe.get("weights", {}).values())
    sampler = request.get("sampler")
    settings = {
        "Steps": request.get("steps"),
        "Sampler": _SAMPLER_NAMES.get(sampler, sampler),
        "Schedule type": request.get("schedule"),
        "CFG scale": request.get("guidance"),
        "Seed": request.get("seed"),
        "Size": "x".join(str(side) for side in request["size"]) if request.get("size") else None,
        "Model hash": hashlib.sha256(weights.encode()).hexdigest()[:10] if weights else None,
        "Model": recipe.get("model"),
        "Version": _tool(),
    }
    lines = [request.get("prompt", "")]
    if request.get("negative"):
        lines.append(f"Negative prompt: {request['negative']}")
    lines.append(", ".join(f"{key}: {_plain(value)}" for key, value in settings.items() if value is not None))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _save(image: Image, file: Path, suffix: str, recipe: dict[str, Any]) -> None:
    kind = FORMATS[suffix]
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("parameters", parameters(recipe))
        info.add_text("sfumato", json.dumps(recipe))
        info.add_itxt("XML:com.adobe.xmp", xmp())
        image.save(file, format=kind, pnginfo=info)
        return
    packet = xmp(recipe).encode()
    exif = _user_comment(parameters(recipe))
    if kind == "JPEG":
        _check_segment(len(packet))
        if len(exif.tobytes()) > JPEG_SEGMENT:
            exif = _user_comment(parameters(recipe)[: JPEG_SEGMENT // 4 - 64] + "…")
        image.convert("RGB").save(file, format=kind, quality=95, subsampling=0, exif=exif, xmp=packet)
    else:
        image.save(file, format=kind, lossless=True, exif=exif, xmp=packet)


def _user_comment(text: str) -> Exif:
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def xmp(recipe: dict[str, Any] | None = None) -> str:
    """An XMP packet that names the source type and the tool, and holds the recipe if one is given."""
    held = "" if recipe is None else f"<sfumato:recipe>{_xml_text(recipe)}</sfumato:recipe>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:sfumato="{NAMESPACE}">'
        f"<xmp:CreatorTool>{escape(_tool())}</xmp:CreatorTool>"
        f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        f'{held}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def _xml_text(value: Any) -> str:
    """JSON as XML text; the two characters that Unicode has and XML has not stay JSON escapes."""
    text = json.dumps(value, ensure_ascii=False).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    return escape(text)


def _xmp_recipe(packet: bytes | str | None) -> str | None:
    from xml.etree import ElementTree

    if packet is None:
        return None
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    if "<!" in text:  # ours never holds one; a document type could hold entities that expand without end
        return None
    try:
        found = ElementTree.fromstring(text.strip("\ufeff\0 \n")).find(f".//{{{NAMESPACE}}}recipe")
    except ElementTree.ParseError:
        return None
    return None if found is None else found.text


def _check_segment(size: int) -> None:
    if size > JPEG_SEGMENT:
        raise InputError(
            "the prompt is too long for a JPEG to carry; write a .png or .webp", argument="output"
        )


def _tool() -> str:
    from sfumato import __version__

    return f"sfumato {__version__}"
