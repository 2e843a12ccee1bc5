"""What a study's base model, not trained further, says to the questions that all contenders are asked."""

from collections.abc import Callable, Sequence
from typing import Any

from routing_experts.evaluation.difficulty import answer_losses, tenths
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import Question
from routing_experts.records import BaseAnswers, as_bits, as_marks


def base_answers(
    base: Any, processor: Any, questions: Sequence[Question], question_seed: int, advance: Callable[[int], None]
) -> BaseAnswers:
    """Asks the base model, and orders the questions by the loss that it has on their right answers."""
    asked = ask(base, processor, questions, advance=advance)
    tasks = sorted({question.task for question in questions})
    return BaseAnswers(
        accuracy=asked.accuracy,
        right=as_bits(asked.right),
        tasks=tasks,
        task_of=as_marks(tasks.index(question.task) for question in questions),
        tenth_of=as_marks(tenths(answer_losses(base, processor, questions))),
        question_seed=question_seed,
    )
