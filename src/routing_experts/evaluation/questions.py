"""What a model is asked: held-out digits, or the questions of a LLaVA-format file, each as its own request."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from routing_experts.data.digits import CELL, DIGITS, DigitsTask
from routing_experts.data.readers.sources import load_records
from routing_experts.data.records import Record
from routing_experts.errors import ConfigError

BATCH_SIZE = 64  # questions asked at a time, where nobody says otherwise


@dataclass(frozen=True)
class Question:
    """A request whose last turn waits for its answer; earlier turns keep theirs as history."""

    record: Record
    answer: str
    task: str


def digits_questions(
    count: int, seed: int, split: str = "heldout", turns: int = 1, cell: int = CELL, width: int | None = None
) -> list[Question]:
    """Fresh questions about handwriting of a split.

    Args:
        count: how many.
        seed: of the questions.
        split: of the handwriting.
        turns: of a dialogue, whose last question is asked.
        cell, width: pixels of a digit's cell and of a picture, see ``DigitsTask``.
    """
    if count < 1:
        raise ConfigError(f"{count} questions: an evaluation asks at least one. Raise the number.")
    task = DigitsTask(split=split, seed=seed, min_turns=turns, max_turns=turns, cell=cell, width=width)
    return [_last_question(task[index]) for index in range(count)]


def file_questions(path: str | Path, images: str | Path | None = None, limit: int | None = None) -> list[Question]:
    """Every turn of every dialogue as one request, with the dialogue before it as history."""
    questions = []
    for record in load_records(path, images):
        for end in range(1, len(record.turns) + 1):
            asked = sum(turn.question.count("<image>") for turn in record.turns[:end])
            part = replace(record, id=f"{record.id}-{end}", turns=record.turns[:end], images=record.images[:asked])
            questions.append(_last_question(part))
            if limit is not None and len(questions) == limit:
                return questions
    return questions


def load_questions(data: str, images: str | None, count: int | None, seed: int) -> list[Question]:
    """``digits``, or a file of dialogues."""
    if data == DIGITS:
        return digits_questions(count or 2000, seed)
    return file_questions(data, images, count)


def records_of(questions: Sequence[Question]) -> list[Record]:
    """The requests alone."""
    return [question.record for question in questions]


def _last_question(record: Record) -> Question:
    last = record.turns[-1]
    waiting = replace(record, turns=(*record.turns[:-1], replace(last, answer="")))
    return Question(waiting, last.answer, last.task or "all")
