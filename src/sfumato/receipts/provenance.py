"""Pictures to files that say how they were made, and back.

PNG: text chunks `parameters` (the form of AUTOMATIC1111's web UI) and `sfumato` (the whole recipe as JSON), and XMP.
JPEG, WebP: EXIF UserComment (the same `parameters`), and XMP, which then also holds the recipe.
XMP always marks the picture as made by a model: IPTC's DigitalSourceType `trainedAlgorithmicMedia`, or
`compositeWithTrainedAlgorithmicMedia` where it began with another picture, or a clip.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from xml.sax.saxutils import escape

from sfumato.errors import InputError, SfumatoError, naming
from sfumato.receipts import webui
from sfumato.receipts.digests import with_digests
from sfumato.receipts.share import share
from sfumato.storage import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

    from sfumato.receipts.signing import Signer
    from sfumato.types import Request, Result

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
NAMESPACE = "urn:sfumato:recipe:1"
JPEG_SEGMENT = 65_000  # bytes that one JPEG segment (EXIF or XMP) can hold, less room for its header
RECIPE_MARGIN = 8_000  # bytes of a recipe besides prompt and negative prompt, generously


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
    if path.suffix.lower() not in FORMATS:
        raise InputError(
            f"output {str(path)[:200]!r} must end in .png, .jpg, .jpeg or .webp", argument="output"
        )
    check_place(path, targets(path, count))
    if request is not None:
        check_recipe(request, path.suffix.lower())


def check_place(path: str | os.PathLike[str], files: list[Path], *, folder: bool = False) -> None:
    """Raise `InputError` now if `files`, named after `path`, could not be written later: the folder they lie in must be
    there, and writable. folder: they are folders themselves.
    """
    path = Path(path)
    shown = repr(str(path)[:200])
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError
    except ValueError:
        raise InputError(
            f"output {shown} holds characters no file name can have", argument="output"
        ) from None
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise InputError(
                f"{str(path.parent)!r} is no folder; output {shown} cannot lie in it", argument="output"
            )
        if not path.parent.is_dir():
            raise InputError(
                f"the folder {str(path.parent)!r} does not exist; create it first", argument="output"
            )
        for target in files:
            if target.is_dir() and not folder:
                raise InputError(f"output {shown} is a folder; name a file in it", argument="output")
            with contextlib.suppress(FileNotFoundError):
                kinds = (stat.S_IFREG, stat.S_IFLNK, *((stat.S_IFDIR,) if folder else ()))
                if stat.S_IFMT(os.lstat(target).st_mode) not in kinds:
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


def check_recipe(request: Request, suffix: str) -> None:
    """Raise `InputError` if the recipe of `request` does not fit into a file of this suffix, such as .jpg."""
    if FORMATS[suffix] == "JPEG":
        _check_segment(len(_xml_text(request.to_dict()).encode()) + RECIPE_MARGIN)


def encoded(image: Image, recipe: dict[str, Any], suffix: str) -> bytes:
    """The bytes of a file of this suffix, such as .png, with one picture, its recipe, and the digests of both."""
    stream = io.BytesIO()
    _save(image, stream, suffix, with_digests(recipe, [image]))
    return stream.getvalue()


def save_images(result: Result, path: str | os.PathLike[str], sign: Signer | None = None) -> list[Path]:
    """Write every picture of `result` with its recipe; all appear, or on a failure none does. Returns the files.

    The recipe in file k is that of picture k alone: count 1 and its own seed. sign: who seals each file.
    """
    check_output(path, len(result.images))
    files = targets(path, len(result.images))
    try:
        with contextlib.ExitStack() as stack:
            for k, (image, file) in enumerate(zip(result.images, files, strict=True)):
                place, suffix = stack.enter_context(atomic_file(file)), file.suffix.lower()
                recipe = with_digests(recipe_of(result.recipe, k), [image])
                if sign is None:
                    _save(image, place, suffix, recipe)
                else:
                    place.write_bytes(sign.sign(encoded(image, recipe, suffix), suffix, recipe))
    except OSError as error:
        raise SfumatoError(f"{path} could not be written: {error.strerror or error}") from error
    return files


def recipe_of(recipe: dict[str, Any], index: int) -> dict[str, Any]:
    """The recipe of picture `index` alone, from that of its whole request, with its share of what that took."""
    from sfumato.types import MAX_SEED

    if "request" not in recipe:
        return recipe
    recipe = share(recipe, index, recipe["request"].get("count", 1))
    request = {**recipe["request"], "count": 1}
    counted = request
    if request.get("variation"):  # then the variation's seed counts the pictures
        counted = request["variation"] = dict(request["variation"])
    counted["seed"] = (counted.get("seed", 0) + index) % (MAX_SEED + 1)
    return {**recipe, "request": request}


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe inside a picture written by `save_images`. Raises `InputError` if there is none or no picture."""
    recipe = recipe_in(_texts(path), path)
    if recipe is None:
        raise InputError(f"{path} carries no recipe of ours")
    return recipe


@dataclass(frozen=True)
class Like:
    """What a picture says of its making.

    request: fields of a `Request`. model: its name. weights: its hashes, if we drew it; refiner, refiner_weights:
    the same of a second model. embeddings, loras: names of textual inversions and of LoRAs, and hashes or their
    beginnings. read_as: how the model's files were read where they leave it open. without: names of text encoders that
    were left out. controlnets, annotators: names and hashes. ignored: settings of other programs that were not taken
    over.
    """

    request: dict[str, Any]
    model: str | None = None
    weights: dict[str, str] | None = None
    refiner: str | None = None
    refiner_weights: dict[str, str] | None = None
    embeddings: dict[str, str] = field(default_factory=dict)
    read_as: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    loras: dict[str, str] = field(default_factory=dict)
    controlnets: dict[str, str] = field(default_factory=dict)
    annotators: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def read_like(path: str | os.PathLike[str], skip: Collection[str] = ()) -> Like:
    """How a PNG, JPEG or WebP was made: by our recipe if it carries one, else by the web UI's `parameters`.

    skip: fields that the caller sets himself, and which therefore need not be understood. Raises `InputError`, naming
    the file, for a picture that says nothing usable.
    """
    texts = _texts(path, "like")
    recipe = recipe_in(texts, path)
    if recipe is not None:
        return _like_recipe(recipe, path, skip)
    text = texts.get("parameters") or texts.get("comment")
    if text is None:
        hint = "; a workflow of ComfyUI is not read" if {"prompt", "workflow"} & texts.keys() else ""
        raise InputError(f"{path} does not say how it was made{hint}", argument="like")
    try:
        fields, ignored = webui.read(text, skip)
    except InputError as error:
        raise InputError(f"{path}: {error}", argument=error.argument or "like") from None
    settings = webui.split(text)[2]
    embeddings = webui.hashes(settings.get("TI hashes", ""))
    return Like(
        fields,
        settings.get("Model"),
        refiner=settings.get("Refiner"),
        embeddings=embeddings,
        loras=webui.hashes(settings.get("Lora hashes", "")),
        ignored=ignored,
    )


def _like_recipe(recipe: dict[str, Any], path: str | os.PathLike[str], skip: Collection[str]) -> Like:
    """The same from a recipe of ours, which a stranger may have written: of what is missing or no object, nothing."""
    request, refiner = recipe.get("request"), recipe.get("refiner")
    if not isinstance(request, dict):
        raise InputError(f"{path} carries a recipe without a request", argument="like")
    model, weights = recipe.get("model"), recipe.get("weights")
    refiner = refiner if isinstance(refiner, dict) else {}
    return Like(
        {name: value for name, value in request.items() if name not in skip},
        model if isinstance(model, str) else None,
        weights if isinstance(weights, dict) else None,
        refiner["model"] if isinstance(refiner.get("model"), str) else None,
        refiner["weights"] if isinstance(refiner.get("weights"), dict) else None,
        _texts_of(recipe.get("embeddings")),
        _texts_of(recipe.get("read_as")),
        tuple(map(str, without)) if isinstance(without := recipe.get("without"), list) else (),
        _texts_of(recipe.get("loras")),
        controlnets=_texts_of(recipe.get("controlnets")),
        annotators=_texts_of(recipe.get("annotators")),
    )


def _texts_of(value: object) -> dict[str, str]:
    """An object of JSON as texts by names; of anything else none."""
    return {str(name): str(inner) for name, inner in value.items()} if isinstance(value, dict) else {}


def _texts(path: str | os.PathLike[str], argument: str = "file") -> dict[str, str]:
    from sfumato.pictures import read_file, shown, texts

    with naming(argument):
        return texts(read_file(path, argument), f"{argument} {shown(path)}")


def recipe_in(texts: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The recipe among what a picture or a clip says of itself, None if none is; `InputError` if it is damaged."""
    text = texts.get("sfumato") or _xmp_recipe(texts.get("xmp"))
    if text is None:
        return None
    try:
        recipe = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        recipe = None
    if not isinstance(recipe, dict):
        raise InputError(f"{path} carries a damaged recipe")
    return recipe


def parameters(recipe: dict[str, Any]) -> str:
    """The recipe in the form of AUTOMATIC1111's web UI, see `webui`."""
    return webui.write(recipe, _tool())


def _save(image: Image, file: Path | BinaryIO, suffix: str, recipe: dict[str, Any]) -> None:
    kind = FORMATS[suffix]
    if kind == "PNG":
        save_png(image, file, recipe)
        return
    packet = xmp(recipe, _composite(recipe)).encode()
    exif = _user_comment(parameters(recipe))
    if kind == "JPEG":
        _check_segment(len(packet))
        if len(exif.tobytes()) > JPEG_SEGMENT:
            exif = _user_comment(parameters(recipe)[: JPEG_SEGMENT // 4 - 64] + "…")
        image.convert("RGB").save(file, format=kind, quality=95, subsampling=0, exif=exif, xmp=packet)
    else:
        image.save(file, format=kind, lossless=True, exif=exif, xmp=packet)


def save_png(image: Image, file: Path | BinaryIO, recipe: dict[str, Any]) -> None:
    """A PNG with the recipe in its text chunks, and the XMP packet."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", parameters(recipe))
    info.add_text("sfumato", json.dumps(recipe))
    info.add_itxt("XML:com.adobe.xmp", mark(recipe))
    image.save(file, format="PNG", pnginfo=info)


def exif_and_xmp(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a WebP says of itself, as its encoder takes it."""
    packet = xmp(recipe, _composite(recipe)).encode()
    return {"exif": _user_comment(parameters(recipe)).tobytes(), "xmp": packet}


def mark(recipe: dict[str, Any]) -> str:
    """An XMP packet with the source type and no recipe, for files that hold it elsewhere."""
    return xmp(composite=_composite(recipe))


def source_type(recipe: dict[str, Any]) -> str:
    """IPTC's name of how something came to be that a model drew."""
    return COMPOSITE_TYPE if _composite(recipe) else SOURCE_TYPE


def _user_comment(text: str) -> Exif:
    from PIL import Image

    from sfumato.pictures import EXIF_IFD, USER_COMMENT

    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def _composite(recipe: dict[str, Any]) -> bool:
    return not recipe.get("request", {}).keys().isdisjoint(("image", "clip"))


def xmp(recipe: dict[str, Any] | None = None, composite: bool = False) -> str:
    """An XMP packet that names the source type and the tool, and holds the recipe if one is given.

    composite: the picture began with another one.
    """
    held = "" if recipe is None else f"<sfumato:recipe>{_xml_text(recipe)}</sfumato:recipe>"
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:sfumato="{NAMESPACE}">'
        f"<xmp:CreatorTool>{escape(_tool())}</xmp:CreatorTool>"
        f"<Iptc4xmpExt:DigitalSourceType>{COMPOSITE_TYPE if composite else SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
        f'{held}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def _xml_text(value: Any) -> str:
    """JSON as XML text; the two characters that Unicode has and XML has not stay JSON escapes."""
    text = json.dumps(value, ensure_ascii=False).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    return escape(text)


def _xmp_recipe(text: str | None) -> str | None:
    from xml.etree import ElementTree

    if (
        text is None or "<!" in text
    ):  # ours never holds one; a document type could hold entities that expand without end
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
