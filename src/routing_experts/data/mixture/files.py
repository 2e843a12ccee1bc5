"""What is wrong with picture files: by their first bytes, or by decoding them whole."""

import os
import struct
import warnings
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from routing_experts.data.images import PILLOW_ERRORS, is_text, load_image
from routing_experts.data.readers.pictures import missing
from routing_experts.errors import RecordError

HEAD = 64  # bytes that tell the format; Pillow itself looks at sixteen
MISSING, UNREADABLE, MISNAMED = "missing", "unreadable", "misnamed"


def look_at(picture: str | bytes, verify: bool) -> tuple[str, str] | None:
    """What is wrong with a file that a picture should be in.

    Args:
        picture: the file's path, or what a table holds of it.
        verify: decode it whole; otherwise its first bytes are looked at, which do not tell how large it is.

    Returns:
        One of the three kinds and the problem, as the end of a sentence; None if nothing is wrong.
    """
    if isinstance(picture, bytes):
        head, named = picture[:HEAD], None
    elif problem := missing(picture):
        return MISSING, problem
    else:
        try:
            with open(picture, "rb", buffering=0) as file:
                head = file.read(HEAD)
        except OSError as error:
            return UNREADABLE, f"cannot be read ({error.strerror})"
        named = Image.registered_extensions().get(os.path.splitext(picture)[1].lower())
    if not head:
        return UNREADABLE, "is empty (0 bytes); its download or copy broke off"
    found = format_of(head)
    if found is None and is_text(head):
        return UNREADABLE, f"is a text file, not a picture: it begins {head[:24]!r}, as a saved error page does"
    if verify and (damage := _damage(picture)):
        return UNREADABLE, damage
    if found is not None and (named is None or _same(found, named)):
        return None
    found = _opened_format(picture)  # several formats may begin alike, and a few tell themselves by more than that
    if found is None:
        return UNREADABLE, f"is in no format that Pillow knows; it begins {head[:8]!r}"
    if named is not None and not _same(found, named):
        return MISNAMED, f"is {found}, though its suffix says {named}"
    return None


def _opened_format(picture: str | bytes) -> str | None:
    """The format that Pillow finds in a file; None if it finds none."""
    try:
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            return opened.format
    except (*PILLOW_ERRORS, Image.DecompressionBombError):
        return None


def _damage(picture: str | bytes) -> str | None:
    """What keeps a picture from being decoded as training would; None if nothing does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below what is refused
        try:
            load_image(picture if isinstance(picture, bytes) else Path(picture), "")
        except RecordError as error:
            name = "given in memory" if isinstance(picture, bytes) else picture
            return str(error).partition(f"picture {name} ")[2] or str(error)
    return None


def format_of(head: bytes) -> str | None:
    """The name of the format whose pictures begin so, by Pillow's own tests; None if it knows none."""
    return next((name for name, accepts in _formats() if _accepts(accepts, head)), None)


def _accepts(test: Callable[[bytes], Any], head: bytes) -> bool:
    """One of Pillow's tests, which fail in these ways on a few bytes, as ``Image.open`` expects of them."""
    try:
        return test(head) is True
    except (SyntaxError, IndexError, TypeError, struct.error):
        return False


@cache
def _formats() -> list[tuple[str, Any]]:
    """Pillow's formats that tell themselves by their first bytes, the common ones first."""
    Image.init()
    return [(name, Image.OPEN[name][1]) for name in Image.ID if Image.OPEN[name][1] is not None]


def _same(found: str, named: str) -> bool:
    """Whether two names mean one format: JPEGs of several pictures, and animated PNGs, are opened by either name."""
    return found == named or {found, named} in ({"JPEG", "MPO"}, {"PNG", "APNG"})
