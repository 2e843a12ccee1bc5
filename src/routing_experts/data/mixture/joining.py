"""Sets joined by weight, or a share of one: records are copied as they are written, each set's in their order.

The same sets, weights and seed give the same bytes.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

from routing_experts.data.mixture.strata import Drawing, Keep, Strata, Stratum, authors_rule, counts_of, shares
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.data.readers.pictures import FIELDS, checked_name, path_named
from routing_experts.data.writing import RecordWriter, as_json
from routing_experts.errors import ConfigError, RecordError, shown
from routing_experts.records import Manifest, ManifestPart, StratumCount, digest_of

Advance = Callable[[int], object]
MOST = 100  # times that a set is taken: each is a reading of its own, all at once


@dataclass(frozen=True)
class Part:
    """A set that is joined.

    Attributes:
        items: its records.
        weight: how often each is taken: whole times all of them, then a share that is drawn evenly of every source and
            number of turns; None for the authors' rule, six of every ten.
        prefix: goes before its image paths: where its image folder lies in the one that all share.
    """

    items: JsonItems
    weight: float | None = 1.0
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight <= MOST:
            raise ConfigError(
                f"{self.items.name}: weight {self.weight}: it is a number above 0 and at most {MOST}, such as 0.5 for "
                "half of the records or 2 for all of them twice. Correct it."
            )

    @property
    def passes(self) -> int:
        """How often its file is read."""
        if self.weight is None:
            return 1
        return floor(self.weight) + 2 * self.draws

    @property
    def draws(self) -> bool:
        """Whether a share of its records is drawn, which takes a reading that counts them."""
        return self.weight is not None and self.weight % 1 > 0


def join(parts: Sequence[Part], target: Path, seed: int = 0, advance: Advance = lambda count: None) -> Manifest:
    """Writes the parts, mingled: each is as far through its file as the others, and so are a part's copies.

    So the last records, which a run may hold out, are of all parts, and what comes again there does not train.

    Args:
        parts: what is joined.
        target: the ``.json`` or ``.jsonl`` file to write.
        seed: of what is drawn.
        advance: told of the bytes of each record, each time that it is read.

    Raises:
        ConfigError: if a part would be written over.
        RecordError: if a part cannot be read to its end, or is of another kind than a file; nothing is written then.
    """
    for part in parts:
        if target.exists() and part.items.path.exists() and target.samefile(part.items.path):
            raise ConfigError(f"{target} is read from: it would be written over. Give another file to write.")
    written: Counter[Stratum] = Counter()
    found: Counter[Stratum] = Counter()
    taken: Counter[int] = Counter()
    with RecordWriter(target) as writer:
        for record in heapq.merge(*_streams(parts, seed, advance), key=lambda record: (record.progress, *record.order)):
            number, copy = record.order
            found[record.stratum] += copy == 0
            if record.is_kept:
                written[record.stratum] += 1
                taken[number] += 1
                writer.copy(_renamed(record.item, record.content, parts[number], copy))
    told = [
        ManifestPart(
            name=part.items.path.name,
            sha256=digest_of([part.items.path]),
            weight=part.weight,
            rule="share" if part.weight is not None else "authors",
            prefix=part.prefix,
            records=taken[number],
        )
        for number, part in enumerate(parts)
    ]
    strata = [
        StratumCount(source=source, turns=turns, found=found[source, turns], written=written[source, turns])
        for source, turns in sorted(found)
    ]
    return Manifest(name=target.name, sha256=writer.sha256, records=writer.count, seed=seed, parts=told, strata=strata)


class _Read(NamedTuple):
    """A record on its way.

    Attributes:
        progress: how far its file was read, from 0 to 1.
        order: the part's number and the copy's, from 0.
        content: as the file has it.
    """

    progress: float
    order: tuple[int, int]
    item: Item
    content: bytes
    stratum: Stratum
    is_kept: bool


def _streams(parts: Sequence[Part], seed: int, advance: Advance) -> list[Iterator[_Read]]:
    """A stream for each time that a part's records come."""
    streams = []
    for number, part in enumerate(parts):
        counts = counts_of(_told(part.items, advance)) if part.draws else Counter[Stratum]()
        for copy, keep in enumerate(_rounds(part, counts, f"{seed}/{number}")):
            streams.append(_stream(part.items, (number, copy), keep, advance))
    return streams


def _stream(items: JsonItems, order: tuple[int, int], keep: Keep, advance: Advance) -> Iterator[_Read]:
    size, last, strata = 0, 0, Strata()
    for item, content in items.with_bytes():
        size = size or items.path.stat().st_size
        advance(item.end - last)
        last, stratum = item.end, strata(item.value)
        yield _Read(item.end / size, order, item, content, stratum, keep(item, stratum))


def _told(items: JsonItems, advance: Advance) -> Iterator[Item]:
    last = 0
    for item in items:
        advance(item.end - last)
        last = item.end
        yield item


def _rounds(part: Part, counts: Counter[Stratum], seed: str) -> Iterator[Keep]:
    """Which records each reading of a part keeps."""
    if part.weight is None:
        yield authors_rule
        return
    for _ in range(floor(part.weight)):
        yield lambda item, stratum: True
    if share := part.weight % 1:
        yield Drawing(counts, shares(counts, share, seed), seed)


def _renamed(item: Item, content: bytes, part: Part, copy: int) -> bytes:
    """A record as it is written; with its image folder before its paths, and an id of its own if it comes again."""
    if not part.prefix and not copy:
        return content
    value = item.value
    if not isinstance(value, dict):
        raise RecordError(f"{part.items.where(item.index)}: it is no record. See `roe data check`.")
    value = dict(value)
    if copy:
        name = item.index if value.get("id") is None else value["id"]
        value["id"] = f"{name}#{copy + 1}"
    for field in FIELDS:
        if part.prefix and value.get(field):
            value[field] = _below(value[field], f"{part.items.where(item.index)}, field {field}", part)
    return as_json(value)


def _below(named: Any, where: str, part: Part) -> Any:
    if isinstance(named, list):
        return [_below(one, where, part) for one in named]
    if (name := path_named(named)) is None:
        raise RecordError(
            f"{where}: it is {shown(named)}, but it holds a path or a list of paths. See `roe data check`."
        )
    below = f"{part.prefix}/{checked_name(name, where, Path(part.prefix))}"
    return below if isinstance(named, str) else named | {"path": below}
