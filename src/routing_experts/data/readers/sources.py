"""Which reader a source takes, and its records: checked once, found again by their places, read when they are asked."""

from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from routing_experts.data.faults import Fault
from routing_experts.data.readers.items import Item, Items
from routing_experts.data.readers.json_items import LINES, JsonItems
from routing_experts.data.readers.layouts import read_record
from routing_experts.data.readers.table_items import (
    TableItems,
    hub_stream,
    hub_table,
    is_table,
    parquet_files,
    parquet_table,
    table_digest,
)
from routing_experts.data.records import Record
from routing_experts.errors import ConfigError, RecordError
from routing_experts.records import digest_of

METADATA = "metadata.jsonl"
SPLIT = "train"


class Source(NamedTuple):
    """Items, and the folder that their image paths are relative to."""

    items: Items
    root: Path

    def record(self, item: Item) -> Record:
        """Raises ``RecordError`` if it is none."""
        return read_record(item.value, self.items.where(item.index), item.index, self.root)


def open_source(
    name: str | Path,
    images: str | Path | None = None,
    subset: str | None = None,
    split: str = SPLIT,
    limit: int | None = None,
    once: bool = False,
) -> Source:
    """The reader for a file, a folder or a set on the hub.

    Args:
        name: a ``.json`` or ``.jsonl`` file, a folder with ``metadata.jsonl``, a ``.parquet`` file or a folder of
            them, or a set's name on the hub.
        images: the folder that image paths are relative to; the file's own by default.
        subset, split: of a set on the hub.
        limit: how many of a hub's set are fetched.
        once: records are passed through once, so that no copy of a table need be kept.

    Raises:
        ConfigError: for a subset or split of what is no set on the hub.
        RecordError: if there is nothing of that name, or it cannot be read.
        MissingExtraError: for tables, if what reads them is not installed.
    """
    path = Path(name)
    root = Path(images) if images is not None else None
    if path.is_dir() and (path / METADATA).is_file():
        _check_hub_s_own(path, subset, split)
        return Source(JsonItems(path / METADATA), root or path)
    if is_table(path):
        _check_hub_s_own(path, subset, split)
        return Source(parquet_table(path, once), root or (path if path.is_dir() else path.parent))
    if path.suffix.lower() in (".json", *LINES) or path.exists():
        _check_is_file(path)
        _check_hub_s_own(path, subset, split)
        return Source(JsonItems(path), root or path.parent)
    if str(name).count("/") == 1:
        table = hub_stream(str(name), subset, split) if once else hub_table(str(name), subset, split, limit)
        return Source(table, root or Path())
    raise RecordError(f"{name}: there is no such file. Correct the path of the records.")


def _check_hub_s_own(path: Path, subset: str | None, split: str) -> None:
    """Raises ``ConfigError`` for settings of a hub's set where the records lie on this machine."""
    if subset is not None or split != SPLIT:
        raise ConfigError(
            f"{path} with subset={subset!r}, split={split!r}: these are of sets on the hub, and would be ignored. "
            "Leave them out, or name a set on the hub."
        )


def contents_of(name: str | Path) -> str | None:
    """What tells a source on this machine from one of other records; None for a set on the hub."""
    path = Path(name)
    if (path / METADATA).is_file():
        return digest_of([path / METADATA])
    if files := parquet_files(path):
        return table_digest(files)
    return digest_of([path]) if path.is_file() else None


def _check_is_file(path: Path) -> None:
    if not path.exists():
        raise RecordError(f"{path}: there is no such file. Correct the path of the records.")
    if path.is_dir():
        raise RecordError(
            f"{path}: the folder has neither {METADATA} nor parquet files. Give a file of records, or a folder that "
            "holds one of these."
        )


class Records:
    """Records by number, each parsed when it is asked for: of a file of gigabytes only places are in memory.

    Args:
        source: where they are read.
        starts, ends: their places in it.
    """

    def __init__(self, source: Source, starts: "array[int]", ends: "array[int]") -> None:
        self.source, self.starts, self.ends = source, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Record:
        item = Item(index, None, self.starts[index], self.ends[index])
        return self.source.record(replace(item, value=self.source.items.at(item)))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def load_records(
    name: str | Path,
    images: str | Path | None = None,
    limit: int | None = None,
    subset: str | None = None,
    split: str = SPLIT,
    faults: list[Fault] | None = None,
) -> Records:
    """Reads and checks a source once; a table's rows are checked when they are used.

    Args:
        name, images, subset, split: see ``open_source``.
        limit: reads only so many of the first records; all of them by default.
        faults: takes what is wrong with records, which keep their place then and are refused when they are used; None
            to raise at the first.

    Raises:
        ConfigError: if the limit is below 1.
        RecordError: at the first fault, naming the source, the record's index and id, the field, and the remedy.
    """
    if limit is not None and limit < 1:
        raise ConfigError(
            f"{name}: limit={limit}: it is a count of at least 1. Raise it, or leave it out for all records."
        )
    source = open_source(name, images, subset, split, limit)
    if isinstance(source.items, TableItems):
        none = array("q", bytes(8 * min(len(source.items), limit or len(source.items))))
        return Records(source, none, none)
    starts, ends = array("q"), array("q")
    for item in source.items:
        if limit is not None and item.index >= limit:
            break
        try:
            source.record(item)
        except RecordError as error:
            if faults is None:
                raise
            faults.append(Fault(item.index, str(error)))
        starts.append(item.start)
        ends.append(item.end)
    return Records(source, starts, ends)
