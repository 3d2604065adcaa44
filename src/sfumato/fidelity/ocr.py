"""Reading text by an OCR engine, where one is installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating]
HEIGHT = 48  # pixels that engines want a line of text to have
ALONE = "words are read by matching the shapes of their letters alone; "
MISSING = f"no OCR engine is installed, so {ALONE}`pip install 'sfumato[ocr]'` brings one"
UNASKED = f"no OCR engine was asked, so {ALONE}`sfumato preflight` asks the one that is installed"


@dataclass(frozen=True)
class Reader:
    """An engine. name: with its version. read: a line of text (H, W, 3) → what it says, and how sure, in [0, 1]."""

    name: str
    read: Callable[[Array], tuple[str, float]]


def find_reader() -> Reader | None:
    """RapidOCR, or else Tesseract, if installed. Nothing is fetched: their models come with them."""
    engine = _engine()
    return None if engine is None else engine()


def without() -> str:
    """What to say where no engine read."""
    return MISSING if _engine() is None else UNASKED


def _engine() -> Callable[[], Reader] | None:
    if importlib.util.find_spec("rapidocr") and importlib.util.find_spec("onnxruntime"):
        return _rapidocr
    if importlib.util.find_spec("pytesseract") and shutil.which("tesseract"):
        return _tesseract
    return None


def _line(picture: Array) -> Image.Image:
    """The line enlarged to what engines want, 8 bits."""
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    scale = max(1.0, HEIGHT / image.height)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _rapidocr() -> Reader:
    from importlib.metadata import version

    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "critical"})

    def read(picture: Array) -> tuple[str, float]:
        found: Any = engine(
            np.asarray(_line(picture))[..., ::-1], use_det=False, use_cls=False
        )  # it wants BGR
        if not getattr(found, "txts", None):
            return "", 0.0
        return str(found.txts[0]), float(found.scores[0])

    return Reader(f"RapidOCR {version('rapidocr')}", read)


def _tesseract() -> Reader:
    import pytesseract

    def read(picture: Array) -> tuple[str, float]:
        told = pytesseract.image_to_data(
            _line(picture), config="--psm 7", output_type=pytesseract.Output.DICT
        )
        words = [
            (text, float(sure)) for text, sure in zip(told["text"], told["conf"], strict=True) if text.strip()
        ]
        if not words:
            return "", 0.0
        return " ".join(text for text, _ in words), float(np.mean([sure for _, sure in words])) / 100

    return Reader(f"Tesseract {pytesseract.get_tesseract_version()}", read)
