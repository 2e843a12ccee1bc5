"""The kinds of question of the digits task: wording, the answers that are balanced, and what a picture answers.

They differ on purpose in what they ask of a model: reading one digit is easy, adding rows with a carry or putting
digits in order takes depth. Routing can only pay where examples differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

MAX_COUNT = 3


@dataclass(frozen=True)
class Scene:
    """What a question is about: the digits in reading order, what their places are called, and the grid's width."""

    digits: np.ndarray
    names: tuple[str, ...]
    columns: int


def place_names(num_digits: int, columns: int) -> tuple[str, ...]:
    """What questions call the places: corners in a 2 × 2 grid, rows and columns in any other."""
    if (num_digits, columns) == (4, 2):
        return ("top left", "top right", "bottom left", "bottom right")
    return tuple(f"row {i // columns + 1} column {i % columns + 1}" for i in range(num_digits))


# An asker words a question whose answer is the wanted one, or returns None where the scene does not allow it.
Asker = Callable[[str, Scene, np.random.Generator], str | None]
# A reader answers from the scene, for questions whose wording is always the same.
Reader = Callable[[Scene], str]


def pick(rng: np.random.Generator, options: Any) -> Any:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def _read_one(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    places = np.flatnonzero(scene.digits == int(answer))
    return f"Which digit is {scene.names[pick(rng, places)]}?" if len(places) else None


def _exists(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    there = np.unique(scene.digits)
    return f"Is there a {pick(rng, there if answer == 'yes' else np.setdiff1d(np.arange(10), there))}?"


def _count(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    matching = np.flatnonzero(np.bincount(scene.digits, minlength=10) == int(answer))
    return f"How many times is {pick(rng, matching)} there?" if len(matching) else None


def _parity(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    places = np.flatnonzero(scene.digits % 2 == (0 if answer == "yes" else 1))
    return f"Is {scene.names[pick(rng, places)]} even?" if len(places) else None


def _compare(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    pairs = [(i, j) for i, j in permutations(range(len(scene.digits)), 2) if scene.digits[i] > scene.digits[j]]
    if not pairs:
        return None
    high, low = pick(rng, pairs)
    first, second = (high, low) if answer == "yes" else (low, high)
    return f"Is {scene.names[first]} larger than {scene.names[second]}?"


def _sum(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    places = permutations(range(len(scene.digits)), 2)
    pairs = [(i, j) for i, j in places if scene.digits[i] + scene.digits[j] == int(answer)]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    return f"Add {scene.names[first]} and {scene.names[second]}."


def _text_sum(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    return _words_of_a_sum(int(answer), 0, 9, rng)


def _text_add(answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
    return _words_of_a_sum(int(answer), 10, 99, rng)


def _words_of_a_sum(total: int, low: int, high: int, rng: np.random.Generator) -> str:
    """Two numbers from ``low`` to ``high`` that add up to ``total``."""
    first = int(rng.integers(max(low, total - high), min(high, total - low) + 1))
    return f"Add {first} and {total - first}."


def _rows_total(scene: Scene) -> str:
    rows = range(0, len(scene.digits), scene.columns)
    return str(sum(int("".join(map(str, scene.digits[start : start + scene.columns]))) for start in rows))


@dataclass(frozen=True)
class Kind:
    """A kind of question: either balanced over ``answers`` and worded by ``ask``, or ``words`` that the scene answers.

    Attributes:
        answers: all equally likely; empty where the scene decides.
        ask: words a question for an answer.
        words: the question where it is always the same.
        read: the scene's answer to ``words``.
    """

    answers: tuple[str, ...] = ()
    ask: Asker | None = None
    words: str = ""
    read: Reader | None = None

    def question(self, answer: str, scene: Scene, rng: np.random.Generator) -> str | None:
        """The question with this answer, or None if the scene allows none."""
        return self.words if self.ask is None else self.ask(answer, scene, rng)

    def answer(self, drawn: str, scene: Scene) -> str:
        """The drawn answer, or the scene's."""
        return drawn if self.read is None else self.read(scene)


_YES_NO = ("yes", "no")
_SUMS = tuple(map(str, range(19)))

PICTURE_KINDS: dict[str, Kind] = {
    "read_one": Kind(tuple(map(str, range(10))), _read_one),
    "read_all": Kind(words="Read all digits.", read=lambda scene: "".join(map(str, scene.digits))),
    "exists": Kind(_YES_NO, _exists),
    "count": Kind(tuple(map(str, range(MAX_COUNT + 1))), _count),
    "parity": Kind(_YES_NO, _parity),
    "compare": Kind(_YES_NO, _compare),
    "sum": Kind(_SUMS, _sum),
    "sort": Kind(words="Sort all digits.", read=lambda scene: "".join(map(str, sorted(scene.digits)))),
    "sum_all": Kind(words="Add all digits.", read=lambda scene: str(int(scene.digits.sum()))),
    "add_rows": Kind(words="Add the rows as numbers.", read=_rows_total),
}
TEXT_KINDS: dict[str, Kind] = {
    "text_sum": Kind(_SUMS, _text_sum),
    "text_add": Kind(tuple(map(str, range(20, 199))), _text_add),
}
KINDS = PICTURE_KINDS | TEXT_KINDS
