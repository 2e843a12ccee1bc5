"""What a source of records gives: one value a record, in order, with its place; read a piece at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from routing_experts.errors import shown


@dataclass(frozen=True, slots=True)
class Item:
    """One record as its source holds it, unchecked.

    Attributes:
        index: its number in the source, from 0.
        value: what was parsed.
        start, end: its bytes in the file, [start, end); both 0 in tables, whose rows have none.
    """

    index: int
    value: Any
    start: int = 0
    end: int = 0


class Items(Protocol):
    """A source that can be read from its beginning any number of times, and at any place."""

    name: str

    def __iter__(self) -> Iterator[Item]:
        """All items in order, in constant memory.

        Raises:
            RecordError: where the source cannot be read on; what came before was complete.
        """
        ...

    def at(self, item: Item) -> Any:
        """An item's value once more, when only its place was kept."""
        ...

    def digest(self) -> str:
        """Another one for other contents."""
        ...

    def where(self, index: int) -> str:
        """How messages name an item."""
        ...


def kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing or null"}
    if value == [] and isinstance(value, list):
        return "empty"
    return names.get(type(value), f"a number ({shown(value)})")
