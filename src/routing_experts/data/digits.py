"""The digits task: questions about real handwritten digits, from the UCI set that scikit-learn bundles.

A picture shows a grid of digits (four by default), each a different handwritten sample, jittered in size and place.
Seven kinds of question are asked of it in equal shares, with balanced answers; an eighth kind, ``text_sum``, has no
picture. The 1,797 samples are split once, by sample, so that held-out questions show only handwriting never trained on.
A record is a pure function of (seed, index): any worker, process or order gives the same one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from PIL import Image

from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import ConfigError

PICTURE_TASKS = ("read_one", "read_all", "exists", "count", "parity", "compare", "sum")
TASKS = (*PICTURE_TASKS, "text_sum")
SPLITS = ("train", "heldout")
CELL = 16  # pixels a digit's cell is wide and high
HELDOUT_SHARE = 0.2
SPLIT_SEED = 20250  # part of the task's definition: changing it would leak handwriting between checkpoints
MAX_COUNT = 3
MAX_DRAWS = 300


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The samples of a split, stratified by digit.

    Returns:
        Pictures [N, 8, 8] uint8 in 0..255 and their digits [N].
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: the digits have the splits {', '.join(SPLITS)}. Name one of them.")
    from sklearn.datasets import load_digits

    bundle = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen: list[np.ndarray] = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(bundle.target == digit))
        cut = round(len(order) * HELDOUT_SHARE)
        chosen.append(order[:cut] if split == "heldout" else order[cut:])
    picked = np.sort(np.concatenate(chosen))
    return np.rint(bundle.images[picked] * (255 / 16)).astype(np.uint8), bundle.target[picked]


@cache
def _samples_by_digit(split: str) -> tuple[np.ndarray, ...]:
    digits = handwriting(split)[1]
    return tuple(np.flatnonzero(digits == digit) for digit in range(10))


def draw_picture(digits: np.ndarray, columns: int, split: str, rng: np.random.Generator) -> Image.Image:
    """A grey picture of the digits in rows of ``columns``; each is a random sample, 12 to 15 pixels, jittered."""
    pictures, _ = handwriting(split)
    by_digit = _samples_by_digit(split)
    rows = -(-len(digits) // columns)
    canvas = Image.new("L", (columns * CELL, rows * CELL))
    for place, digit in enumerate(digits):
        sample = pictures[by_digit[digit][rng.integers(len(by_digit[digit]))]]
        size = int(rng.integers(12, 16))
        x, y = rng.integers(0, CELL - size + 1, size=2)
        glyph = Image.fromarray(sample).resize((size, size), Image.Resampling.BILINEAR)
        canvas.paste(glyph, (place % columns * CELL + int(x), place // columns * CELL + int(y)))
    return canvas.convert("RGB")


def place_names(num_digits: int, columns: int) -> tuple[str, ...]:
    """What questions call the places: corners in a 2 × 2 grid, rows and columns in any other."""
    if (num_digits, columns) == (4, 2):
        return ("top left", "top right", "bottom left", "bottom right")
    return tuple(f"row {i // columns + 1} column {i % columns + 1}" for i in range(num_digits))


# An asker makes a question whose answer is the wanted one, or None where these digits do not allow it.
Asker = Callable[[str, np.ndarray, tuple[str, ...], np.random.Generator], str | None]
_YES_NO = ("yes", "no")
_SUMS = tuple(map(str, range(19)))


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _read_one(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    places = np.flatnonzero(digits == int(answer))
    return f"Which digit is {names[_pick(rng, places)]}?" if len(places) else None


def _read_all(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    return "Read all digits."


def _exists(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    return f"Is there a {_pick(rng, np.unique(digits) if answer == 'yes' else np.setdiff1d(np.arange(10), digits))}?"


def _count(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    matching = np.flatnonzero(np.bincount(digits, minlength=10) == int(answer))
    return f"How many times is {_pick(rng, matching)} there?" if len(matching) else None


def _parity(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    places = np.flatnonzero(digits % 2 == (0 if answer == "yes" else 1))
    return f"Is {names[_pick(rng, places)]} even?" if len(places) else None


def _compare(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    pairs = [(i, j) for i in range(len(digits)) for j in range(len(digits)) if digits[i] > digits[j]]
    if not pairs:
        return None
    high, low = _pick(rng, pairs)
    first, second = (high, low) if answer == "yes" else (low, high)
    return f"Is {names[first]} larger than {names[second]}?"


def _sum(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    pairs = [(i, j) for i, j in permutations(range(len(digits)), 2) if digits[i] + digits[j] == int(answer)]
    if not pairs:
        return None
    first, second = _pick(rng, pairs)
    return f"Add {names[first]} and {names[second]}."


def _text_sum(answer: str, digits: np.ndarray, names: tuple[str, ...], rng: np.random.Generator) -> str | None:
    total = int(answer)
    first = int(rng.integers(max(0, total - 9), min(9, total) + 1))
    return f"Add {first} and {total - first}."


# Task → the answers it is balanced over (none: the picture gives it) and its asker.
_QUESTIONS: dict[str, tuple[tuple[str, ...], Asker]] = {
    "read_one": (tuple(map(str, range(10))), _read_one),
    "read_all": ((), _read_all),
    "exists": (_YES_NO, _exists),
    "count": (tuple(map(str, range(MAX_COUNT + 1))), _count),
    "parity": (_YES_NO, _parity),
    "compare": (_YES_NO, _compare),
    "sum": (_SUMS, _sum),
    "text_sum": (_SUMS, _text_sum),
}


@dataclass(frozen=True)
class DigitsTask:
    """A seeded, endless set of digits records; ``task[i]`` is record i.

    Attributes:
        split: ``train`` or ``heldout`` handwriting.
        seed: of the questions, not of the split.
        min_turns, max_turns: the number of questions a dialogue has is drawn evenly from this range.
        text_share: the share of dialogues without a picture.
        tasks: which picture questions are asked, in equal shares.
        num_digits, columns: the grid.
    """

    split: str = "train"
    seed: int = 0
    min_turns: int = 1
    max_turns: int = 3
    text_share: float = 1 / 8
    tasks: tuple[str, ...] = PICTURE_TASKS
    num_digits: int = 4
    columns: int = 2

    def __post_init__(self) -> None:
        handwriting(self.split)
        if not 1 <= self.min_turns <= self.max_turns:
            raise ConfigError(
                f"digits with {self.min_turns} to {self.max_turns} turns: a dialogue needs at least one turn and the "
                "range must not be empty. Set 1 <= min_turns <= max_turns."
            )
        unknown = [name for name in self.tasks if name not in PICTURE_TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"digits tasks {list(self.tasks)}: each must be one of {', '.join(PICTURE_TASKS)}.")
        if self.num_digits < 4 or self.columns < 1:
            raise ConfigError(
                f"{self.num_digits} digits in {self.columns} columns: a picture has four or more digits, since counts "
                "and pairs need them. Set num_digits to at least 4 and columns to at least 1."
            )
        if not 0 <= self.text_share <= 1:
            raise ConfigError(f"text_share {self.text_share}: it is a share of the dialogues. Set it from 0 to 1.")

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        num_turns = int(rng.integers(self.min_turns, self.max_turns + 1))
        pictured = rng.random() >= self.text_share
        tasks, answers, digits, questions = self._draw_dialogue(num_turns, pictured, rng)
        read = "".join(map(str, digits))
        turns = [Turn(q, answer or read, task) for q, answer, task in zip(questions, answers, tasks, strict=True)]
        name = f"digits-{self.split}-{self.seed}-{index}"
        if not pictured:
            return Record(name, tuple(turns))
        turns[0] = replace(turns[0], question=f"{IMAGE_PLACEHOLDER}\n{turns[0].question}")
        return Record(name, tuple(turns), (draw_picture(digits, self.columns, self.split, rng),))

    def _draw_dialogue(
        self, num_turns: int, pictured: bool, rng: np.random.Generator
    ) -> tuple[list[str], list[str], np.ndarray, list[str]]:
        """Draws tasks and answers first, which keeps answers balanced, then digits until all questions can be asked.

        A few combinations fit no four digits (three 1s and a sum of 18); those dialogues are drawn anew.
        """
        names = place_names(self.num_digits, self.columns)
        while True:
            shuffled = [self.tasks[i] for i in rng.permutation(len(self.tasks))]
            tasks = [shuffled[i % len(shuffled)] if pictured else "text_sum" for i in range(num_turns)]
            answers = [_pick(rng, _QUESTIONS[task][0] or ("",)) for task in tasks]
            for _ in range(MAX_DRAWS):
                digits = rng.integers(10, size=self.num_digits)
                if rng.random() < 0.5:  # repeats, or counts above one would be slow to find
                    digits[rng.permutation(self.num_digits)[: rng.integers(2, 4)]] = digits[0]
                asked = [_QUESTIONS[t][1](a, digits, names, rng) for t, a in zip(tasks, answers, strict=True)]
                questions = [question for question in asked if question is not None]
                if len(questions) == num_turns:
                    return tasks, answers, digits, questions
