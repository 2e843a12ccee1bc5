"""Long rows of small numbers and of yes and no as one line of text, a character each."""

from collections.abc import Iterable

# Digits, letters, then other ASCII.
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + "!#$%&()*+,-./:;<=>?@[]^_`{|}~"


def as_marks(numbers: Iterable[int]) -> str:
    """Numbers below 91, a character each."""
    return "".join(_MARKS[number] for number in numbers)


def from_marks(marks: str) -> list[int]:
    """The inverse of ``as_marks``."""
    return [_MARKS.index(mark) for mark in marks]


def as_bits(flags: Iterable[bool]) -> str:
    """A route, or which answers are right: a character each, 1 for True."""
    return "".join("1" if flag else "0" for flag in flags)


def from_bits(bits: str) -> list[bool]:
    """The inverse of ``as_bits``."""
    return [bit == "1" for bit in bits]
