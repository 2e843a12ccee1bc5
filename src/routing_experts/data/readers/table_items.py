"""Tables of Hugging Face ``datasets``: parquet files, folders of them, and sets on the hub by name."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routing_experts.data.readers.conversation import LLAVA, MESSAGES
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.pictures import FIELDS
from routing_experts.errors import RecordError, RoutingExpertsError, first_line, shortened
from routing_experts.optional import need

PARQUET = ".parquet"
FOOTER = 1 << 16  # bytes at a file's end, or more than its list of parts takes
READ = (*FIELDS, LLAVA.field, MESSAGES.field, "id", "task", "tasks")


class TableItems:
    """The rows of a table; pictures stay the bytes that they are until a record is used.

    Args:
        name: how messages name it.
        table: a ``datasets.Dataset``, or a stream, which can only be passed through.
        files: that it was made of, where they are this machine's.
    """

    def __init__(self, name: str, table: Any, files: Sequence[Path] = ()) -> None:
        self.name, self.files = name, files
        with _as_record_error(name):
            self.table = _undecoded(table)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Item]:
        with _as_record_error(self.name):
            for index, row in enumerate(self.table):
                yield Item(index, {name: value for name, value in row.items() if name in READ})

    def at(self, item: Item) -> Any:
        """The row of an item's index."""
        return self.table[item.index]

    def digest(self) -> str:
        """See ``table_digest``; what ``datasets`` knows it by for a set of the hub."""
        return table_digest(self.files) if self.files else str(self.table._fingerprint)

    def where(self, index: int) -> str:
        """The table and the row's number."""
        return f"{self.name}: record {index}"


def is_table(path: Path) -> bool:
    """Whether a path is a parquet file or a folder that holds some."""
    return bool(parquet_files(path))


def parquet_table(path: Path, once: bool = False) -> TableItems:
    """Parquet files as one table, of which ``datasets`` keeps a copy on disk whose rows are found by number.

    Args:
        path: of a file, or a folder of them.
        once: rows are passed through once, without a copy.

    Raises:
        RecordError: if there are none, or they cannot be read.
    """
    if not path.exists():
        raise RecordError(f"{path}: there is no such file. Correct the path of the records.")
    files = parquet_files(path)
    names = [str(file) for file in files]
    table = _loaded(str(path), "parquet", data_files=names, split="train", streaming=once)
    return TableItems(str(path), table, files)


def parquet_files(path: Path) -> list[Path]:
    """A parquet file, or those of a folder; none otherwise."""
    if not path.is_dir():
        return [path] if path.suffix == PARQUET else []
    return sorted(file for file in path.glob(f"*{PARQUET}") if file.is_file())


def table_digest(files: Sequence[Path]) -> str:
    """SHA-256 of parquet files' sizes and ends, where each lists its parts: pictures in them are not read for it."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER))
            digest.update(f"{path.name} {size}\n".encode() + file.read())
    return digest.hexdigest()


def hub_table(name: str, subset: str | None, split: str, limit: int | None) -> TableItems:
    """A set of the hub. With a limit it is streamed, and only so many rows are fetched and kept on disk.

    Args:
        name: such as ``HuggingFaceH4/llava-instruct-mix-vsft``.
        subset: one of its configurations; None for its only one.
        split: of the set.
        limit: takes so many of the first rows; None for all.

    Raises:
        RecordError: if it is not known or cannot be fetched.
    """
    if limit is None:
        return TableItems(name, _loaded(name, name, subset, split=split))
    datasets = need("datasets", "data", f"reading {name}")
    with _as_record_error(name):
        builder = datasets.load_dataset_builder(name, subset)
        stream = _undecoded(builder.as_streaming_dataset(split=split)).take(limit)
        asked = [name, builder.hash, subset, split, limit]  # the same in every process and run: fetched once
        rows = datasets.Dataset.from_generator(
            lambda: iter(stream), features=stream.features, fingerprint=datasets.fingerprint.Hasher.hash(asked)
        )
    return TableItems(name, rows)


def hub_stream(name: str, subset: str | None, split: str) -> TableItems:
    """A set of the hub to be passed through once, a row at a time; raises as ``hub_table`` does."""
    return TableItems(name, _loaded(name, name, subset, split=split, streaming=True))


def _loaded(name: str, *args: Any, **settings: Any) -> Any:
    datasets = need("datasets", "data", f"reading {name}")
    with _as_record_error(name):
        return datasets.load_dataset(*args, **settings)


@contextmanager
def _as_record_error(name: str) -> Iterator[None]:
    """What ``datasets`` and the hub raise becomes a ``RecordError``."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of the client, timeouts among them; the hub's own are of them

    try:
        yield
    except RoutingExpertsError:
        raise
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        reason = shortened(first_line(error))
        raise RecordError(
            f"{name}: the table cannot be loaded ({reason}). Give a .json or .jsonl file, a folder with "
            "metadata.jsonl or parquet files, or the name of a set on the hub; offline, fetch the set first."
        ) from error


def _undecoded(table: Any) -> Any:
    """The columns that are read, without opening pictures: a row's are bytes and a path.

    Any other column could hold pictures too, whose paths lead anywhere.
    """
    datasets = need("datasets", "data", "reading tables")
    if table.column_names is not None:  # some streams do not tell: their rows are cut down as they come
        table = table.select_columns([name for name in table.column_names if name in READ])
    features = table.features or {}
    for name in FIELDS:
        feature = features.get(name)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):
            kept = datasets.Image(decode=False)
            table = table.cast_column(name, kept if inner is feature else datasets.List(kept))
    return table
