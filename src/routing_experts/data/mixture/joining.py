"""Sets joined by weight, or a share of one: records are copied as they are written, each set's in their order.

The same sets, weights and seed give the same bytes.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, isfinite
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
        if self.weight is not None and not (isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"{self.items.name}: weight {self.weight}: it is a number above 0, such as 0.5 for half of the records "
                "or 2 for all of them twice. Correct it."
            )

    @property
    def passes(self) -> int:
        """How often its file is read."""
        return 1 + self.draws

    @property
    def draws(self) -> bool:
        """Whether a share of its records is drawn, which takes a reading that counts them."""
        return self.weight is not None and self.weight % 1 > 0


def join(parts: Sequence[Part], target: Path, seed: int = 0, advance: Advance = lambda count: None) -> Manifest:
    """Writes the parts, mingled: each is as far through its file as the others, and a record's copies are neighbours.

    So the last records, which a run may hold out, are of all parts, and no copy of them trains, but for the one at the
    border.

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
    streams = [_stream(part, number, seed, advance) for number, part in enumerate(parts)]
    with RecordWriter(target) as writer:
        for read in heapq.merge(*streams, key=lambda read: (read.progress, read.number)):
            found[read.stratum] += 1
            written[read.stratum] += read.times
            taken[read.number] += read.times
            for copy in range(read.times):
                writer.copy(_renamed(read.item, read.content, parts[read.number], copy))
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
        number: of its part.
        content: as the file has it.
        times: that it is written.
    """

    progress: float
    number: int
    item: Item
    content: bytes
    stratum: Stratum
    times: int


def _stream(part: Part, number: int, seed: int, advance: Advance) -> Iterator[_Read]:
    """A part's records, in order; where a share is drawn, they are counted before."""
    keep = _keep(part, f"{seed}/{number}", advance)
    whole, size, last, strata = floor(part.weight or 0), 0, 0, Strata()
    for item, content in part.items.with_bytes():
        size = size or part.items.path.stat().st_size
        advance(item.end - last)
        last, stratum = item.end, strata(item.value)
        yield _Read(item.end / size, number, item, content, stratum, whole + keep(item, stratum))


def _keep(part: Part, seed: str, advance: Advance) -> Keep:
    """Which records are written once more than the whole weight says."""
    if part.weight is None:
        return authors_rule
    share = part.weight % 1
    if not share:
        return lambda item, stratum: False
    counts = counts_of(_advancing(part.items, advance))
    return Drawing(counts, shares(counts, share, seed), seed)


def _advancing(items: JsonItems, advance: Advance) -> Iterator[Item]:
    last = 0
    for item in items:
        advance(item.end - last)
        last = item.end
        yield item


def _renamed(item: Item, content: bytes, part: Part, copy: int) -> bytes:
    """A record as it is written; with its image folder before its paths, and an id of its own if it comes again."""
    if not part.prefix and not copy:
        return content
    value = item.value
    if not isinstance(value, dict):
        raise RecordError(f"{part.items.where(item.index)}: it is no record. See `roe data check`.")
    if not copy and not any(value.get(field) for field in FIELDS):
        return content
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
