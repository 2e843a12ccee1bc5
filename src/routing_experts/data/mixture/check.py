"""A whole instruction set looked at before anything is trained on it: in constant memory, on several processes.

This process reads and checks the records; others look at the pictures that they name, and count tokens.
"""

import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from routing_experts.data.mixture.files import MISNAMED, MISSING, UNREADABLE
from routing_experts.data.mixture.looking import LONG, Look, Seen, Shown
from routing_experts.data.mixture.naming import Sources
from routing_experts.data.mixture.work import AHEAD, Shared, processes
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.layouts import read_record
from routing_experts.data.readers.pictures import checked_name, held, is_below, names_of, path_named
from routing_experts.data.readers.sources import Source
from routing_experts.data.records import Picture
from routing_experts.errors import RecordError
from routing_experts.records import Lengths, MixtureCheck, RecordFault, SourceCheck, environment

KEPT = 100  # faults of each kind that the record tells in words; all of them are counted
RECORD = "record"
_UNREAD = Path()  # stands in a record that nobody will read: making a path of each name takes longer than parsing it


@dataclass(frozen=True)
class Told:
    """Who is told of a check while it runs.

    Attributes:
        read: of a record, with its bytes.
        looked: of so many pictures, once they were looked at.
        fault: of each fault.
    """

    read: Callable[[int], object] = lambda count: None
    looked: Callable[[int], object] = lambda count: None
    fault: Callable[[RecordFault], object] = lambda fault: None


def check_mixture(
    source: Source, look: Look, workers: int = 2, limit: int | None = None, told: Told | None = None
) -> MixtureCheck:
    """Reads a set to its end, or to where it cannot be read on; faults are counted, not raised.

    Args:
        source: the set; see ``open_source``.
        look: what is done beside reading.
        workers: processes that do it.
        limit: of so many of the first records; None for all.
        told: of what is read and found on the way.

    Raises:
        WorkerError: if one of them has ended.
    """
    started = time.monotonic()
    with processes(workers) as pool:
        check = _Check(source, look, pool, AHEAD * workers, told or Told())
        cut = check.read(limit)
    return MixtureCheck(
        name=source.items.name,
        bytes=check.bytes,
        seconds=time.monotonic() - started,
        sources=check.sources,
        faults=check.faults,
        repeated_ids=check.repeated_ids,
        verified=look.verify,
        environment=environment(),
        cut=cut,
        max_length=look.max_length,
        first=limit,
    )


@dataclass
class _Tally:
    """What was counted of one source."""

    records: int = 0
    turns: int = 0
    pictures: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    tokens: "array[int]" = field(default_factory=lambda: array("q"))

    def counted(self, source: str) -> SourceCheck:
        return SourceCheck(
            source=source,
            records=self.records,
            turns=self.turns,
            faulty=self.wrong[RECORD],
            pictures=self.pictures,
            missing=self.wrong[MISSING],
            unreadable=self.wrong[UNREADABLE],
            misnamed=self.wrong[MISNAMED],
            lengths=self._lengths(),
        )

    def _lengths(self) -> Lengths | None:
        if not self.tokens:
            return None
        tokens = np.frombuffer(self.tokens, dtype=np.int64)
        middle, longest, over = int(np.median(tokens)), int(tokens.max()), self.wrong[LONG]
        return Lengths(len(tokens), int(tokens.sum()), middle, longest, over)


class _Check:
    """One reading of a set.

    Args:
        source, look, told: see ``check_mixture``.
        pool: of processes.
        limit: blocks that may be on their way to them.
    """

    def __init__(self, source: Source, look: Look, pool: ProcessPoolExecutor, limit: int, told: Told) -> None:
        self.source, self.look, self.told = source, look, told
        self.faults: list[RecordFault] = []
        self.bytes, self._ids = 0, array("q")
        self._tallies: dict[str, _Tally] = {}
        self._kept: Counter[str] = Counter()
        self._name = Sources()
        self._shared: Shared[Shown, Seen] = Shared(pool, look, self._seen, limit)

    @property
    def sources(self) -> list[SourceCheck]:
        """Those with the most records first."""
        by_size = sorted(self._tallies.items(), key=lambda pair: -pair[1].records)
        return [tally.counted(name) for name, tally in by_size]

    @property
    def repeated_ids(self) -> int:
        """Records whose id an earlier one had."""
        return len(self._ids) - len(np.unique(np.frombuffer(self._ids, dtype=np.int64)))

    def read(self, limit: int | None) -> str | None:
        """Reads all records, or so many of the first; says what ended it early."""
        cut, item = None, None
        try:
            for item in islice(self.source.items, limit):
                self._record(item)
                self.told.read(item.end - self.bytes)
                self.bytes = item.end
            if item is None:  # a table; files without any are refused by who reads them
                cut = f"{self.source.items.name}: it has no records; there is nothing to train or evaluate on."
        except RecordError as error:
            cut = str(error)
        self._shared.finish()
        return cut

    def _record(self, item: Item) -> None:
        """Checks a record; its picture files are left to others, even if something else is wrong with it."""
        names: list[str | None] = []
        pictures: list[str | bytes] = []

        def find(value: Any, where: str, root: Path) -> Picture:
            name = path_named(value)
            names.append(name)
            if name is None:
                found = held(value)
                if not isinstance(found, Image.Image):
                    assert isinstance(found, bytes), found
                    pictures.append(found)
                return found
            pictures.append(os.path.join(root, checked_name(name, where, root)))
            return _UNREAD if self.look.count_tokens is None else root / name

        record, problem = None, None
        try:
            where = self.source.items.where(item.index)
            record = read_record(item.value, where, item.index, self.source.root, find)
        except RecordError as error:
            problem = str(error)
            if not names:  # refused before its pictures were asked for
                names, pictures = self._named(item.value)
        origin = self._name(names)
        tally = self._tallies.setdefault(origin, _Tally())
        tally.records += 1
        tally.pictures += len(names)
        if record is not None:
            tally.turns += len(record.turns)
            self._ids.append(hash(record.id))
        counted = record if self.look.count_tokens is not None else None
        if pictures or counted is not None or problem is not None:
            self._shared.add(Shown(item.index, origin, tuple(pictures), counted, problem), pictures)

    def _named(self, value: Any) -> tuple[list[str | None], list[str | bytes]]:
        """The pictures that a record names which is none: their names, and the paths of those that may be looked at."""
        root, names = self.source.root, [name for name in names_of(value) if name is not None]
        return list(names), [os.path.join(root, name) for name in names if is_below(name)]

    def _seen(self, block: Sequence[Shown], seen: Sequence[Seen]) -> None:
        self.told.looked(sum(len(shown.pictures) for shown in block))
        for shown, one in zip(block, seen, strict=True):
            tally = self._tallies[shown.source]
            if shown.problem is not None:  # told here, so that faults come in the order of their records
                self._fault(tally, shown.number, RECORD, shown.problem)
            if one.tokens is not None:
                tally.tokens.append(one.tokens)
            for kind, problem in one.problems:
                self._fault(tally, shown.number, kind, f"{self.source.items.where(shown.number)}: {problem}")

    def _fault(self, tally: _Tally, number: int, kind: str, problem: str) -> None:
        tally.wrong[kind] += 1
        if kind == MISNAMED:
            return
        fault = RecordFault(number, kind, problem)
        self.told.fault(fault)
        if self._kept[kind] < KEPT:
            self._kept[kind] += 1
            self.faults.append(fault)
