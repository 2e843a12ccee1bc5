"""The digits task: questions about real handwritten digits, from the UCI set that scikit-learn bundles.

A picture shows a grid of digits (four by default), each a different handwritten sample, jittered in size and place.
Ten kinds of question are asked of it in equal shares, most with balanced answers; two kinds have no picture. The 1,797
samples are split once, by sample, so that held-out questions show only handwriting never trained on. A record is a pure
function of (seed, index): any worker, process or order gives the same one.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image

from routing_experts.data.digit_questions import KINDS, PICTURE_KINDS, TEXT_KINDS, Scene, pick, place_names
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import ConfigError

DIGITS = "digits"  # as a source of data
PICTURE_TASKS = tuple(PICTURE_KINDS)
TEXT_TASKS = tuple(TEXT_KINDS)
TASKS = (*PICTURE_TASKS, *TEXT_TASKS)
SPLITS = ("train", "heldout")
CELL = 16  # pixels a digit's cell is wide and high, at least
HELDOUT_SHARE = 0.2
SPLIT_SEED = 20250  # part of the task's definition: changing it would leak handwriting between checkpoints
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


def draw_picture(
    digits: np.ndarray, columns: int, split: str, rng: np.random.Generator, cell: int = CELL
) -> Image.Image:
    """A grey picture of the digits in rows of ``columns``; each is a random sample, 12 to 15 pixels, jittered.

    Args:
        digits: in reading order.
        columns: of the grid.
        split: of the handwriting.
        rng: draws samples, sizes and places.
        cell: pixels a digit's cell is wide and high; in larger ones the digits are as large, and lie anywhere.
    """
    pictures, _ = handwriting(split)
    by_digit = _samples_by_digit(split)
    rows = -(-len(digits) // columns)
    canvas = Image.new("L", (columns * cell, rows * cell))
    for place, digit in enumerate(digits):
        sample = pictures[by_digit[digit][rng.integers(len(by_digit[digit]))]]
        size = int(rng.integers(12, 16))
        x, y = rng.integers(0, cell - size + 1, size=2)
        glyph = Image.fromarray(sample).resize((size, size), Image.Resampling.BILINEAR)
        canvas.paste(glyph, (place % columns * cell + int(x), place // columns * cell + int(y)))
    return canvas.convert("RGB")


@dataclass(frozen=True)
class DigitsTask:
    """A seeded, endless set of digits records; ``task[i]`` is record i.

    Attributes:
        split: ``train`` or ``heldout`` handwriting.
        seed: of the questions, not of the split.
        min_turns, max_turns: the number of questions a dialogue has is drawn evenly from this range.
        text_share: the share of dialogues without a picture.
        tasks: which picture questions are asked, in equal shares; one that is named twice is asked twice as often.
        text_tasks: which questions are asked without one.
        num_digits, columns: the grid.
        cell: pixels of a digit's cell; in larger ones the digits, of 12 to 15 pixels, are small in their picture.
        width: pixels that a picture is scaled to, once it is drawn; None to leave it.
    """

    split: str = "train"
    seed: int = 0
    min_turns: int = 1
    max_turns: int = 3
    text_share: float = 0.15
    tasks: tuple[str, ...] = PICTURE_TASKS
    text_tasks: tuple[str, ...] = TEXT_TASKS
    num_digits: int = 4
    columns: int = 2
    cell: int = CELL
    width: int | None = None

    def __post_init__(self) -> None:
        handwriting(self.split)
        if not 1 <= self.min_turns <= self.max_turns:
            raise ConfigError(
                f"digits with {self.min_turns} to {self.max_turns} turns: a dialogue needs at least one turn and the "
                "range must not be empty. Set 1 <= min_turns <= max_turns."
            )
        for name, chosen, known in (("tasks", self.tasks, PICTURE_TASKS), ("text_tasks", self.text_tasks, TEXT_TASKS)):
            if not chosen or set(chosen) - set(known):
                raise ConfigError(f"digits {name} {list(chosen)}: each must be one of {', '.join(known)}. Name some.")
        if self.num_digits < 4 or self.columns < 1:
            raise ConfigError(
                f"{self.num_digits} digits in {self.columns} columns: a picture has four or more digits, since counts "
                "and pairs need them. Set num_digits to at least 4 and columns to at least 1."
            )
        if self.cell < CELL:
            raise ConfigError(f"digits in cells of {self.cell} pixels: they need {CELL}. Set cell to at least {CELL}.")
        if self.width is not None and self.width < 1:
            raise ConfigError(f"digits pictures of {self.width} pixels: they need one. Set width to 1 or more.")
        if not 0 <= self.text_share <= 1:
            raise ConfigError(f"text_share {self.text_share}: it is a share of the dialogues. Set it from 0 to 1.")

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        num_turns = int(rng.integers(self.min_turns, self.max_turns + 1))
        pictured = rng.random() >= self.text_share
        scene, turns = self._draw_dialogue(num_turns, pictured, rng)
        name = f"digits-{self.split}-{self.seed}-{index}"
        if not pictured:
            return Record(name, tuple(turns))
        turns[0] = replace(turns[0], question=f"{IMAGE_PLACEHOLDER}\n{turns[0].question}")
        picture = draw_picture(scene.digits, self.columns, self.split, rng, self.cell)
        if self.width is not None:
            size = (self.width, max(1, round(self.width * picture.height / picture.width)))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return Record(name, tuple(turns), (picture,))

    def _draw_dialogue(self, num_turns: int, pictured: bool, rng: np.random.Generator) -> tuple[Scene, list[Turn]]:
        """Draws tasks and answers first, which keeps answers balanced, then digits until all questions can be asked.

        A few combinations fit no four digits (three 1s and a sum of 18); those dialogues are drawn anew.
        """
        names = place_names(self.num_digits, self.columns)
        offered = self.tasks if pictured else self.text_tasks
        while True:
            shuffled = [offered[i] for i in rng.permutation(len(offered))]
            tasks = [shuffled[i % len(shuffled)] for i in range(num_turns)]
            kinds = [KINDS[task] for task in tasks]
            drawn = [pick(rng, kind.answers or ("",)) for kind in kinds]
            for _ in range(MAX_DRAWS):
                digits = rng.integers(10, size=self.num_digits)
                if rng.random() < 0.5:  # repeats, or counts above one would be slow to find
                    digits[rng.permutation(self.num_digits)[: rng.integers(2, 4)]] = digits[0]
                scene = Scene(digits, names, self.columns)
                asked = [kind.question(answer, scene, rng) for kind, answer in zip(kinds, drawn, strict=True)]
                if None in asked:
                    continue
                given = [kind.answer(answer, scene) for kind, answer in zip(kinds, drawn, strict=True)]
                return scene, [Turn(q, a, task) for q, a, task in zip(asked, given, tasks, strict=True) if q]
