"""What other processes do for a check: look at the pictures of a block of records, and count their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from routing_experts.data.mixture.files import MISNAMED, UNREADABLE, look_at
from routing_experts.data.records import Record
from routing_experts.errors import PictureError, PromptError, RecordError, shortened

LONG = "long"
Problem = tuple[str, str]
CountTokens = Callable[[Record], int]


class Shown(NamedTuple):  # as tuples these two travel in half the time that dataclasses take
    """A record to look at.

    Attributes:
        number: in its set.
        source: of the set, that it belongs to.
        pictures: paths of its picture files, or what a table holds of them.
        record: all of it, where its tokens are counted.
        problem: why it is no record.
    """

    number: int
    source: str
    pictures: tuple[str | bytes, ...]
    record: Record | None = None
    problem: str | None = None


class Seen(NamedTuple):
    """What was found: kinds of problems with their words, and the tokens where they were counted."""

    problems: Sequence[Problem] = ()
    tokens: int | None = None


NOTHING = Seen()


@dataclass(frozen=True)
class Look:
    """Looks at blocks; goes to other processes as it is.

    Attributes:
        verify: decode pictures to their last byte.
        count_tokens: of a record, or raises; None to leave it.
        max_length: more tokens are a problem.
    """

    verify: bool = False
    count_tokens: CountTokens | None = None
    max_length: int | None = None

    def __call__(self, block: Sequence[Shown]) -> list[Seen]:
        """What was found of each record of a block."""
        return [self._one(shown) for shown in block]

    def _one(self, shown: Shown) -> Seen:
        problems: list[Problem] = []
        for number, picture in enumerate(shown.pictures, start=1):
            if (found := look_at(picture, self.verify)) is not None:
                name = f"its picture {number}" if isinstance(picture, bytes) else shortened(picture)
                problems.append((found[0], f"{name} {found[1]}"))
        if self.count_tokens is None or shown.record is None or any(kind != MISNAMED for kind, _ in problems):
            return Seen(problems) if problems else NOTHING
        try:
            tokens = self.count_tokens(shown.record)
        except PictureError as error:
            return Seen([*problems, (UNREADABLE, str(error))])
        except (RecordError, PromptError) as error:
            return Seen([*problems, ("record", str(error))])
        if self.max_length is not None and tokens > self.max_length:
            problems.append((LONG, f"{tokens:,} tokens, more than max_length={self.max_length:,}"))
        return Seen(problems, tokens)
