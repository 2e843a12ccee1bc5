"""A whole instruction set looked at before anything is trained on it: in constant memory, on several processes.

This process reads and checks the records; others look at the pictures that they name, and count tokens.
"""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from routing_experts.data.images import load_image
from routing_experts.data.mixture.files import HEAD, MISNAMED, MISSING, UNREADABLE, format_of
from routing_experts.data.mixture.looking import LONG, Look, Seen, Shown
from routing_experts.data.mixture.naming import source_of
from routing_experts.data.mixture.work import AHEAD, Shared, processes
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.layouts import read_record
from routing_experts.data.readers.pictures import checked_name, path_named, picture
from routing_experts.data.readers.sources import Source
from routing_experts.data.records import Picture
from routing_experts.errors import RecordError
from routing_experts.records import Lengths, MixtureCheck, RecordFault, SourceCheck, environment

BLOCK = 500  # records that a process looks at in one go
KEPT = 100  # faults of each kind that the record tells in words; all of them are counted
RECORD = "record"


def check_mixture(
    source: Source,
    look: Look,
    workers: int = 2,
    advance: Callable[[Item], object] = lambda item: None,
    on_fault: Callable[[RecordFault], object] = lambda fault: None,
) -> MixtureCheck:
    """Reads a set to its end, or to where it cannot be read on; faults are counted, not raised.

    Args:
        source: the set; see ``open_source``.
        look: what is done beside reading.
        workers: processes that do it.
        advance: told of each record that was read.
        on_fault: told of each fault.
    """
    started = time.monotonic()
    with processes(workers) as pool:
        check = _Check(source, look, pool, AHEAD * workers, on_fault)
        cut = check.read(advance)
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
        source, look, on_fault: see ``check_mixture``.
        pool: of processes.
        limit: blocks that may be on their way to them.
    """

    def __init__(
        self, source: Source, look: Look, pool: ProcessPoolExecutor, limit: int, on_fault: Callable[[RecordFault], Any]
    ) -> None:
        self.source, self.look, self.on_fault = source, look, on_fault
        self.faults: list[RecordFault] = []
        self.bytes, self._ids = 0, array("q")
        self._tallies: dict[str, _Tally] = {}
        self._kept: Counter[str] = Counter()
        self._block: list[Shown] = []
        self._shared: Shared[list[Shown], list[Seen]] = Shared(pool, look, self._seen, limit)

    @property
    def sources(self) -> list[SourceCheck]:
        """Those with the most records first."""
        by_size = sorted(self._tallies.items(), key=lambda pair: -pair[1].records)
        return [tally.counted(name) for name, tally in by_size]

    @property
    def repeated_ids(self) -> int:
        """Records whose id an earlier one had."""
        return len(self._ids) - len(np.unique(np.frombuffer(self._ids, dtype=np.int64)))

    def read(self, advance: Callable[[Item], object]) -> str | None:
        """Reads all records; says what ended it early."""
        cut = None
        try:
            for item in self.source.items:
                self._record(item)
                self.bytes = item.end
                advance(item)
        except RecordError as error:
            cut = str(error)
        self._shared.give(self._block)
        self._shared.finish()
        return cut

    def _record(self, item: Item) -> None:
        """Checks a record; its picture files are left to others."""
        names: list[str | None] = []

        def note(value: Any, where: str, root: Path) -> Picture:
            name = path_named(value)
            names.append(name)
            if name is not None:
                return root / checked_name(name, where, root)
            held = picture(value, where, root)
            if isinstance(held, bytes) and format_of(held[:HEAD]) is None:
                raise RecordError(
                    f"{where}: {len(held):,} bytes in no format that Pillow knows, beginning {held[:8]!r}. Replace "
                    "them, or leave the record out."
                )
            if self.look.verify:
                load_image(held, str(item.index))
            return held

        problem = None
        try:
            where = self.source.items.where(item.index)
            record = read_record(item.value, where, item.index, self.source.root, note)
        except RecordError as error:
            problem = str(error)
        origin = source_of(names)
        tally = self._tallies.setdefault(origin, _Tally())
        tally.records += 1
        tally.pictures += len(names)
        if problem is not None:
            self._fault(tally, item.index, RECORD, problem)
            return
        tally.turns += len(record.turns)
        self._ids.append(hash(record.id))
        paths = tuple(str(path) for path, name in zip(record.images, names, strict=True) if name is not None)
        if paths or self.look.count_tokens is not None:
            self._block.append(Shown(item.index, origin, paths, record if self.look.count_tokens else None))
        if len(self._block) == BLOCK:
            self._shared.give(self._block)
            self._block = []

    def _seen(self, block: Sequence[Shown], seen: Sequence[Seen]) -> None:
        for shown, one in zip(block, seen, strict=True):
            tally = self._tallies[shown.source]
            if one.tokens is not None:
                tally.tokens.append(one.tokens)
            for kind, problem in one.problems:
                self._fault(tally, shown.number, kind, f"{self.source.items.where(shown.number)}: {problem}")

    def _fault(self, tally: _Tally, number: int, kind: str, problem: str) -> None:
        tally.wrong[kind] += 1
        if kind == MISNAMED:
            return
        fault = RecordFault(number, kind, problem)
        self.on_fault(fault)
        if self._kept[kind] < KEPT:
            self._kept[kind] += 1
            self.faults.append(fault)
