"""Conversations as turns: who speaks when, answers that are there, pictures that belong to questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routing_experts.data.readers.items import kind
from routing_experts.data.readers.pictures import check_characters
from routing_experts.data.records import IMAGE_PLACEHOLDER, Turn
from routing_experts.errors import RecordError, shown

SYSTEM = "system"


@dataclass(frozen=True)
class Layout:
    """How a record names its conversation.

    Attributes:
        field: that lists the messages.
        speaker, text: of a message.
        asks, answers: the speakers; ``system`` is a third, before both.
    """

    field: str
    speaker: str
    text: str
    asks: str
    answers: str


LLAVA = Layout("conversations", "from", "value", "human", "gpt")
MESSAGES = Layout("messages", "role", "content", "user", "assistant")


def read_turns(item: Mapping[str, Any], layout: Layout, where: str, num_images: int) -> tuple[str, tuple[Turn, ...]]:
    """Checks a record's conversation; returns the system prompt and the turns.

    Args:
        item: the record.
        layout: of its conversation.
        where: how messages name it.
        num_images: its pictures; each has one placeholder, in a question.

    Raises:
        RecordError: at the first fault, naming the field.
    """
    messages = item.get(layout.field)
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"{where}, field {layout.field}: it is {kind(messages)}, but it must list a question and its answer at "
            f'least. Write [{{"{layout.speaker}": "{layout.asks}", "{layout.text}": ...}}, {{"{layout.speaker}": '
            f'"{layout.answers}", "{layout.text}": ...}}].'
        )
    spoken = [_message(message, layout, where, place) for place, message in enumerate(messages)]
    system = spoken.pop(0)[1] if spoken[0][0] == SYSTEM else ""
    shift = len(messages) - len(spoken)
    _check_order(spoken, layout, where, shift)
    _check_placeholders(system, spoken, layout, where, shift, num_images)
    tasks = _tasks(item, where, len(spoken) // 2)
    pairs = zip(spoken[::2], spoken[1::2], tasks, strict=True)
    return system, tuple(Turn(question, answer, task) for (_, question), (_, answer), task in pairs)


def _message(message: Any, layout: Layout, where: str, place: int) -> tuple[str, str]:
    """Speaker and text of one message; places are put into words only where something is wrong, as it rarely is."""
    if not isinstance(message, dict):
        raise RecordError(
            f"{where}, {layout.field}[{place}]: it is {kind(message)}, but a message is an object with "
            f"`{layout.speaker}` and `{layout.text}`."
        )
    speaker, value = message.get(layout.speaker), message.get(layout.text)
    if speaker != layout.asks and speaker != layout.answers and speaker != SYSTEM:
        raise RecordError(
            f"{where}, {layout.field}[{place}].{layout.speaker}: it is {shown(speaker)}, but it must be one of "
            f"{layout.asks}, {layout.answers}, {SYSTEM}. Rename the speaker."
        )
    text = value if isinstance(value, str) else _joined(value, f"{where}, {layout.field}[{place}].{layout.text}")
    if not text.isascii():
        check_characters(text, f"{where}, {layout.field}[{place}].{layout.text}")
    if speaker == layout.answers and (not text or text.isspace()):
        raise RecordError(
            f"{where}, {layout.field}[{place}].{layout.text}: the answer is empty, so nothing could be learned. Fill "
            "it in, or take the turn out."
        )
    return speaker, text


def _joined(value: Any, where: str) -> str:
    """The text of a list of parts: each picture's place becomes a placeholder."""
    if not isinstance(value, list):
        raise RecordError(f"{where}: it is {kind(value)}, but it must be text. Write it as a string.")
    return "".join(_part(part, f"{where}[{place}]") for place, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE_PLACEHOLDER
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise RecordError(
        f'{where}: it is {shown(part)}, but a part is {{"type": "text", "text": ...}} or {{"type": "image"}}. Write '
        "it so; the pictures themselves stand in `images`."
    )


def _check_order(spoken: Sequence[tuple[str, str]], layout: Layout, where: str, shift: int) -> None:
    for place, (speaker, _) in enumerate(spoken):
        due = (layout.asks, layout.answers)[place % 2]
        if speaker != due:
            raise RecordError(
                f"{where}, {layout.field}[{place + shift}].{layout.speaker}: it is {speaker!r} where {due!r} must "
                "speak: questions and answers alternate, beginning with a question (after a system prompt, if "
                "any). Put the messages in order, or join neighbours of one speaker."
            )
    if not spoken or len(spoken) % 2:
        raise RecordError(
            f"{where}, field {layout.field}: the last question has no answer ({len(spoken)} messages), so nothing "
            f"could be learned from it. Add the answer of {layout.answers}, or take the question out."
        )


def _check_placeholders(
    system: str, spoken: Sequence[tuple[str, str]], layout: Layout, where: str, shift: int, num_images: int
) -> None:
    asked = 0
    for place, (speaker, value) in enumerate(((SYSTEM, system), *spoken), start=shift - 1):
        placeholders = value.count(IMAGE_PLACEHOLDER)
        if placeholders and speaker != layout.asks:
            raise RecordError(
                f"{where}, {layout.field}[{place}].{layout.text}: {IMAGE_PLACEHOLDER} stands in a message from "
                f"{speaker}, but pictures belong to questions. Move it to the question, or spell it differently if it "
                "is meant as text."
            )
        asked += placeholders
    if asked != num_images:
        raise RecordError(
            f"{where}, field image: {num_images} pictures, but the questions have {asked} {IMAGE_PLACEHOLDER} "
            "placeholders. Each picture needs exactly one, in order: correct the questions or the image list."
        )


def _tasks(item: Mapping[str, Any], where: str, num_turns: int) -> Sequence[str]:
    """``tasks`` names each turn's task; ``task`` one for all; without either they are empty."""
    if item.get("tasks") is None:
        task = item.get("task") or ""
        if not isinstance(task, str):
            raise RecordError(f"{where}, field task: it is {kind(task)}, but it must be text. Write it as a string.")
        return [task] * num_turns
    tasks = item["tasks"]
    if not isinstance(tasks, list) or len(tasks) != num_turns or not all(isinstance(task, str) for task in tasks):
        raise RecordError(
            f"{where}, field tasks: it is {shown(tasks)}, but it must list one name for each of the {num_turns} turns. "
            "Correct the list; an empty string names none."
        )
    return tasks
