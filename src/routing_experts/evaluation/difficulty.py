"""How hard questions are: by the loss that the base model has on their right answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from routing_experts.data.records import Record
from routing_experts.evaluation.likelihood import likelihoods
from routing_experts.evaluation.questions import BATCH_SIZE, Question

TENTHS = 10


def answer_losses(
    model: Any, processor: Any, questions: Sequence[Question], batch_size: int = BATCH_SIZE
) -> list[float]:
    """The mean loss of a token of each question's right answer."""
    records = [_answered(question) for question in questions]
    return [found.loss for found in likelihoods(model, processor, records, batch_size)]


def tenths(losses: Sequence[float]) -> list[int]:
    """Which tenth of the questions each belongs to, from 0, the easiest, to 9; of equal losses the first is easier."""
    order = np.argsort(np.argsort(np.asarray(losses), kind="stable"), kind="stable")
    return (order * TENTHS // len(losses)).tolist()


def _answered(question: Question) -> Record:
    *earlier, last = question.record.turns
    return replace(question.record, turns=(*earlier, replace(last, answer=question.answer)))
