"""What a source holds of a record, made into one: LLaVA's layout and that of chat messages.

LLaVA's: ``{"id": "7", "image": "coco/7.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A kite."}]}``. Chat messages: ``{"images": ["coco/7.jpg"], "messages": [{"role": "user",
"content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A kite."}]}``; a
content that is text has its placeholders in it. A leading message from ``system`` is allowed in both; fields that are
not read are ignored.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from routing_experts.data.readers.conversation import LLAVA, MESSAGES, read_turns
from routing_experts.data.readers.items import kind
from routing_experts.data.readers.pictures import check_characters, picture, picture_values
from routing_experts.data.records import Picture, Record
from routing_experts.errors import RecordError, shown

Find = Callable[[Any, str, Path], Picture]


def read_record(item: Any, where: str, index: int, root: Path, find: Find = picture) -> Record:
    """Checks one record; its pictures are looked for, but opened only when they are used.

    Args:
        item: what the source holds.
        where: how messages name it.
        index: in the source; its id where it has none.
        root: the folder that image paths are relative to.
        find: makes a picture of what a field holds, its place in words, and the folder.

    Raises:
        RecordError: at the first fault, naming the record, the field, and the remedy.
    """
    if not isinstance(item, dict):
        raise RecordError(
            f"{where}: it is {kind(item)}, but a record is an object with `conversations` and, for pictures, `image`. "
            "Write it so, or take it out."
        )
    name = str(index) if item.get("id") is None else item["id"]
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise RecordError(f"{where}, field id: it is {kind(name)}, but ids are strings or integers. Correct it.")
    if isinstance(name, str) and not name.isascii():
        check_characters(name, f"{where}, field id")
    where = f"{where} (id {shown(name)})"
    layouts = [layout for layout in (LLAVA, MESSAGES) if item.get(layout.field) is not None]
    if len(layouts) > 1:
        raise RecordError(f"{where}, fields messages and conversations: it has two conversations. Keep one of them.")
    field, values = picture_values(item, where)
    images = tuple(find(value, f"{where}, field {field}", root) for value in values)
    system, turns = read_turns(item, layouts[0] if layouts else LLAVA, where, len(images))
    return Record(str(name), turns, images, system)
