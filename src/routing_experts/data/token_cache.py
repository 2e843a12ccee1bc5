"""Dialogues' tokens on disk, so that of a record only its pictures are left to be read: for runs over the same set.

A cache is named by all that tokens depend on but the sizes of pictures, which it holds: a picture that has changed is
encoded anew. It is written a part at a time and counts once it is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from routing_experts.data.encode import Encoded, Encoder
from routing_experts.data.faults import UNUSABLE
from routing_experts.data.images import load_image, upright_size
from routing_experts.data.mixture.work import AHEAD, Shared, processes
from routing_experts.data.prompts import WRITTEN
from routing_experts.data.records import Record
from routing_experts.data.token_settings import TokenSettings
from routing_experts.errors import TrainingError
from routing_experts.records import save_json

FORMAT = 2
PART = 20_000  # records of one file
COMPLETE = "complete.json"
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, segments, [pictures, 2] widths and heights
NO_TOKENS: Tokens = (np.zeros(0, np.int32), np.zeros(0, np.int16), np.zeros((0, 2), np.int32))  # of the unusable


def cache_name(contents: str, encoder: Encoder) -> str:
    """What a cache is called: a digest of all that tokens depend on.

    Args:
        contents: says which records of which bytes they are.
        encoder: lays them out.
    """
    processor = encoder.processor
    parts = {
        "format": FORMAT,
        "versions": [f"{name} {version(name)}" for name in ("transformers", "tokenizers")],
        "contents": contents,
        "prompt_format": encoder.prompt_format,
        "layout": repr(WRITTEN.get(encoder.prompt_format)),
        "gap": encoder.gap,
        "max_length": encoder.max_length,
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
        "chat_template": processor.chat_template,
        "processor": processor.to_dict(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class TokenCache:
    """A complete cache.

    Args:
        folder: of its parts.
        encoder: for pictures, and for records whose tokens are not here.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder, self.encoder = folder, encoder
        self._parts: dict[int, _Part] = {}

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether a folder holds a cache that was written to its end."""
        return (folder / COMPLETE).is_file()

    @staticmethod
    def check(folder: Path) -> None:
        """Raises ``TrainingError`` if another machine's cache is not seen from this one."""
        if not TokenCache.is_complete(folder):
            raise TrainingError(
                f"{folder} is not there, though the main process wrote it: this machine does not see that folder. Name "
                "one that all machines share (data.token_cache)."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in their process."""
        return self.__dict__ | {"_parts": {}}

    def encode(self, index: int, record: Record) -> Encoded:
        """What the encoder gives of a record.

        Raises:
            RecordError, PromptError: as the encoder does.
        """
        part, place = self._part(index // PART), index % PART
        first, end = part.starts[place : place + 2]
        images = [load_image(image, record.id) for image in record.images]
        if first == end or part.sizes(place) != [list(image.size) for image in images]:
            return self.encoder(record)
        ids, segments = (part.slice(name, first, end).astype(np.int64) for name in ("ids", "segments"))
        return self.encoder.with_pictures(record.id, torch.from_numpy(ids), torch.from_numpy(segments), images)

    def length(self, index: int, record: Record) -> int | None:
        """A record's tokens; None if they are not here, or of pictures of other sizes.

        Raises:
            RecordError: if a picture cannot be read.
        """
        part, place = self._part(index // PART), index % PART
        first, end = part.starts[place : place + 2]
        sizes = [list(upright_size(image, record.id)) for image in record.images]
        return int(end - first) if first < end and part.sizes(place) == sizes else None

    def _part(self, number: int) -> "_Part":
        """Raises ``TrainingError`` if it is not there or damaged."""
        if number not in self._parts:
            path = part_path(self.folder, number)
            try:
                self._parts[number] = _Part(path)
            except FileNotFoundError as error:
                raise TrainingError(
                    f"{path} is not there any more. Run the same command again: its tokens are counted anew then."
                ) from error
            except SafetensorError as error:
                raise TrainingError(
                    f"{path} is damaged ({error}). Delete {self.folder}: its tokens are counted again then."
                ) from error
        return self._parts[number]


class _Part:
    """One file of a cache: where its records begin is in memory, their tokens are not."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="np")
        self.starts, self.pictures = (self._file.get_tensor(name) for name in ("starts", "pictures"))

    def sizes(self, place: int) -> list[list[int]]:
        """Width and height of each picture of a record."""
        first, end = self.pictures[place : place + 2]
        return self.slice("sizes", first, end).tolist() if first < end else []

    def slice(self, name: str, start: int, end: int) -> np.ndarray:
        """Some rows of an array; at least one."""
        rows: np.ndarray = self._file.get_slice(name)[int(start) : int(end)]
        return rows


def build(
    folder: Path,
    records: Any,
    count: int,
    tokenise: "Tokenise",
    workers: int,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a cache of the first records; another process that writes the same one is waited for.

    Args:
        folder: of its parts; it appears once all of them are written.
        records: anything with ``[index]`` giving a ``Record``.
        count: how many of them.
        tokenise: makes tokens of records, in other processes.
        workers: how many of these.
        advance: told of so many more records.

    Raises:
        WorkerError: if one of them has ended.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if TokenCache.is_complete(folder):
            return
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        for left in (unfinished, folder):
            if left.exists():
                shutil.rmtree(left)
        unfinished.mkdir()
        _write(unfinished, records, count, tokenise, workers, advance)
        unfinished.rename(folder)


def _write(
    folder: Path, records: Any, count: int, tokenise: "Tokenise", workers: int, advance: Callable[[int], object]
) -> None:
    part: list[Tokens] = []
    written = 0

    def take(block: Sequence[Record | None], tokens: Sequence[Tokens]) -> None:
        nonlocal written
        for one in tokens:
            part.append(one)
            if len(part) == PART:
                _save(part_path(folder, written), part)
                part.clear()
                written += 1
        advance(len(tokens))

    with processes(workers) as pool:
        shared: Shared[Record | None, Tokens] = Shared(pool, tokenise, take, AHEAD * workers)
        for index in range(count):
            record = _readable(records, index)
            shared.add(record, () if record is None else record.images)
        shared.finish()
    _save(part_path(folder, written), part)
    save_json(folder / COMPLETE, {"format": FORMAT, "records": count})


def _readable(records: Any, index: int) -> Record | None:
    try:
        record: Record = records[index]
    except UNUSABLE:
        return None  # it is told of when it is used
    return record


@dataclass(frozen=True)
class Tokenise:
    """Makes tokens of blocks of records; goes to other processes as it is."""

    settings: TokenSettings

    def __call__(self, block: Sequence[Record | None]) -> list[Tokens]:
        """Ids, segments and pictures' sizes of each; nothing of a record that cannot be used, which is met later."""
        return [self._one(record) for record in block]

    def _one(self, record: Record | None) -> Tokens:
        try:
            if record is not None:
                sizes = [upright_size(image, record.id) for image in record.images]
                encoded = self.settings.encoder.without_pixels(record, sizes)
                ids, segments = encoded.input_ids.numpy(), encoded.segment_ids.numpy()
                return ids.astype(np.int32), segments.astype(np.int16), np.array(sizes, np.int32).reshape(-1, 2)
        except UNUSABLE:
            return NO_TOKENS
        return NO_TOKENS


def _save(path: Path, part: Sequence[Tokens]) -> None:
    """Writes records one behind the other, with where each begins."""
    ids, segments, sizes = ([one[place] for one in part] for place in range(3))
    arrays = {
        "ids": np.concatenate([*ids, np.zeros(0, np.int32)]),
        "segments": np.concatenate([*segments, np.zeros(0, np.int16)]),
        "sizes": np.concatenate([*sizes, np.zeros((0, 2), np.int32)]),
        "starts": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "pictures": np.cumsum([0, *map(len, sizes)], dtype=np.int64),
    }
    save_file(arrays, path)


def part_path(folder: Path, number: int) -> Path:
    """Where a part lies."""
    return folder / f"tokens-{number:05d}.safetensors"
