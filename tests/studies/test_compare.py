"""Arms against the reference: pairs by seed and question, and mixtures where whole layers meet no rate."""

import numpy as np
import pytest

from routing_experts.records import ArmSpeed, as_bits, as_marks, from_bits, from_marks
from routing_experts.studies.compare import contrasts, newest, rights_at
from routing_experts.studies.plan import Study
from routing_experts.training.settings import build
from tiny_records import study_run

STUDY = build(
    Study,
    {
        "recipe": "digits",
        "rates": [0.1, 0.3],
        "seeds": [0, 1],
        "arms": {
            "routed": {},
            "static": {"control": "most_skipped", "rates": [0.25, 0.3333]},
            "exit": {"control": "early_exit"},
            "dense": {"control": "dense"},
        },
    },
    "",
)

RUNS = [
    study_run("routed", 0.3, 0, "1110", skip_rate=0.298),
    study_run("routed", 0.3, 1, "1111", skip_rate=0.301),
    study_run("static", 0.25, 0, "1100", skip_rate=0.25),
    study_run("static", 0.3333, 0, "0000", skip_rate=4 / 12),
    study_run("static", 0.25, 1, "1111", skip_rate=0.25),
    study_run("dense", 0.0, 0, "1111"),
    study_run("exit", 0.3, 0, "1000", skip_rate=4 / 12),
    study_run("exit", 0.1, 0, "1110", skip_rate=1 / 12),
]


def test_between_two_numbers_of_layers_each_question_draws_one_of_two_models():
    """By hand: 30 % lies 0.6 of the way from 25 to 33.3 %; seed 1 lacks a run and stays out."""
    found = rights_at(STUDY, RUNS, "static", 0.3)
    assert set(found) == {0}
    assert found[0] == pytest.approx(np.array([0.4, 0.4, 0.0, 0.0]), abs=1e-3)


def test_what_whole_layers_drop_counts_and_not_what_was_wanted():
    """A rate of 30 % of twelve layers drops four, a third: it must not pass for 30 %."""
    found = rights_at(STUDY, RUNS, "exit", 0.3)
    assert found[0] == pytest.approx(np.array([1.0, 0.1333, 0.1333, 0.0]), abs=1e-3)


def test_arms_that_were_not_run_so_far_or_so_low_are_left_out():
    assert rights_at(STUDY, RUNS, "static", 0.1) == {}
    assert rights_at(STUDY, RUNS, "routed", 0.1) == {}
    both = [*RUNS, study_run("routed", 0.1, 0, "1111"), study_run("routed", 0.1, 1, "1111")]
    assert rights_at(STUDY, both, "routed", 0.2) == {}, "routes are calibrated to a rate, not mixed to it"


def test_mixtures_are_told_from_models():
    found = {(one.second, one.wanted): one.mixed for one in contrasts(STUDY, RUNS)}
    assert found == {("static", 0.3): True, ("exit", 0.3): True, ("dense", 0.3): False}
    met = [*RUNS[:2], study_run("exit", 0.3, 0, "1000", skip_rate=0.3)]
    assert [one.mixed for one in contrasts(STUDY, met)] == [False]


def test_the_newest_timing_of_a_kind_counts():
    old, other, new = (
        ArmSpeed(arm, 0.3, 0, "generate", 1, [1.0], [seconds])
        for arm, seconds in (("routed", 2.0), ("static", 1.0), ("routed", 3.0))
    )
    assert newest([old, other, new]) == [new, other]


def test_dense_stands_beside_every_rate_and_pairs_share_seeds():
    found = {(one.second, one.wanted): one for one in contrasts(STUDY, RUNS)}
    assert set(found) == {("static", 0.3), ("exit", 0.3), ("dense", 0.3)}
    dense = found["dense", 0.3]
    assert (dense.seeds, dense.difference, dense.by_seed) == ([0], -0.25, [-0.25])
    assert found["static", 0.3].difference == pytest.approx(0.75 - 0.2, abs=1e-3)


def test_marks_hold_numbers_of_any_depth():
    """Guards models of more than 36 layers: a question that runs them all must not fail its study."""
    assert from_marks(as_marks(range(91))) == list(range(91))
    assert as_marks([0, 9, 10, 35]) == "09az"


def test_bits_come_back():
    assert as_bits([True, False, False]) == "100"
    assert from_bits("100") == [True, False, False]
