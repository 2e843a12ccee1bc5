"""Records that cannot be used."""

from dataclasses import dataclass

from routing_experts.errors import PromptError, RecordError

UNUSABLE = (RecordError, PromptError)


@dataclass(frozen=True)
class Fault:
    """A record that could not be used.

    Attributes:
        record: its number in its source.
        problem: with its place and what to do.
    """

    record: int
    problem: str
