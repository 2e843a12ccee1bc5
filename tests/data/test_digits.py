"""Guards the digits task: true answers, balance, disjoint splits, and records that depend on (seed, index) alone."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from routing_experts.data import digits as digits_module
from routing_experts.data.digit_questions import KINDS, place_names
from routing_experts.data.digits import TASKS, DigitsTask, handwriting
from routing_experts.errors import ConfigError

MANY = 4000


@pytest.fixture
def shown(monkeypatch):
    """Replaces drawing by a blank picture that keeps the digits it should show."""

    def draw(digits, columns, split, rng, cell):
        picture = Image.new("RGB", (1, 1))
        picture.info["digits"] = tuple(int(digit) for digit in digits)
        return picture

    monkeypatch.setattr(digits_module, "draw_picture", draw)


def true_answer(question, task, digits, names):
    """Answers a question by reading it, independently of how it was made."""
    asked = question.removeprefix("<image>\n")
    value = dict(zip(names, digits, strict=True))
    places = sorted((asked.index(name), value[name]) for name in names if re.search(rf"\b{name}\b", asked))
    operands = [digit for _, digit in places]
    number = int(re.findall(r"a (\d)|is (\d)", asked)[0][task == "count"]) if task in ("exists", "count") else -1
    yes_no = {True: "yes", False: "no"}
    match task:
        case "read_one":
            return str(*operands)
        case "read_all":
            return "".join(map(str, digits))
        case "exists":
            return yes_no[number in digits]
        case "count":
            return str(digits.count(number))
        case "parity":
            assert len(operands) == 1
            return yes_no[operands[0] % 2 == 0]
        case "compare":
            return yes_no[operands[0] > operands[1]]
        case "sum":
            assert len(operands) == 2
            return str(sum(operands))
        case "sort":
            return "".join(sorted(map(str, digits)))
        case "sum_all":
            return str(sum(digits))
        case "add_rows":
            width = 2 if len(digits) == 4 else 3
            rows = ["".join(map(str, digits[start : start + width])) for start in range(0, len(digits), width)]
            return str(sum(map(int, rows)))
    raise AssertionError(task)


def chi_square(counts, options):
    expected = sum(counts.values()) / len(options)
    assert set(counts) <= set(options)
    return sum((counts[option] - expected) ** 2 / expected for option in options)


@pytest.mark.parametrize(("num_digits", "columns"), [(4, 2), (5, 3), (9, 3)])
def test_answers_are_true_of_the_digits_in_the_picture(shown, num_digits, columns):
    task = DigitsTask(num_digits=num_digits, columns=columns, text_share=0)
    names = place_names(num_digits, columns)
    for index in range(600):
        record = task[index]
        (picture,) = record.images
        assert len(picture.info["digits"]) == num_digits
        for turn in record.turns:
            assert turn.answer == true_answer(turn.question, turn.task, picture.info["digits"], names), turn


def test_text_sums_are_true_and_have_no_picture():
    task = DigitsTask(text_share=1)
    for index in range(300):
        record = task[index]
        assert not record.images
        for turn in record.turns:
            first, second = re.fullmatch(r"Add (\d+) and (\d+)\.", turn.question).groups()
            assert turn.answer == str(int(first) + int(second))
            assert {len(first), len(second)} == {1 if turn.task == "text_sum" else 2}


def test_one_turn_records_have_equal_task_shares_and_balanced_answers(shown):
    task = DigitsTask(max_turns=1)
    turns = [task[index].turns[0] for index in range(MANY)]
    tasks = Counter(turn.task for turn in turns)
    # Bounds are the 99.99 % points of chi-square with 11 and with (number of answers - 1) degrees of freedom.
    assert chi_square(tasks, TASKS) < 37.4
    limits = {2: 15.2, 4: 21.2, 10: 33.8, 19: 48.0, 179: 258.0}
    for name, kind in KINDS.items():
        if kind.answers:
            given = Counter(turn.answer for turn in turns if turn.task == name)
            assert chi_square(given, kind.answers) < limits[len(kind.answers)], (name, given)


def test_a_task_named_twice_is_asked_twice_as_often(shown):
    task = DigitsTask(max_turns=1, text_share=0, tasks=("sort", "sort", "read_one"))
    tasks = Counter(task[index].turns[0].task for index in range(600))
    assert tasks["sort"] == pytest.approx(400, abs=50)


def test_turns_of_a_dialogue_ask_different_tasks_and_only_the_first_shows_the_picture(shown):
    task = DigitsTask(min_turns=2, max_turns=3, text_share=0)
    lengths = Counter()
    for index in range(500):
        turns = task[index].turns
        lengths[len(turns)] += 1
        assert len({turn.task for turn in turns}) == len(turns)
        assert [turn.question.count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
    assert set(lengths) == {2, 3}
    assert min(lengths.values()) > 200


def test_splits_share_no_sample_and_hold_every_digit():
    from sklearn.datasets import load_digits

    train, heldout = handwriting("train"), handwriting("heldout")
    everything = Counter(
        (image.tobytes(), int(digit))
        for image, digit in zip(_as_bytes(load_digits().images), load_digits().target, strict=True)
    )
    parts = [
        Counter((image.tobytes(), int(digit)) for image, digit in zip(*part, strict=True)) for part in (train, heldout)
    ]
    assert parts[0] + parts[1] == everything
    assert not set(parts[0]) & set(parts[1])
    assert len(heldout[1]) == pytest.approx(0.2 * 1797, abs=5)
    assert set(heldout[1]) == set(train[1]) == set(range(10))


def _as_bytes(images):
    return np.rint(images * (255 / 16)).astype(np.uint8)


def test_pictures_show_samples_of_their_own_split_only(monkeypatch):
    asked = []
    real = handwriting
    monkeypatch.setattr(digits_module, "handwriting", lambda split: asked.append(split) or real(split))
    task = DigitsTask(split="heldout", text_share=0)
    _ = [task[index] for index in range(5)]
    assert set(asked) == {"heldout"}


def test_a_record_depends_on_seed_and_index_alone():
    task = DigitsTask(seed=3, text_share=0)
    backwards = {index: task[index] for index in reversed(range(30))}
    again = DigitsTask(seed=3, text_share=0)
    for index in range(30):
        assert again[index].turns == backwards[index].turns
        assert again[index].images[0].tobytes() == backwards[index].images[0].tobytes()
    assert [DigitsTask(seed=4)[index].turns for index in range(30)] != [task[index].turns for index in range(30)]
    heldout = DigitsTask(split="heldout", seed=3, text_share=0)
    assert [heldout[index].turns for index in range(30)] != [task[index].turns for index in range(30)]


def test_grids_have_a_cell_a_digit():
    assert DigitsTask(text_share=0)[0].images[0].size == (32, 32)
    five = DigitsTask(text_share=0, num_digits=5, columns=3)[0]
    assert five.images[0].size == (48, 32)
    assert five.images[0].mode == "RGB"
    assert place_names(5, 3)[-1] == "row 2 column 2"


def test_pictures_may_be_scaled_once_they_are_drawn():
    """Guards controls that see less: the same questions of the same pictures, at fewer pixels."""
    whole, scaled = (DigitsTask(text_share=0, seed=5, cell=64, width=width) for width in (None, 16))
    for index in range(5):
        one, other = whole[index], scaled[index]
        assert one.turns == other.turns
        assert other.images[0].size == (16, 16)
        assert other.images[0] == one.images[0].resize((16, 16), Image.Resampling.BICUBIC)


def test_digits_in_larger_cells_are_as_large_and_lie_anywhere():
    """Guards small digits in large pictures: the same questions, and every digit within its own cell."""
    small, large = DigitsTask(text_share=0, seed=5), DigitsTask(text_share=0, seed=5, cell=64)
    seen = np.zeros((128, 128))
    for index in range(150):
        picture = np.asarray(large[index].images[0].convert("L"))
        assert picture.shape == (128, 128)
        assert large[index].turns == small[index].turns
        for row, column in ((0, 0), (0, 64), (64, 0), (64, 64)):
            inked = np.argwhere(picture[row : row + 64, column : column + 64])
            assert len(inked)
            assert (np.ptp(inked, axis=0) < 15).all()
        seen = np.maximum(seen, picture)
    assert (seen > 0).mean() > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split 'test': the digits have the splits train, heldout"),
        ({"min_turns": 0}, "digits with 0 to 3 turns"),
        ({"min_turns": 3, "max_turns": 2}, "digits with 3 to 2 turns"),
        ({"tasks": ("read_one", "write")}, "must be one of read_one"),
        ({"tasks": ()}, "must be one of"),
        ({"text_tasks": ("sum",)}, "digits text_tasks ['sum']"),
        ({"num_digits": 3}, "3 digits in 2 columns"),
        ({"columns": 0}, "4 digits in 0 columns"),
        ({"text_share": 1.5}, "text_share 1.5"),
        ({"cell": 15}, "cells of 15 pixels"),
        ({"width": 0}, "pictures of 0 pixels"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DigitsTask(**settings)
