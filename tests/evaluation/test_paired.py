"""Paired intervals and mutual information, against numbers worked out by hand and by chance."""

import numpy as np
import pytest

from routing_experts.evaluation.importance import least_important
from routing_experts.evaluation.paired import bootstrap_interval, mutual_information, paired_difference, varied_share


def test_the_interval_is_that_of_questions_drawn_one_by_one():
    """The textbook bootstrap: every resample a list of questions."""
    rng = np.random.default_rng(3)
    first, second = rng.random((2, 120)) < 0.9, rng.random((2, 120)) < 0.7
    by_question = (first.astype(float) - second).mean(0)
    means = [by_question[rng.integers(0, 120, 120)].mean() for _ in range(20_000)]
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(by_question.mean())
    assert (difference.low, difference.high) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.005)


def test_scores_need_not_be_right_or_wrong():
    low, high = bootstrap_interval(np.random.default_rng(4).normal(2.0, 1.0, 900))
    assert (low, high) == pytest.approx((2 - 1.96 / 30, 2 + 1.96 / 30), abs=0.04)
    assert bootstrap_interval(np.zeros(5)) == (0.0, 0.0)


def test_seeds_that_answer_alike_do_not_narrow_the_interval():
    """Guards the unit: three copies of one model are no three times as many questions."""
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 400)) < 0.9, rng.random((1, 400)) < 0.8
    once = paired_difference(first, second)
    thrice = paired_difference(np.repeat(first, 3, 0), np.repeat(second, 3, 0))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        first, second = rng.random((1, 300)) < 0.85, rng.random((1, 300)) < 0.8
        difference = paired_difference(first, second)
        covered += difference.low <= 0.05 <= difference.high
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_routes_that_name_the_task_tell_all_of_it_and_random_ones_nothing():
    tasks = ["a", "b", "c", "d"] * 500
    named = [(task in "ab", task in "ac") for task in tasks]
    assert mutual_information(tasks, named) == pytest.approx(2, abs=0.01)
    rng = np.random.default_rng(2)
    drawn = [tuple(map(bool, row)) for row in rng.integers(0, 2, (2000, 2))]
    assert mutual_information(tasks, drawn) < 0.01
    assert mutual_information(tasks, [(True,)] * 2000) == 0


def test_layers_vary_between_five_and_ninety_five_per_cent():
    assert varied_share([0.0, 0.04, 0.05, 0.5, 0.95, 0.96, 1.0, 0.2]) == 4 / 8


def test_the_least_important_layers_come_first_and_only_routable_ones():
    assert least_important([0.1, 0.5, 0.2, 0.2], [1, 2, 3]) == [2, 3, 1]
