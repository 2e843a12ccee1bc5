"""Tables of Hugging Face ``datasets``: parquet files, folders of them, and sets on the hub by name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from routing_experts.data.readers.conversation import LLAVA, MESSAGES
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.pictures import FIELDS
from routing_experts.errors import RecordError
from routing_experts.optional import need

PARQUET = ".parquet"
READ = (*FIELDS, LLAVA.field, MESSAGES.field, "id", "task", "tasks")


class TableItems:
    """The rows of a table; pictures stay the bytes that they are until a record is used.

    Args:
        name: how messages name it.
        table: a ``datasets.Dataset``.
    """

    def __init__(self, name: str, table: Any) -> None:
        self.name, self.table = name, _undecoded(table)

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Item]:
        for index, row in enumerate(self.table):
            yield Item(index, row)

    def at(self, item: Item) -> Any:
        """The row of an item's index."""
        return self.table[item.index]

    def digest(self) -> str:
        """What ``datasets`` knows the table's contents by."""
        return str(self.table._fingerprint)

    def where(self, index: int) -> str:
        """The table and the row's number."""
        return f"{self.name}: record {index}"


def is_table(path: Path) -> bool:
    """Whether a path is a parquet file or a folder that holds some."""
    return path.suffix == PARQUET or (path.is_dir() and any(path.glob(f"*{PARQUET}")))


def parquet_table(path: Path) -> TableItems:
    """Parquet files as one table, which stays on disk.

    Raises:
        RecordError: if there are none, or they cannot be read.
    """
    files = sorted(map(str, path.glob(f"*{PARQUET}"))) if path.is_dir() else [str(path)]
    if not path.exists():
        raise RecordError(f"{path}: there is no such file. Correct the path of the records.")
    return TableItems(str(path), _loaded(str(path), "parquet", data_files=files, split="train"))


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
    from datasets.fingerprint import Hasher

    stream = _undecoded(_loaded(name, name, subset, split=split, streaming=True)).take(limit)
    datasets = need("datasets", "data", f"reading {name}")
    rows = datasets.Dataset.from_generator(
        lambda: iter(stream),
        features=stream.features,
        fingerprint=Hasher.hash([name, subset, split, limit]),  # the same in every process and run: fetched once
    )
    return TableItems(name, rows)


def _loaded(name: str, *args: Any, **settings: Any) -> Any:
    datasets = need("datasets", "data", f"reading {name}")
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(*args, **settings)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise RecordError(
            f"{name}: the table cannot be loaded ({reason}). Give a .json or .jsonl file, a folder with metadata.jsonl "
            "or parquet files, or the name of a set on the hub; offline, fetch the set first."
        ) from error


def _undecoded(table: Any) -> Any:
    """The columns that are read, without opening pictures: a row's are bytes and a path.

    Any other column could hold pictures too, whose paths lead anywhere.
    """
    datasets = need("datasets", "data", "reading tables")
    table = table.select_columns([name for name in table.column_names if name in READ])
    features = table.features or {}
    for name in FIELDS:
        feature = features.get(name)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):
            kept = datasets.Image(decode=False)
            table = table.cast_column(name, kept if inner is feature else datasets.List(kept))
    return table
