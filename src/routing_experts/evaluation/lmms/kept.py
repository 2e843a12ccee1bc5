"""Finished samples, a JSON object a line: what each got and what it cost; read back, so that nothing is asked twice.

A folder belongs to one model, asked in one way: ``asked.json`` says which, and ``samples-N.jsonl`` is process N's.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routing_experts.data.images import load_image
from routing_experts.data.records import Record
from routing_experts.errors import EvaluationError
from routing_experts.evaluation.lmms.samples import Asked
from routing_experts.records import save_json

ASKED_NAME = "asked.json"


class SampleLog:
    """The finished samples of a folder.

    Args:
        folder: made if it is not there; None keeps nothing.
        asked_as: plain values that say which model answers, and how it is asked.
        rank: of this process.

    Raises:
        EvaluationError: if the folder holds samples of another model, or of one asked otherwise.
    """

    def __init__(self, folder: Path | None, asked_as: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self._rank = folder, rank
        self._kept: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._claim(folder / ASKED_NAME, dict(asked_as))
            _cut_half_line(folder / f"samples-{rank}.jsonl")
            for path in sorted(folder.glob("samples-*.jsonl")):
                self._read(path)
        except OSError as error:
            raise EvaluationError(
                f"{folder} cannot hold samples ({error.strerror}). Give another folder (log=…)."
            ) from error

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder."""
        return self.folder is not None

    def get(self, asked: Asked, key: str) -> dict[str, Any] | None:
        """What a sample got earlier, if it was shown the same, may be kept, and was answered by a word at least."""
        found = self._kept.get(asked.id)
        if found is None or found["key"] != key or not asked.can_be_kept:
            return None
        return None if found.get("text") == "" else found  # silence may have been mended since

    def add(self, line: dict[str, Any]) -> None:
        """Notes a finished sample, on disk when this returns."""
        if self.folder is not None:
            self._kept[line["id"]] = line
            with (self.folder / f"samples-{self._rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _claim(self, path: Path, asked_as: dict[str, Any]) -> None:
        if not path.is_file():
            save_json(path, asked_as)
            return
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise EvaluationError(
                f"{path} is not JSON ({error}). Restore it, or give another folder (log=…)."
            ) from error
        differing = [name for name in sorted(there.keys() | asked_as.keys()) if there.get(name) != asked_as.get(name)]
        if differing:
            told = "; ".join(f"{name}: {there.get(name)!r} there, {asked_as.get(name)!r} now" for name in differing)
            raise EvaluationError(
                f"{path.parent} holds samples that were asked otherwise ({told}): mixed, they would be nobody's. Give "
                "another folder (log=…), or delete it."
            )

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text) if text else None
            except ValueError as error:
                if number == len(lines):  # a killed process left half a line; its successor cuts it
                    continue
                raise EvaluationError(f"{path}, line {number} is not JSON ({error}). Take the line out.") from error
            if line is not None:
                self._kept[line["id"]] = line


def _cut_half_line(path: Path) -> None:
    """Takes away what a killed process left behind the last whole line, so that the next line stands alone."""
    if path.is_file():
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with path.open("r+b") as file:
                file.truncate(whole)


def key_of(record: Record, asked: Asked) -> str:
    """A hash of all that a sample is shown and asked."""
    digest = hashlib.sha256()
    turns = [(turn.question, turn.answer) for turn in record.turns]
    digest.update(json.dumps([record.system, turns, asked.generation, asked.until], sort_keys=True).encode())
    for image in record.images:
        picture = load_image(image, record.id)
        digest.update(f"{picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()[:24]
