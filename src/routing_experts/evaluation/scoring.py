"""Exact match: the share of questions whose decoded answer is the right one, by task."""

from collections.abc import Sequence
from dataclasses import dataclass

from routing_experts.evaluation.questions import Question
from routing_experts.inference.generate import Answer


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to a list of questions.

    Attributes:
        questions, answers: in the same order.
    """

    questions: Sequence[Question]
    answers: Sequence[Answer]

    @property
    def right(self) -> list[bool]:
        """Which answers are right."""
        return [is_right(a.text, q.answer) for q, a in zip(self.questions, self.answers, strict=True)]

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return sum(self.right) / len(self.answers)

    @property
    def skip_rate(self) -> float:
        """The mean share of all decoder layers that a question skipped."""
        return sum(answer.skip_rate for answer in self.answers) / len(self.answers)

    @property
    def layer_skip_rates(self) -> list[float]:
        """Each decoder layer's share of questions that skipped it."""
        columns = zip(*(answer.route for answer in self.answers), strict=True)
        return [1 - sum(column) / len(self.answers) for column in columns]

    def by_task(self) -> dict[str, "Evaluation"]:
        """The same, a task at a time, in the order of their names."""
        tasks = sorted({question.task for question in self.questions})
        rows = {task: [i for i, q in enumerate(self.questions) if q.task == task] for task in tasks}
        return {
            task: Evaluation([self.questions[i] for i in index], [self.answers[i] for i in index])
            for task, index in rows.items()
        }


def is_right(said: str, expected: str) -> bool:
    """Exact match without regard to case and surrounding space."""
    return said.strip().casefold() == expected.strip().casefold()
