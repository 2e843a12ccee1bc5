"""JSON files of records, a list or JSON Lines, read a piece at a time with every record's place in bytes.

Parsers for JSON in streams do not tell where a value lies. Here that is the point: a file that is cut short is refused
at its byte, records are copied as they are written, and any one is found again without those before it.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from routing_experts.data.readers.items import Item, kind
from routing_experts.errors import RecordError
from routing_experts.records import digest_of

PIECE = 1 << 20  # bytes read at a time
# Text of a broken literal or escape that a piece may have cut off: `\ud83d\ude0` is the longest.
SLACK = 12
MAX_RECORD = 64 << 20  # characters: longer than any dialogue, and little enough to hold
LINES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonItems:
    """The records of a file: a list in ``.json``, a value a line in ``.jsonl``.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._seen: tuple[int, int] | None = None  # the file's size and time when its places were told

    def __iter__(self) -> Iterator[Item]:
        with _opened(self.path) as file:
            self._seen = _state(self.path)
            if self.path.suffix.lower() in LINES:
                yield from _lines(self.path, file)
            else:
                yield from _Text(self.path, file).items()

    def with_bytes(self) -> Iterator[tuple[Item, bytes]]:
        """All items with what the file says of each."""
        with _opened(self.path) as file:
            for item in self:
                file.seek(item.start)
                yield item, file.read(item.end - item.start).strip()

    def at(self, item: Item) -> Any:
        """Parses the bytes at an item's place.

        Raises:
            RecordError: if the file has changed since its places were told.
        """
        if self._seen not in (None, _state(self.path)):
            raise RecordError(
                f"{self.path} has changed since its records were counted: they lie elsewhere now. Leave it alone while "
                "it is read, and begin anew."
            )
        with _opened(self.path) as file:
            file.seek(item.start)
            return json.loads(file.read(item.end - item.start))

    def digest(self) -> str:
        """Of the file's bytes."""
        return digest_of([self.path])

    def where(self, index: int) -> str:
        """The file and the record's number."""
        return f"{self.path}: record {index}"


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return found.st_size, found.st_mtime_ns


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> RecordError:
    if isinstance(error, FileNotFoundError):
        return RecordError(f"{path}: there is no such file. Correct the path of the records.")
    return RecordError(f"{path}: it cannot be read ({error.strerror}). Give a readable JSON file.")


class _Text:
    """The undigested end of a file's text.

    Attributes:
        text: what was decoded and not yet passed.
        position: in it.
        offset: the byte at the position.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.decoder, self.parser = getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self.text, self.position, self.read, self.is_whole = "", 0, 0, False
        self.offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(self.offset)
        self.read = self.offset

    def items(self) -> Iterator[Item]:
        """The values of the list."""
        index = 0
        if self._next() != "[":
            raise self._no_list()
        self._pass(self.position + 1)
        if self._next() == "]":
            self._close(index)
            return
        while True:
            self._next()
            start = self.offset
            value = self._value(index)
            yield Item(index, value, start, self.offset)
            index += 1
            mark = self._next()
            if mark == "]":
                self._close(index)
                return
            if mark != ",":
                raise self._broken(index, "expecting ',' or ']'")
            self._pass(self.position + 1)

    def _close(self, count: int) -> None:
        """Nothing may follow the list, and something must be in it."""
        self._pass(self.position + 1)
        if self._next():
            raise self._broken(count, "more behind the end of the list")
        if not count:
            raise RecordError(
                f"{self.path}: the list has no records; there is nothing to train or evaluate on. Add some."
            )

    def _next(self) -> str:
        """Passes white space; the character that follows, or nothing at the end."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self._pass(match.end())
            if self.position < len(self.text) or not self._more():
                return self.text[self.position : self.position + 1]

    def _pass(self, position: int) -> None:
        passed = self.text[self.position : position]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self.position = position

    def _value(self, index: int) -> Any:
        """Parses one value, reading on where it goes beyond what is there."""
        wanted = PIECE
        while True:
            try:
                value, end = self.parser.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - SLACK
                within = error.pos - self.position
                if is_cut and len(self.text) - self.position > MAX_RECORD:
                    raise _endless(self.path, index, self.offset) from error
                if is_cut and self._more(wanted):
                    wanted *= 2  # a value of any length is parsed a few times at most
                    continue
                raise self._broken(index, error.msg, within) from error
            except (RecursionError, ValueError) as error:
                raise RecordError(
                    f"{self.path}: record {index} nests too deeply, or holds a number too long, to be a record "
                    f"({error}). Correct it."
                ) from error
            is_bare, length = self.text[self.position] not in '{["', end - self.position
            if is_bare and end > len(self.text) - SLACK and self._more(wanted):
                continue  # a number may go on
            self._pass(self.position + length)
            return value

    def _more(self, size: int | None = None) -> bool:
        """Decodes another piece; False at the end of the file."""
        if self.is_whole:
            return False
        piece = self.file.read(PIECE if size is None else size)
        self.is_whole = not piece
        try:
            decoded = self.decoder.decode(piece, final=self.is_whole)
        except UnicodeDecodeError as error:
            byte = self.read + len(piece) - len(error.object) + error.start
            raise RecordError(
                f"{self.path}: byte {byte} is not UTF-8 ({error.reason}), which JSON must be in. Convert the file, or "
                "fetch it again if it is damaged."
            ) from error
        self.read += len(piece)
        self.text, self.position = self.text[self.position :] + decoded, 0
        return bool(decoded) or self._more(size)

    def _broken(self, index: int, problem: str, ahead: int = 0) -> RecordError:
        """What is wrong with the text so many characters ahead."""
        self._pass(self.position + ahead)
        return RecordError(
            f"{self.path}: record {index}: not JSON at byte {self.offset} of {self.size} ({problem}); every record "
            "before it was read completely. Mend the file there, or fetch it again if it was cut short."
        )

    def _no_list(self) -> RecordError:
        """What a file holds that does not begin a list."""
        if self._next() == "":
            return self._broken(0, "the file is empty")
        value = self._value(0)
        if self._next():
            return RecordError(
                f"{self.path}: another JSON value begins at byte {self.offset}, so this is JSON Lines, but a .json "
                "file is one list of records. Call it .jsonl, or put the records into [ ... ]."
            )
        return RecordError(
            f"{self.path}: the top level is {kind(value)}, but a .json file is a list of records. Put the records into "
            "[ ... ]."
        )


def _lines(path: Path, file: BinaryIO) -> Iterator[Item]:
    """A value a line; empty lines are passed over."""
    index, start = 0, 0
    while line := file.readline(MAX_RECORD + 1):
        if len(line) > MAX_RECORD:
            raise _endless(path, index, start)
        content = line.removeprefix(_BOM) if start == 0 else line
        if content.strip():
            first, end = start + len(line) - len(content), start + len(line)
            yield Item(index, _parsed(path, index, first, content), first, end)
            index += 1
        start += len(line)
    if not index:
        raise RecordError(f"{path}: the file has no records; there is nothing to train or evaluate on. Add some.")


def _endless(path: Path, index: int, start: int) -> RecordError:
    return RecordError(
        f"{path}: record {index}, which begins at byte {start}, has no end within {MAX_RECORD >> 20} MB: a text in it "
        "may never be closed, or a .jsonl file hold its records in one line. Mend it there, or call it .json if it is "
        "one list."
    )


def _parsed(path: Path, index: int, start: int, line: bytes) -> Any:
    """One line's value."""
    try:
        text = line.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: byte {start + error.start} is not UTF-8 ({error.reason}), which JSON must be in. Convert the "
            "file, or fetch it again if it is damaged."
        ) from error
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path}: record {index}: not JSON at byte {start + len(text[: error.pos].encode())} ({error.msg}); a "
            ".jsonl file holds one record a line. Mend the line, or fetch the file again if it was cut short."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecordError(
            f"{path}: record {index} nests too deeply, or holds a number too long, to be a record ({error}). Correct "
            "it."
        ) from error
