"""Writing records in LLaVA's layout, one after the other; a file appears only once it is complete."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from routing_experts.data.images import load_image
from routing_experts.data.readers.json_items import LINES
from routing_experts.data.readers.layouts import read_record
from routing_experts.data.readers.pictures import path_below
from routing_experts.data.records import Picture, Record
from routing_experts.errors import RecordError


class RecordWriter:
    """A list in ``.json``, a record a line; or JSON Lines in ``.jsonl``. Nothing is left behind if writing fails.

    Args:
        path: the file to write; folders above it are made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, path.suffix.lower() in LINES
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._digest, self.count = hashlib.sha256(), 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._unfinished.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None and not self.lines:
                self._write(b"\n]\n" if self.count else b"[]\n")
            self._file.close()
            if kind is None:
                os.replace(self._unfinished, self.path)
        finally:
            self._file.close()
            self._unfinished.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of what was written, once it is complete."""
        return self._digest.hexdigest()

    def add(self, item: dict[str, Any]) -> None:
        """Writes a record that is laid out already."""
        self.copy(as_json(item))

    def copy(self, content: bytes) -> None:
        """Writes a record's JSON as it is; in JSON Lines without the line ends that it may hold."""
        if self.lines:
            content = as_json(json.loads(content)) if b"\n" in content else content
            self._write(content + b"\n")
        else:
            self._write((b",\n" if self.count else b"[\n") + content)
        self.count += 1

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)


def as_json(value: Any) -> bytes:
    """A value in one line; readable, unless it holds what UTF-8 cannot."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def save_records(records: Iterable[Record], path: str | Path, image_root: str | Path | None = None) -> None:
    """Writes records so that ``load_records`` reads them back.

    Args:
        records: pictures in memory are written as PNG below ``image_root``, in a folder called like the JSON file;
            pictures that are files already must lie below ``image_root``.
        path: the ``.json`` or ``.jsonl`` file to write.
        image_root: the folder that image paths are relative to; the file's own by default.

    Raises:
        RecordError: if ``load_records`` would refuse a record, or a picture lies elsewhere.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    with RecordWriter(path) as writer:
        for index, record in enumerate(records):
            where = f"{path}: record {index} (id {record.id!r})"
            stem = f"{path.stem}/{index}"
            names = [_saved_name(image, f"{stem}-{n}", root, where) for n, image in enumerate(record.images)]
            item = to_layout(record, names)
            read_record(item, f"{path}: record {index}", index, root, lambda value, where, root: root / value)
            for name, image in zip(names, record.images, strict=True):
                _save_picture(image, root / name, record.id)
            writer.add(item)


def to_layout(record: Record, images: list[str]) -> dict[str, Any]:
    """A record in LLaVA's layout, its pictures by name."""
    item: dict[str, Any] = {"id": record.id}
    if images:
        item["image"] = images[0] if len(images) == 1 else images
    spoken = [("system", record.system)] if record.system else []
    for turn in record.turns:
        spoken += [("human", turn.question), ("gpt", turn.answer)]
    item["conversations"] = [{"from": speaker, "value": value} for speaker, value in spoken]
    if any(turn.task for turn in record.turns):
        item["tasks"] = [turn.task for turn in record.turns]
    return item


def _saved_name(image: Picture, stem: str, root: Path, where: str) -> str:
    """A picture's path relative to the image folder, in the form that the JSON file holds."""
    if not isinstance(image, Path):
        return f"{stem}.png"
    path, top = image.absolute(), root.absolute()
    if not path.is_relative_to(top):
        raise RecordError(
            f"{where}: picture {image} lies outside the image folder {root}, so the file of records could not name it. "
            "Move it there, give another image_root, or pass the opened picture to have it written."
        )
    name = path.relative_to(top).as_posix()
    path_below(name, f"{where}, field image", root)
    return name


def _save_picture(image: Picture, path: Path, record_id: str) -> None:
    if not isinstance(image, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        load_image(image, record_id).save(path)
