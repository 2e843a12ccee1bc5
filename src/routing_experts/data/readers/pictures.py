"""A record's pictures: paths that stay below the image folder, or what a table holds of them."""

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISDIR, S_ISREG
from typing import Any

from PIL import Image

from routing_experts.data.records import Picture
from routing_experts.errors import RecordError, shortened, shown

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
            f"{where}, field {given[0]}: it is {shown(value)}, but it holds a path or a list of paths. "
            "Name the pictures, or leave the field out of a record without any."
        )
    return given[0], values


def _names_picture(value: Any) -> bool:
    if isinstance(value, Mapping):  # of a table: bytes, or a path, or both
        content, path = value.get("bytes"), value.get("path")
        return (
            (content is None or isinstance(content, bytes)) and isinstance(path, str | None) and bool(content or path)
        )
    return isinstance(value, str | Image.Image) and bool(value)


def path_named(value: Any) -> str | None:
    """The path by which a field's value names a picture; None for one that a table holds itself."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path")
    return value if isinstance(value, str) else None


def names_of(item: Any) -> list[str | None]:
    """What a record calls its pictures, be it one or not: a path, or None for what a table holds itself."""
    if not isinstance(item, Mapping):
        return []
    named = next((item[field] for field in FIELDS if item.get(field)), None)
    values = named if isinstance(named, list) else [named] if named is not None else []
    return [path_named(value) for value in values]


def picture(value: Any, where: str, root: Path) -> Picture:
    """A path below the image folder whose file is there, or what a table holds.

    Raises:
        RecordError: naming the field, if the path leaves the folder or no file is there.
    """
    name = path_named(value)
    return held(value) if name is None else path_below(name, where, root)


def held(value: Any) -> Picture:
    """The picture that a table's field holds, where it names none."""
    found: Picture = value["bytes"] if isinstance(value, Mapping) else value
    return found


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
        f"{where}: {shortened(str(path))} {problem}. Correct the path, put the picture in place, or name another image "
        "folder (`data.images` in a recipe)."
    )


def checked_name(name: str, where: str, root: Path) -> str:
    """A path that stays below the image folder, as it came.

    Raises:
        RecordError: if it leaves the folder.
    """
    if leaves(name):
        raise RecordError(
            f"{where}: {shown(name)} leaves the image folder, so a file of records could make this program read any "
            f"file. Give a path relative to {root}, without `..`."
        )
    if not name.isascii():
        check_characters(name, where)
    return name


def is_below(name: str) -> bool:
    """Whether a path stays below the image folder, and can be asked for."""
    try:
        checked_name(name, "", Path())
    except RecordError:
        return False
    return True


def check_characters(text: str, where: str) -> None:
    """Raises ``RecordError`` for half of a surrogate pair, which no tokenizer, file or terminal can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}: character {error.start} is half of a surrogate pair ({text[error.start]!a}), which no tokenizer "
            "can read. Mend the text's encoding."
        ) from error


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
