"""What a study's tables and figures are made of, by hand; and the authors' log by what is told of it."""

import pytest

from routing_experts.records import ArmSpeed, BaseAnswers, Contrast, RouteCount, StudyRecord, as_marks
from routing_experts.reports.study_data import (
    accuracy_at,
    authors_routes,
    depths,
    fronts_of,
    main_rate,
    mixed_speed_ups,
    reference_run,
    speed_ups,
    tenth_shares,
)
from tiny_records import study_run


def run(arm, wanted, seed, accuracy, **changes):
    return study_run(arm, wanted, seed, "1100", accuracy=accuracy, layer_skip_rates=[0.0] * 12, **changes)


ROUTE = RouteCount("1" * 12, 4, 0.5)
RUNS = [
    run("dense", 0.0, 0, 0.97),
    run("static", 0.25, 0, 0.90),
    run("routed", 0.4, 0, 0.92, skip_rate=0.41),
    run("routed", 0.25, 1, 0.94, skip_rate=0.26, routes=[ROUTE]),
    run("routed", 0.25, 0, 0.96, skip_rate=0.24, routes=[ROUTE]),
]
PLAN = {"arms": {"static": {}, "dense": {}, "routed": {}}}
GAP = Contrast("routed", "static", 0.25, [0, 1], 0.04, 0.0, 0.1, [0.06, 0.02])
SPEEDS = [
    ArmSpeed("routed", 0.25, 0, "generate", 16, [3.0, 2.0, 2.0], [1.0, 9.0, 0.5]),
    ArmSpeed("routed", 0.25, 0, "prefill", 16, [9.0], [1.0]),
]
STUDY = StudyRecord("s", PLAN, 0.96, 4, 0, RUNS, [GAP], {}, speeds=SPEEDS)


def test_the_reference_comes_first_and_what_saves_nothing_is_on_no_front():
    found = fronts_of(STUDY)
    assert list(found) == ["routed", "static"]
    assert [(one.wanted, one.skip_rate, sorted(one.accuracies)) for one in found["routed"]] == [
        (0.25, pytest.approx(0.25), [0.94, 0.96]),
        (0.4, 0.41, [0.92]),
    ]


def test_the_main_rate_is_the_nearest_to_the_paper_s():
    assert main_rate(STUDY) == 0.25
    assert reference_run(STUDY) is RUNS[4]
    assert list(STUDY.reference_runs) == [0.25, 0.4]
    assert (STUDY.is_dense("dense"), STUDY.is_dense("static")) == (True, False)


def test_a_rival_s_accuracy_is_the_reference_s_less_the_gap():
    assert accuracy_at(STUDY, GAP) == pytest.approx({0: 0.90, 1: 0.92})


def test_speed_ups_are_of_whole_answers_that_took_turns():
    assert speed_ups(STUDY, "routed", 0.25, 16) == [3.0, pytest.approx(2 / 9), 4.0]
    assert speed_ups(STUDY, "routed", 0.25, 1) == []


def test_a_mixture_takes_the_mean_of_its_models_times():
    """A quarter of the questions ask the sparser one; both models took turns with the base, one after the other."""
    runs = [run("static", 0.2, 0, 0.9), run("static", 0.4, 0, 0.8), run("static", 0.6, 0, 0.7)]
    speeds = [
        ArmSpeed("static", 0.2, 0, "generate", 1, [3.0, 2.0], [2.0, 2.0]),
        ArmSpeed("static", 0.4, 0, "generate", 1, [4.0, 8.0], [2.0, 2.0]),
        ArmSpeed("static", 0.6, 0, "generate", 1, [9.0, 9.0], [1.0, 1.0]),
    ]
    study = StudyRecord("s", PLAN, 0.96, 4, 0, runs, [], {}, speeds=speeds)
    mixed = Contrast("routed", "static", 0.25, [0], 0.1, 0.0, 0.2, [0.1], mixed=True)
    assert mixed_speed_ups(study, mixed, 1) == pytest.approx([1 / (0.75 / 1.5 + 0.25 / 2), 1 / (0.75 / 1 + 0.25 / 4)])
    assert mixed_speed_ups(study, mixed, 16) == []


def test_depths_are_of_layers_skipped():
    assert depths(run("routed", 0.25, 0, 0.5, layers_run=as_marks([12, 9, 9, 10])), 12) == {0: 0.25, 2: 0.25, 3: 0.5}
    assert depths(run("static", 0.25, 0, 0.5), 12) == {3: 1.0}


def test_tenths_go_from_the_easiest():
    base = BaseAnswers(0.5, "1100", ["t"], "0000", "0990", 0)
    assert tenth_shares(base, [1.0, 2.0, 4.0, 3.0]) == [2.0, *[0.0] * 8, 3.0]


def test_the_authors_log_is_as_it_is_told():
    """12,584 examples, 32 layers, 13.3 % of decisions skip, 288 routes, the five commonest cover 70 %."""
    log = authors_routes()
    assert len(log.layer_skip_rates) == 32
    assert log.skip_rate == pytest.approx(0.133, abs=5e-4)
    assert log.distinct == 288
    assert log.top_share == pytest.approx(0.70, abs=5e-3)
    assert sum(log.skipped.values()) == pytest.approx(1.0)
    assert log.skipped[1 / 32] == pytest.approx(0.286, abs=5e-4)
