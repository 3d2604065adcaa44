"""Small pictures of what was drawn, for lists: WebP without a recipe."""

from __future__ import annotations

import io

from PIL import Image

from sfumato.serve.asked import CLIP
from sfumato.video.read import decode_clip

SIDE = 320  # pixels of the longer side, twice those of a tile in the gallery
MEDIA, SUFFIX = "image/webp", "webp"
QUALITY = 82


def small(data: bytes, kind: str) -> bytes:
    """A picture's file, or a clip's of which the first frame counts, as a small one. Errors of decoding."""
    if kind == CLIP:
        picture = decode_clip(data, "the clip", frames=1).frames[0]
    else:
        picture = Image.open(io.BytesIO(data))
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=QUALITY, method=4)
    return stream.getvalue()
