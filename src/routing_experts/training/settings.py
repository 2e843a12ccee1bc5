"""Plain values from YAML made into dataclasses: unknown, missing and mistyped settings are named with their place."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from routing_experts.errors import ConfigError


def read_yaml(name_or_path: str | Path, shipped: Path, kind: str) -> dict[str, Any]:
    """The settings of a YAML file, or of one that ships with the package by its name.

    Args:
        name_or_path: a file, or the name of a shipped one without its suffix.
        shipped: the folder of shipped ones.
        kind: what messages call it.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds no settings.
    """
    path, named = Path(name_or_path), shipped / f"{name_or_path}.yaml"
    if not path.is_file() and named.is_file():
        path = named
    if not path.is_file():
        known = sorted(found.stem for found in shipped.glob("*.yaml"))
        near = get_close_matches(str(name_or_path), known, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{kind} {name_or_path}: there is no such file. Give a YAML file, or one of: {', '.join(known)}.{meant}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{kind} {path} is not YAML: {error}. Correct the line that it names.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{kind} {path} holds {type(values).__name__}, not settings. Write `name: value` lines.")
    return values


def lay_over(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Puts values by dotted path (``training.steps``) over nested ones, in place.

    Raises:
        ConfigError: if a path leads through a value that has no settings below it.
    """
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        place = values
        for parent in parents:
            place[parent] = place.get(parent) or {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{dotted} leads through {parent}={place!r}, which has no settings below it.")
        place[last] = value
    return values


def mapping(values: Any, where: str) -> dict[str, Any]:
    """Settings as a fresh dict, or ``ConfigError``."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings, found {values!r}. Write `name: value` lines below it.")
    return dict(values)


def checked(kind: type, values: Any, where: str) -> dict[str, Any]:
    """The settings of a dataclass, each of its field's kind; the rest is for the dataclass to check."""
    values = mapping(values, where)
    known = {f.name: f for f in fields(kind)}
    section, prefix = where or "the recipe", f"{where}." if where else ""
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        near = [get_close_matches(name, known, 1) for name in unknown]
        meant = "".join(f" Did you mean {names[0]}?" for names in near if names)
        raise ConfigError(
            f"{section} has unknown settings {unknown}: it knows {', '.join(known)}. Correct or remove them.{meant}"
        )
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} of {section} missing: there is no default. Write `{missing[0]}: …`.")
    hints = get_type_hints(kind)
    return {name: _typed(hints[name], value, prefix + name) for name, value in values.items()}


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A plain value as a field's kind; numbers may be texts, since YAML takes ``4e-4`` for one."""
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else _typed(options[0], value, where)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return build(kind, value, where)
    if get_origin(kind) is dict:
        return {
            str(key): _typed(get_args(kind)[1], item, f"{where}.{key}") for key, item in mapping(value, where).items()
        }
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: expected a list. Write [a, b].")
        return tuple(_typed(get_args(kind)[0], item, where) for item in value)
    if kind is float:
        return _number(value, where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}={value!r}: expected {_KINDS[kind]}. Correct the value.")
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}={value!r}: expected a number. Correct the value.") from error
    if not isfinite(number):
        raise ConfigError(f"{where}={value!r}: expected a finite number. Correct the value.")
    return number


_KINDS = {int: "a whole number", bool: "true or false", str: "a text"}


def build(kind: Any, values: Any, where: str) -> Any:
    """A dataclass of a kind from plain values; one that is built already passes through."""
    return values if isinstance(values, kind) else kind(**checked(kind, values, where))
