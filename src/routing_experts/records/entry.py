"""JSON objects with known fields: typed, checked when written and when read; files are written whole or not at all.

Reading names the file and the field of whatever does not fit; keys that this version does not know are kept in
``extra``, so that a newer run's records pass through an older library unharmed.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from routing_experts.errors import ReportError, shown

T = TypeVar("T")

# A number's lowest and highest value, and what messages call it.
Share = Annotated[float, 0.0, 1.0, "a share from 0 to 1"]
Seconds = Annotated[float, 0.0, math.inf, "seconds, 0 or more"]
Count = Annotated[int, 0, math.inf, "a count, 0 or more"]
Positive = Annotated[int, 1, math.inf, "a count of at least 1"]


@dataclass(frozen=True)
class Entry:
    """A JSON object with known fields; ``extra`` holds the other keys that stood beside them."""

    extra: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        known = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "extra"}
        return known | self.extra

    @classmethod
    def from_dict(cls, values: Any, where: str = "") -> Self:
        """The inverse of ``to_dict``; ``where`` is the object's own place in its file, for messages.

        Raises:
            ReportError: if a field is missing or has a value of another kind; the field is named.
        """
        if not isinstance(values, dict):
            raise misfit(where, values, "an object with named fields")
        hints = get_type_hints(cls, include_extras=True)
        prefix = f"{where}." if where else ""
        names = [f.name for f in fields(cls) if f.name != "extra"]
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed if name not in values]
        if missing:
            raise ReportError(
                f"{', '.join(prefix + name for name in missing)} missing: {cls.__name__} needs {', '.join(names)}. "
                "The run may have been cut short, or written by another version; evaluate it again."
            )
        known = {name: _read(hints[name], values[name], prefix + name) for name in names if name in values}
        return cls(**known, extra={key: value for key, value in values.items() if key not in known})


@dataclass(frozen=True)
class RecordFile(Entry):
    """An entry that is a file of its own."""

    def save(self, path: Path) -> None:
        """Writes the file whole."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads and checks the file.

        Raises:
            ReportError: if it is missing, is not JSON, or a field is missing or does not fit; path and field are named.
        """
        return load_json(path, cls._checked)

    @classmethod
    def _checked(cls, values: Any) -> Self:
        """``from_dict``; kinds of files whose fields must fit each other check that here as well."""
        return cls.from_dict(values)


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, value: Any) -> None:
    """Writes a plain value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def load_json(path: Path, parse: Callable[[Any], T]) -> T:
    """Reads a JSON file and parses its value; every ``ReportError`` names the file."""
    try:
        return parse(json.loads(path.read_bytes()))
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path} cannot be read as JSON ({error}). Give the folder of a run that was evaluated to its end."
        ) from error


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        inner, low, high, meaning = arguments
        if not low <= (number := _read(inner, value, where)) <= high:
            raise misfit(where, value, meaning)
        return number
    if origin in (Union, UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise misfit(where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is list:
        values = _expect(value, list, "a list", where)
        return [_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(values)]
    if origin is dict:
        values = _expect(value, dict, "an object", where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in values.items()}
    if isinstance(kind, type) and issubclass(kind, Entry):
        return kind.from_dict(value, where)
    if kind is float:
        if not math.isfinite(_expect(value, (int, float), "a number", where)):
            raise misfit(where, value, "a finite number")
        return float(value)
    names = {int: "a whole number", bool: "true or false", str: "a text"}
    return _expect(value, kind, names[kind], where)


def _expect(value: Any, kind: type | tuple[type, ...], name: str, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise misfit(where, value, name)
    return value


def misfit(where: str, value: Any, expected: str) -> ReportError:
    """The error for a value that is not what its field takes."""
    return ReportError(
        f"{where or 'the whole file'} is {shown(value)}: expected {expected}. Correct it, or evaluate the run again."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Entry):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
