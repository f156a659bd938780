"""Images as they come: decoded by Pillow, or refused with the reason. Nothing is drawn here."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from struct import error as struct_error
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.modality.quarantine import BadSample

MAX_PIXELS = 89_478_485
"""Larger ones are taken for a decompression bomb; the limit is Pillow's own."""
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")


def decode_image(value: Any, mode: str = "RGB") -> Image.Image:
    """One image, upright, in the mode that the model sees.

    Args:
        value: encoded bytes, or `{"bytes": ..., "path": ...}` as `Image(decode=False)` gives it.
        mode: `RGB`, or `L` for one channel.

    Raises:
        BadSample: it is broken, animated, of 16 bits or CMYK, or suspiciously large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is judged below
        try:
            image = Image.open(io.BytesIO(encoded(value)))
            _refuse_unusual(image)
            image.load()
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as e:
            raise BadSample(f"broken image: {e}") from None
        except (ValueError, EOFError, struct_error) as e:
            raise BadSample(f"broken image: {e}") from None
        return _flattened(ImageOps.exif_transpose(image), mode)


def thumbnail(value: Any, edge: int = 64) -> bytes | None:
    """A small PNG of an image, at most `edge` pixels each way; None where it cannot be decoded."""
    try:
        image = decode_image(value)
    except BadSample:
        return None
    image.thumbnail((edge, edge))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def encoded(value: Any) -> bytes:
    """The bytes of an image or audio file, from the row or from the path that it names."""
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return bytes(value["bytes"])
    if isinstance(value, Mapping) and value.get("path"):
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise BadSample(f"file not readable: {error}") from None
    raise BadSample("there is nothing: neither bytes nor a path")


def _refuse_unusual(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"{image.width} x {image.height} pixels: taken for a decompression bomb")
    if (num_frames := getattr(image, "n_frames", 1)) > 1:
        raise BadSample(f"animated: {num_frames} frames; save the one that counts")
    if image.mode not in MODES:
        raise BadSample(f"colour mode {image.mode}; save it as 8-bit grey or RGB")


def _flattened(image: Image.Image, mode: str) -> Image.Image:
    """Transparency on white, as a page would show it."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        seen = image.convert("RGBA")
        page = Image.new("RGBA", seen.size, "white")
        page.alpha_composite(seen)
        image = page.convert("RGB")
    return image if image.mode == mode else image.convert(mode)
