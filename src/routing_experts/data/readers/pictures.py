"""A record's pictures: paths that stay below the image folder, or what a table holds of them."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISDIR, S_ISREG
from typing import Any

from PIL import Image

from routing_experts.data.images import UNREADABLE
from routing_experts.errors import RecordError

# LLaVA's, tables', and those of a folder with metadata.jsonl: one of them.
FIELDS = ("image", "images", "file_name", "file_names")


def picture_values(item: Mapping[str, Any], where: str) -> tuple[str, list[Any]]:
    """The field that holds a record's pictures, and what it holds; an empty list without any.

    Raises:
        RecordError: if several fields hold pictures, or one holds something else.
    """
    given = [name for name in FIELDS if item.get(name) is not None]
    if len(given) > 1:
        raise RecordError(
            f"{where}, fields {' and '.join(given)}: both name pictures, so their order is open. Keep one of them."
        )
    if not given:
        return FIELDS[0], []
    value = item[given[0]]
    values = value if isinstance(value, list) else [value]
    if given[0] == "images" and not values:  # tables have the column in every row
        return given[0], []
    if not values or not all(_names_picture(one) for one in values):
        raise RecordError(
            f"{where}, field {given[0]}: it is {value!r}, but it holds a path or a list of paths. "
            "Name the pictures, or leave the field out of a record without any."
        )
    return given[0], values


def _names_picture(value: Any) -> bool:
    return (isinstance(value, str | Image.Image | Mapping)) and bool(value)


def picture(value: Any, where: str, root: Path) -> Path | Image.Image:
    """A path below the image folder whose file is there, or a table's picture.

    Raises:
        RecordError: naming the field, if the path leaves the folder or no file is there, or bytes are no picture.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return _decoded(value["bytes"], where)
        return picture(value.get("path") or "", where, root)
    return path_below(value, where, root)


def _decoded(content: bytes, where: str) -> Image.Image:
    try:
        return Image.open(BytesIO(content))
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise RecordError(
            f"{where}: {len(content)} bytes are no picture that Pillow knows ({error}). Replace it, or leave the "
            "record out."
        ) from error


def path_below(name: str, where: str, root: Path) -> Path:
    """A picture's path.

    Raises:
        RecordError: if it leaves the image folder, or no file is there.
    """
    path = root / checked_name(name, where, root)
    problem = missing(path)
    if problem is None:
        return path
    raise RecordError(
        f"{where}: {path} {problem}. Correct the path, put the picture in place, or name another image folder "
        "(`data.images` in a recipe)."
    )


def checked_name(name: str, where: str, root: Path) -> str:
    """A path that stays below the image folder, as it came.

    Raises:
        RecordError: if it leaves the folder.
    """
    if leaves(name):
        raise RecordError(
            f"{where}: {name!r} leaves the image folder, so a file of records could make this program read any file. "
            f"Give a path relative to {root}, without `..`."
        )
    return name


def leaves(name: str) -> bool:
    """Whether a path is absolute or goes up, in the reading of any system."""
    if "\\" not in name and ":" not in name and "\0" not in name:  # most names; pathlib is slow
        return name.startswith("/") or ".." in name.split("/")
    windows = PureWindowsPath(name)  # reads / and \ alike, so that a path means the same on every system
    return PurePosixPath(name).is_absolute() or bool(windows.anchor) or ".." in windows.parts or "\0" in name


def missing(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a path at which a file should be; None if nothing is."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is not there"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    if S_ISREG(mode):
        return None
    return "is a folder, not a picture" if S_ISDIR(mode) else "is no regular file"
