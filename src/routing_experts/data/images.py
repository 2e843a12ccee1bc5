"""Reading pictures as RGB, with errors that name the record and say what is wrong with the file."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from routing_experts.data.records import Picture
from routing_experts.errors import PictureError

# What Pillow raises on damaged files, whatever their format, and on pictures that were closed before they were loaded.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, AssertionError, RuntimeError)
_SIXTEEN_BIT = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TEXT_STARTS = (b"<!doctype", b"<html", b"<?xml", b"<svg", b"{", b"version https://git-lfs")


@contextmanager
def whole_pictures() -> Iterator[None]:
    """Has pictures that are cut short refused, whatever another library told Pillow: some tell it to fill them grey."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def load_image(image: Picture, record_id: str) -> Image.Image:
    """Reads a picture completely, upright (EXIF rotation applied), as RGB; transparency is dropped.

    Raises:
        PictureError: if the file is missing, a folder, empty, no picture, cut short, too large to be decoded safely, or
            has pixels without an agreed range.
    """
    with _opened(image, record_id) as (opened, name), whole_pictures():
        return _upright_rgb(opened, record_id, name)


def upright_size(image: Picture, record_id: str) -> tuple[int, int]:
    """Width and height of what ``load_image`` would give.

    Most formats tell them, and how they lie, at their beginning; a PNG may tell how it lies at its end, and is decoded.

    Raises:
        PictureError: as ``load_image`` does for what the file's beginning tells.
    """
    with _opened(image, record_id) as (opened, _), whole_pictures():
        turned = opened.getexif().get(ExifTags.Base.Orientation) in _QUARTER_TURNS
        return (opened.height, opened.width) if turned else opened.size


@contextmanager
def _opened(image: Picture, record_id: str) -> Iterator[tuple[Image.Image, str]]:
    """A picture and what messages call it; what Pillow raises inside becomes a ``PictureError``."""
    name = str(image) if isinstance(image, Path) else "given in memory"
    try:
        if isinstance(image, Image.Image):
            yield image, name
        else:
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as opened:
                yield opened, name
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"record {record_id}: picture {name} is too large ({error}); decoding it could exhaust the memory. "
            "Shrink the picture, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file."
        ) from error
    except PILLOW_ERRORS as error:
        path = image if isinstance(image, Path) else None
        raise PictureError(f"record {record_id}: picture {name} {_diagnosis(path, error)}") from error


def is_text(start: bytes) -> bool:
    """Whether a file that begins so is a page, a drawing in text or a pointer, not a picture."""
    return start.lstrip().lower().startswith(_TEXT_STARTS)


def _upright_rgb(image: Image.Image, record_id: str, name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise PictureError(
            f"record {record_id}: picture {name} has floating-point pixels, which have no agreed range of brightness. "
            "Convert it to 8 or 16 bits a channel."
        )
    if image.mode in _SIXTEEN_BIT:
        return _from_sixteen_bits(image, record_id, name).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _from_sixteen_bits(image: Image.Image, record_id: str, name: str) -> Image.Image:
    """Scales to 8 bits; Pillow's own conversion cuts everything above 255 to white."""
    pixels = np.asarray(image).astype(np.int64)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise PictureError(
            f"record {record_id}: picture {name} has pixels from {low} to {high}; integers are read as 16 bits, 0 to "
            "65535, and any other range has no agreed brightness. Convert it to 8 or 16 bits a channel."
        )
    return Image.fromarray((pixels // 257).astype(np.uint8))


def _diagnosis(path: Path | None, error: Exception) -> str:
    """What is wrong with the file and what to do about it, as the end of a sentence."""
    if path is not None:
        if isinstance(error, FileNotFoundError):
            return (
                "is not there. Put it in place, or correct the record's image field or the image folder of the recipe."
            )
        if path.is_dir():
            return "is a folder; a picture is one file. Name the file inside it in the record's image field."
        if isinstance(error, PermissionError):
            return "may not be read by this user. Change the file's permissions."
        if path.is_file() and path.stat().st_size == 0:
            return "is empty (0 bytes); its download or copy broke off. Fetch it again, or leave the record out."
        if isinstance(error, UnidentifiedImageError) and path.is_file():
            with path.open("rb") as file:
                start = file.read(64)
            if is_text(start):
                return (
                    f"is a text file, not a picture: it begins {start[:24]!r}, as an error page or a pointer that was "
                    "saved under a picture's name does. Fetch the picture itself, or leave the record out."
                )
            return (
                f"is in no format that Pillow knows; it begins {start[:8]!r}. "
                "Save it as PNG or JPEG, or leave the record out."
            )
    return f"cannot be read ({error}); it may be cut short or damaged. Replace the file, or leave the record out."
