"""Subclasses that go by their base's name."""

from typing import Any


def disguise(base: type, body: dict[str, Any]) -> type:
    """A subclass that calls itself what its base is called: transformers and accelerate match on class names."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), body | names)
