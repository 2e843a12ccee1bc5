"""Sets joined by weight, or a share of one: records are copied as they are written, in their order.

The same sets, weights and seed give the same bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from pathlib import Path
from typing import Any

from routing_experts.data.mixture.strata import Drawing, Stratum, authors_rule, counts_of, shares, stratum_of
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.data.readers.pictures import FIELDS, checked_name
from routing_experts.data.writing import RecordWriter, as_json
from routing_experts.errors import ConfigError, RecordError
from routing_experts.records import Manifest, ManifestPart, StratumCount, sha256_of

Advance = Callable[[Item], object]


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
        if self.weight is None:
            return 1
        return floor(self.weight) + 2 * (self.weight % 1 > 0)


def join(parts: Sequence[Part], target: Path, seed: int = 0, advance: Advance = lambda item: None) -> Manifest:
    """Writes the parts, one after the other.

    Args:
        parts: what is joined.
        target: the ``.json`` or ``.jsonl`` file to write.
        seed: of what is drawn.
        advance: told of each record, each time that it is read.

    Raises:
        ConfigError: if a part would be written over.
        RecordError: if a part cannot be read to its end, or is of another kind than a file; nothing is written then.
    """
    for part in parts:
        if target.exists() and part.items.path.exists() and target.samefile(part.items.path):
            raise ConfigError(f"{target} is read from: it would be written over. Give another file to write.")
    written: Counter[Stratum] = Counter()
    found: Counter[Stratum] = Counter()
    told = []
    with RecordWriter(target) as writer:
        for number, part in enumerate(parts):
            before, counts = writer.count, counts_of(_told(part.items, advance)) if _draws(part) else Counter()
            for copy, keep in enumerate(_rounds(part, counts, f"{seed}/{number}")):
                for item, content in part.items.with_bytes():
                    advance(item)
                    stratum = stratum_of(item.value)
                    found[stratum] += copy == 0
                    if keep(item):
                        written[stratum] += 1
                        writer.copy(_renamed(item, content, part, copy))
            told.append(
                ManifestPart(
                    name=part.items.path.name,
                    sha256=sha256_of(part.items.path),
                    weight=part.weight,
                    rule="share" if part.weight is not None else "authors",
                    prefix=part.prefix,
                    records=writer.count - before,
                )
            )
    strata = [
        StratumCount(source=source, turns=turns, found=found[source, turns], written=written[source, turns])
        for source, turns in sorted(found)
    ]
    return Manifest(name=target.name, sha256=writer.sha256, records=writer.count, seed=seed, parts=told, strata=strata)


def _told(items: JsonItems, advance: Advance) -> Iterator[Item]:
    for item in items:
        advance(item)
        yield item


def _draws(part: Part) -> bool:
    return part.weight is not None and part.weight % 1 > 0


def _rounds(part: Part, counts: Counter[Stratum], seed: str) -> Iterator[Callable[[Item], bool]]:
    """Which records each reading of a part keeps."""
    if part.weight is None:
        yield authors_rule
        return
    for _ in range(floor(part.weight)):
        yield lambda item: True
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
        value["id"] = f"{value.get('id', item.index)}#{copy + 1}"
    for field in FIELDS:
        if part.prefix and value.get(field):
            value[field] = _below(value[field], f"{part.items.where(item.index)}, field {field}", part)
    return as_json(value)


def _below(named: Any, where: str, part: Part) -> Any:
    if isinstance(named, list):
        return [_below(one, where, part) for one in named]
    if not isinstance(named, str):
        raise RecordError(f"{where}: it is {named!r}, but it holds a path or a list of paths. See `roe data check`.")
    return f"{part.prefix}/{checked_name(named, where, Path(part.prefix))}"
