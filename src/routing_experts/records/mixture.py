"""Instruction sets: what one was found to hold, and the manifest of one that was drawn or joined."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds


@dataclass(frozen=True)
class Lengths(Entry):
    """Tokens of a source's dialogues, pictures' tokens included.

    Attributes:
        counted: dialogues whose tokens were counted; those with a fault are not.
        over: dialogues longer than the limit.
        tokens: of all together.
    """

    counted: Count
    tokens: Count
    median: Count
    longest: Count
    over: Count


@dataclass(frozen=True)
class SourceCheck(Entry):
    """One source of a set: the records whose first picture lies in one folder, or those without any.

    Attributes:
        records: faulty ones included.
        faulty: records that training would refuse, whatever their pictures.
        pictures: that records name, counted as often as they are named.
        missing: no file where the path says.
        unreadable: a file, but no picture.
        misnamed: a picture in another format than its suffix says; it is read all the same.
    """

    source: str
    records: Count
    turns: Count
    faulty: Count
    pictures: Count
    missing: Count
    unreadable: Count
    misnamed: Count
    lengths: Lengths | None = None


@dataclass(frozen=True)
class RecordFault(Entry):
    """One thing that is wrong with one record.

    Attributes:
        record: its number, from 0.
        kind: ``record``, ``missing``, ``unreadable`` or ``long``.
        problem: in words, with the place and what to do.
    """

    record: Count
    kind: str
    problem: str


@dataclass(frozen=True)
class MixtureCheck(RecordFile):
    """What ``roe data check`` found.

    Attributes:
        name: of the set.
        bytes: that were read; 0 of tables.
        sources: in the order of their records' number.
        faults: the first of them.
        repeated_ids: ids that an earlier record had already.
        cut: what ended the reading early; None if all of it was read.
        verified: whether pictures were decoded to their last byte.
        max_length: the limit that lengths were held against.
        first: of so many of the first records alone; None for all of them.
    """

    name: str
    bytes: Count
    seconds: Seconds
    sources: list[SourceCheck]
    faults: list[RecordFault]
    repeated_ids: Count
    verified: bool
    environment: dict[str, Any]
    cut: str | None = None
    max_length: Positive | None = None
    first: Positive | None = None

    @property
    def is_sound(self) -> bool:
        """Whether a run could train on all that was looked at."""
        wrong = sum(one.faulty + one.missing + one.unreadable for one in self.sources)
        too_long = sum(one.lengths.over for one in self.sources if one.lengths is not None)
        return self.cut is None and not wrong and not too_long


@dataclass(frozen=True)
class ManifestPart(Entry):
    """A set that records were taken from.

    Attributes:
        sha256: of its file.
        weight: how often each record was taken, drawn where it is no whole number; None by the authors' rule.
        rule: ``share``, or ``authors``: those whose number ends in 0 to 5.
        prefix: that was put before its image paths.
        records: that were written.
    """

    name: str
    sha256: str
    weight: float | None
    rule: Literal["share", "authors"]
    prefix: str
    records: Count


@dataclass(frozen=True)
class StratumCount(Entry):
    """The records of one source with so many turns: in all parts, and those that were written."""

    source: str
    turns: Count
    found: Count
    written: Count


@dataclass(frozen=True)
class Manifest(RecordFile):
    """What stands beside a set that was drawn or joined: enough to make it again.

    Attributes:
        name, sha256, records: of the file that was written.
        seed: of what was drawn.
    """

    name: str
    sha256: str
    records: Count
    seed: int
    parts: list[ManifestPart]
    strata: list[StratumCount]


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 of files of any size: of one, its bytes'; of several, of their digests one behind the other."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
