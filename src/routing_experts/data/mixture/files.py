"""What is wrong with picture files: by their first bytes, or by decoding them whole."""

import struct
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from routing_experts.data.images import UNREADABLE as UNREADABLE_ERRORS
from routing_experts.data.images import is_text, load_image
from routing_experts.data.readers.pictures import missing
from routing_experts.errors import RecordError

HEAD = 64  # bytes that tell the format; Pillow itself looks at sixteen
MISSING, UNREADABLE, MISNAMED = "missing", "unreadable", "misnamed"


def look_at(path: str, verify: bool) -> tuple[str, str] | None:
    """What is wrong with a file that a picture should be in.

    Args:
        path: of the file.
        verify: decode it whole; otherwise its first bytes are looked at.

    Returns:
        One of the three kinds and the problem, as the end of a sentence; None if nothing is wrong.
    """
    if problem := missing(path):
        return MISSING, problem
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        return UNREADABLE, f"cannot be read ({error.strerror})"
    if not head:
        return UNREADABLE, "is empty (0 bytes); its download or copy broke off"
    named = Image.registered_extensions().get(Path(path).suffix.lower())
    found = format_of(head)
    if found is None and is_text(head):
        return UNREADABLE, f"is a text file, not a picture: it begins {head[:24]!r}, as a saved error page does"
    if verify and (damage := _damage(path)):
        return UNREADABLE, damage
    if found is not None and (named is None or _same(found, named)):
        return None
    found = _opened_format(path)  # several formats may begin alike, and a few tell themselves by more than that
    if found is None:
        return UNREADABLE, f"is in no format that Pillow knows; it begins {head[:8]!r}"
    if named is not None and not _same(found, named):
        return MISNAMED, f"is {found}, though its suffix says {named}"
    return None


def _opened_format(path: str) -> str | None:
    """The format that Pillow finds in a file; None if it finds none."""
    try:
        with Image.open(path) as opened:
            return opened.format
    except (*UNREADABLE_ERRORS, Image.DecompressionBombError):
        return None


def _damage(path: str) -> str | None:
    """What keeps a picture from being decoded as training would; None if nothing does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but below what is refused
        try:
            load_image(Path(path), "")
        except RecordError as error:
            return str(error).partition(f"picture {path} ")[2] or str(error)
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
    """Whether two names mean one format: JPEGs of several pictures, and JPEG 2000 in a container, begin alike."""
    return found == named or {found, named} in ({"JPEG", "MPO"}, {"PNG", "APNG"})
