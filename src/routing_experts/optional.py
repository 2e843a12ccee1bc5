"""Packages that come with extras: asked for by name, so that a missing one is a hint and no traceback."""

from importlib import import_module
from types import ModuleType

from routing_experts.errors import MissingExtraError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package.

    Args:
        module: to import.
        extra: of this distribution that brings it.
        purpose: what needs it, for the message.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there, but something inside it is broken: that is another matter
        raise MissingExtraError(
            f"{purpose} needs the package {error.name}, which is not installed. "
            f'Run: pip install "routing-experts[{extra}]"'
        ) from error
