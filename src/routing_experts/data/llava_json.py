"""LLaVA's JSON layout: a list of records, each with an id, at most a few pictures, and a conversation.

``{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A kite."}]}``. A leading ``{"from": "system"}`` message is allowed; other fields are ignored.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from routing_experts.data.images import load_image
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import ConfigError, RecordError

_SPEAKERS = ("human", "gpt", "system")
_BOM = b"\xef\xbb\xbf"


def load_records(path: str | Path, image_root: str | Path | None = None, limit: int | None = None) -> list[Record]:
    """Reads and checks a whole file; pictures are looked for, but opened only when they are used.

    Args:
        path: the JSON file.
        image_root: the folder that image paths are relative to; the file's own by default.
        limit: reads only so many of the first records; all of them by default.

    Raises:
        ConfigError: if the limit is below 1.
        RecordError: at the first fault, naming the file, the record's index and id, the field, and the remedy.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(
            f"{path}: limit={limit}: it is a count of at least 1. Raise it, or leave it out for all records."
        )
    raw = _parse(path)
    if not isinstance(raw, list):
        raise RecordError(
            f"{path}: the top level is {_kind(raw)}, but LLaVA's layout is a list of records. "
            "Put the records into [ ... ]."
        )
    if not raw:
        raise RecordError(f"{path}: the list has no records; there is nothing to train or evaluate on. Add some.")
    root = path.parent if image_root is None else Path(image_root)
    return [_read_record(item, f"{path}: record {index}", str(index), root) for index, item in enumerate(raw[:limit])]


def save_records(records: Iterable[Record], path: str | Path, image_root: str | Path | None = None) -> None:
    """Writes records so that ``load_records`` reads them back; the JSON file appears only once it is complete.

    Args:
        records: pictures in memory are written as PNG below ``image_root``, in a folder called like the JSON file;
            pictures that are files already must lie below ``image_root``.
        path: the JSON file to write.
        image_root: the folder that image paths are relative to; the file's own by default.

    Raises:
        RecordError: if ``load_records`` would refuse a record, or a picture lies elsewhere.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    layout = []
    for index, record in enumerate(records):
        where = f"{path}: record {index} (id {record.id!r})"
        names = [
            _saved_name(image, f"{path.stem}/{index}-{place}", root, where) for place, image in enumerate(record.images)
        ]
        item = _to_layout(record, names)
        _turns(item, where, len(names))
        for name, image in zip(names, record.images, strict=True):
            _save_picture(image, root / name, record.id)
        layout.append(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(layout, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _parse(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise RecordError(f"{path}: there is no such file. Correct the path of the records.") from error
    except OSError as error:
        raise RecordError(f"{path}: it cannot be read ({error.strerror}). Give a readable JSON file.") from error
    skipped = len(_BOM) if content.startswith(_BOM) else 0
    try:
        text = content[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: byte {error.start + skipped} is not UTF-8 ({error.reason}), which JSON must be in. "
            "Convert the file, or fetch it again if it is damaged."
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        offset = skipped + len(text[: error.pos].encode())
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            raise RecordError(
                f"{path}: another JSON value begins at byte {offset}, so this is JSON Lines, but LLaVA's layout is one "
                "list of records. Join the lines with commas and put them into [ ... ]."
            ) from error
        raise RecordError(
            f"{path}: record {_complete_items(text)}: not JSON at byte {offset} of {len(content)} ({error.msg}); every "
            "record before it was read completely. Mend the file there, or fetch it again if it was cut short."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RecordError(
            f"{path}: it nests too deeply, or holds a number too long, to be a set of records ({error}). Correct it."
        ) from error


def _complete_items(text: str) -> int:
    """How many items of a broken JSON list can be read before it breaks."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def after_space(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position, count = after_space(0), 0
    if not text.startswith("[", position):
        return 0
    while True:
        try:
            position = decoder.raw_decode(text, after_space(position + 1))[1]
        except json.JSONDecodeError:
            return count
        count += 1
        position = after_space(position)
        if not text.startswith(",", position):
            return count


def _read_record(item: Any, where: str, default_id: str, root: Path) -> Record:
    if not isinstance(item, dict):
        raise RecordError(
            f"{where}: it is {_kind(item)}, but a record is an object with `conversations` and, for pictures, `image`. "
            "Write it so, or take it out."
        )
    name = item.get("id", default_id)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RecordError(f"{where}, field id: it is {_kind(name)}, but ids are strings or integers. Correct it.")
    where = f"{where} (id {name!r})"
    images = _image_paths(item.get("image"), where, root)
    system, turns = _turns(item, where, len(images))
    return Record(str(name), turns, images, system)


def _image_paths(value: Any, where: str, root: Path) -> tuple[Path, ...]:
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    where = f"{where}, field image"
    if not names or not all(isinstance(name, str) and name for name in names):
        raise RecordError(
            f"{where}: it is {value!r}, but it holds a path or a list of paths. "
            "Name the pictures, or leave the field out of a record without any."
        )
    return tuple(_image_path(name, where, root) for name in names)


def _image_path(name: str, where: str, root: Path) -> Path:
    windows = PureWindowsPath(name)  # reads / and \ alike, so that a path means the same on every system
    if PurePosixPath(name).is_absolute() or windows.anchor or ".." in windows.parts or "\0" in name:
        raise RecordError(
            f"{where}: {name!r} leaves the image folder, so a file of records could make this program read any file. "
            f"Give a path relative to {root}, without `..`."
        )
    path = root / name
    try:
        if path.is_file():
            return path
        problem = "is a folder, not a picture" if path.is_dir() else "is not there"
    except OSError as error:
        problem = f"cannot be looked at ({error.strerror})"
    raise RecordError(
        f"{where}: {path} {problem}. Correct the path, put the picture in place, or name another image folder "
        "(`data.images` in a recipe)."
    )


def _turns(item: dict[str, Any], where: str, num_images: int) -> tuple[str, tuple[Turn, ...]]:
    """Checks the conversation; returns the system prompt and the turns."""
    messages = item.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"{where}, field conversations: it is {_kind(messages)}, but it must list a question and its answer at "
            'least. Write [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}].'
        )
    spoken = [_message(message, f"{where}, conversations[{place}]") for place, message in enumerate(messages)]
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else ""
    shift = len(messages) - len(spoken)
    for place, (speaker, _) in enumerate(spoken):
        due = ("human", "gpt")[place % 2]
        if speaker != due:
            raise RecordError(
                f"{where}, conversations[{place + shift}].from: it is {speaker!r} where {due!r} must "
                "speak: questions and answers alternate, beginning with a question (after a system prompt, if "
                "any). Put the messages in order, or join neighbours of one speaker."
            )
    if not spoken or len(spoken) % 2:
        raise RecordError(
            f"{where}, field conversations: the last question has no answer ({len(spoken)} messages), so nothing could "
            "be learned from it. Add the answer of gpt, or take the question out."
        )
    _check_placeholders(system, spoken, where, shift, num_images)
    tasks = _tasks(item, where, len(spoken) // 2)
    pairs = zip(spoken[::2], spoken[1::2], tasks, strict=True)
    return system, tuple(Turn(question, answer, task) for (_, question), (_, answer), task in pairs)


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RecordError(f"{where}: it is {_kind(message)}, but a message is an object with `from` and `value`.")
    speaker, value = message.get("from"), message.get("value")
    if speaker not in _SPEAKERS:
        raise RecordError(
            f"{where}.from: it is {speaker!r}, but it must be one of {', '.join(_SPEAKERS)}. Rename the speaker."
        )
    if not isinstance(value, str):
        raise RecordError(f"{where}.value: it is {_kind(value)}, but it must be text. Write it as a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where}.value: character {error.start} is half of a surrogate pair ({value[error.start]!a}), which no "
            "tokenizer can read. Mend the text's encoding."
        ) from error
    if not value.strip() and speaker == "gpt":
        raise RecordError(
            f"{where}.value: the answer is empty, so nothing could be learned. Fill it in, or take the turn out."
        )
    return speaker, value


def _check_placeholders(
    system: str, spoken: Sequence[tuple[str, str]], where: str, shift: int, num_images: int
) -> None:
    for place, (speaker, value) in enumerate((("system", system), *spoken), start=shift - 1):
        if speaker != "human" and IMAGE_PLACEHOLDER in value:
            raise RecordError(
                f"{where}, conversations[{place}].value: {IMAGE_PLACEHOLDER} stands in a message from {speaker}, but "
                "pictures belong to questions. Move it to the question, or spell it differently if it is meant as text."
            )
    asked = sum(value.count(IMAGE_PLACEHOLDER) for _, value in spoken)
    if asked != num_images:
        raise RecordError(
            f"{where}, field image: {num_images} pictures, but the questions have {asked} {IMAGE_PLACEHOLDER} "
            "placeholders. Each picture needs exactly one, in order: correct the questions or the image list."
        )


def _tasks(item: dict[str, Any], where: str, num_turns: int) -> list[str]:
    """``tasks`` names each turn's task; ``task`` one for all; without either they are empty."""
    if "tasks" not in item:
        task = item.get("task", "")
        if not isinstance(task, str):
            raise RecordError(f"{where}, field task: it is {_kind(task)}, but it must be text. Write it as a string.")
        return [task] * num_turns
    tasks = item["tasks"]
    if not isinstance(tasks, list) or len(tasks) != num_turns or not all(isinstance(task, str) for task in tasks):
        raise RecordError(
            f"{where}, field tasks: it is {tasks!r}, but it must list one name for each of the {num_turns} turns. "
            "Correct the list; an empty string names none."
        )
    return tasks


def _to_layout(record: Record, images: list[str]) -> dict[str, Any]:
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


def _saved_name(image: Path | Image.Image, stem: str, root: Path, where: str) -> str:
    """A picture's path relative to the image folder, in the form that the JSON file holds."""
    if isinstance(image, Image.Image):
        return f"{stem}.png"
    path, top = Path(image).absolute(), root.absolute()
    if not path.is_relative_to(top):
        raise RecordError(
            f"{where}: picture {image} lies outside the image folder {root}, so the file of records could not name it. "
            "Move it there, give another image_root, or pass the opened picture to have it written."
        )
    name = path.relative_to(top).as_posix()
    _image_path(name, where, root)
    return name


def _save_picture(image: Path | Image.Image, path: Path, record_id: str) -> None:
    if isinstance(image, Image.Image):
        path.parent.mkdir(parents=True, exist_ok=True)
        load_image(image, record_id).save(path)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing or null"}
    if value == [] and isinstance(value, list):
        return "empty"
    return names.get(type(value), f"a number ({value})")
