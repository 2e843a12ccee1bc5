"""A study's tables by hand: who stands where, what is compared with what, and how the paper's claims come out."""

import pytest

from routing_experts.records import ArmSpeed, BaseAnswers, Contrast, RouteCount, StudyRecord
from routing_experts.reports.study_data import agreement
from routing_experts.reports.study_tables import claims_grid, rate_grids, routes_grid, task_grid
from tiny_records import study_run

PLAN = {
    "seeds": [0, 1],
    "arms": {
        "routed": {},
        "soft": {"about": "softer", "claim": "as_good"},
        "bare": {"claim": "worse", "remark": "too few steps."},
        "lost": {"claim": "worse"},
        "static": {},
        "dense": {},
    },
}


def run(arm, wanted, seed, right, **changes):
    by_task = {"task_accuracy": {"a": right.count("1") / 4}, "task_skip_rate": {"a": wanted}}
    return study_run(arm, wanted, seed, right, layer_skip_rates=[0.0, 0.9, 0.5, 0.0], **(by_task | changes))


RUNS = [
    run("routed", 0.1, 0, "1111"),
    run("routed", 0.3, 0, "1110", skip_rate=0.29, routes=[RouteCount("1011", 4, 0.75)], layers_run="4433"),
    run("routed", 0.3, 1, "1111", skip_rate=0.31, routes=[RouteCount("1011", 4, 1.0)]),
    run("soft", 0.3, 0, "1100", skip_rate=0.29, raw_skip_rate=0.2),
    run("soft", 0.3, 1, "1110", skip_rate=0.27, raw_skip_rate=0.24),
    run("bare", 0.3, 0, "1110"),
    run("lost", 0.3, 0, "1110", skip_rate=0.33),
    run("static", 0.25, 0, "1100"),
    run("static", 0.5, 0, "1000"),
    run("dense", 0.0, 0, "1111"),
]
CONTRASTS = [
    Contrast("routed", "soft", 0.3, [0, 1], 0.25, 0.1, 0.4, [0.25, 0.25]),
    Contrast("routed", "bare", 0.3, [0], 0.0, -0.1, 0.1, [0.0]),
    Contrast("routed", "lost", 0.3, [0], 0.0, -0.1, 0.1, [0.0]),
    Contrast("routed", "static", 0.3, [0], 0.3, 0.2, 0.4, [0.3], mixed=True),
    Contrast("routed", "dense", 0.3, [0], -0.25, -0.3, -0.2, [-0.25]),
    Contrast("routed", "dense", 0.1, [0], 0.0, 0.0, 0.0, [0.0]),
]
SPEEDS = [
    ArmSpeed("soft", 0.3, 0, "generate", 1, [3.0, 4.0, 2.0], [2.0, 2.0, 2.0]),
    ArmSpeed("static", 0.3, 0, "generate", 1, [9.0], [1.0]),
    ArmSpeed("dense", 0.0, 0, "generate", 1, [1.0], [1.0]),
]
BASE = BaseAnswers(0.75, "1101", ["a"], "0000", "0123", 0)
STUDY = StudyRecord("s", PLAN, 0.75, 4, 0, RUNS, CONTRASTS, {}, base=BASE, speeds=SPEEDS)


def test_the_main_table_has_a_part_a_rate_and_the_strongest_rival_first():
    low, main = rate_grids(STUDY)
    assert [row[0] for row in low.rows] == ["routed", "dense"]
    assert [row[0] for row in main.rows] == ["routed", "dense", "bare", "lost", "soft", "static"]
    assert main.rows[0][1:5] == ("87.5\N{NO-BREAK SPACE}%", "75.0 / 100.0", "30.0\N{NO-BREAK SPACE}%", "—")
    assert (low.note, main.note != "") == ("", True)


def test_a_seed_that_is_missing_is_seen():
    """Guards against a mean of fewer seeds that looks like one of all."""
    rows = {row[0]: row for row in rate_grids(STUDY)[1].rows}
    assert (rows["soft"][2], rows["bare"][2]) == ("50.0 / 75.0", "75.0 / —")


def test_what_is_left_out_is_what_was_measured_and_of_mixtures_what_was_wanted():
    """A mixture of two models has no speed where one of them was not timed, even if another bears its rate's name."""
    rows = {row[0]: row for row in rate_grids(STUDY)[1].rows}
    assert rows["soft"][3] == "28.0\N{NO-BREAK SPACE}%"
    assert rows["static"][1:4] == ("45.0\N{NO-BREAK SPACE}%", "45.0 / —", "30.0\N{NO-BREAK SPACE}%")
    assert rows["dense"][3] == "0.0\N{NO-BREAK SPACE}%"
    assert [rows[arm][6] for arm in ("soft", "dense", "bare", "static")] == ["1.50× (1.25–1.75)", "1.00×", "—", "—"]


def test_a_study_that_was_not_timed_has_no_columns_for_speed():
    """Guards records before their models were timed: columns of dashes would say nothing."""
    untimed = StudyRecord("s", PLAN, 0.75, 4, 0, RUNS, CONTRASTS, {}, base=BASE)
    for grid, timed in zip(rate_grids(untimed), rate_grids(STUDY), strict=True):
        assert grid.columns == timed.columns[:6]
        assert grid.rows == tuple(row[:6] for row in timed.rows)
    assert "Speed-up" not in rate_grids(untimed)[-1].note
    assert "Speed-up" in rate_grids(STUDY)[-1].note


def test_claims_stand_beside_what_was_measured():
    grid = claims_grid(STUDY)
    assert [row[:4] for row in grid.rows] == [
        ("soft", "softer", "has it so", "does not agree"),
        ("bare", "", "needs what it lacks", "undecided"),
        ("lost", "", "needs what it lacks", "rate not met"),
    ]
    assert grid.rows[0][6:] == ("+25.0 / +25.0", "28.0\N{NO-BREAK SPACE}%", "22.0\N{NO-BREAK SPACE}%")
    assert grid.rows[1][8] == "—"
    assert grid.note.endswith("bare: too few steps.")


def test_a_plan_without_claims_has_no_such_table():
    silent = {"arms": {name: {} for name in PLAN["arms"]}}
    assert claims_grid(StudyRecord("s", silent, 0.75, 4, 0, RUNS, CONTRASTS, {})) is None
    assert claims_grid(StudyRecord("s", {}, 0.75, 4, 0, RUNS, CONTRASTS, {})) is None


@pytest.mark.parametrize(
    ("claim", "low", "high", "by_seed", "said"),
    [
        ("worse", 0.01, 0.02, [0.01, 0.02], "agrees"),
        ("worse", 0.01, 0.02, [-0.01, 0.04], "undecided"),
        ("worse", 0.01, 0.02, [0.015], "undecided"),
        ("worse", 0.0, 0.02, [0.01, 0.02], "undecided"),
        ("worse", -0.02, -0.01, [-0.01, -0.02], "does not agree"),
        ("worse", -0.02, -0.01, [0.01, -0.04], "undecided"),
        ("as_good", 0.01, 0.02, [0.01, 0.02], "does not agree"),
        ("as_good", 0.01, 0.02, [-0.01, 0.04], "undecided"),
        ("as_good", -0.01, 0.009, [0.0, 0.0], "agrees"),
        ("as_good", 0.001, 0.009, [0.005, 0.005], "agrees"),  # surely worse, and surely by less than a point
        ("as_good", 0.001, 0.011, [0.005, 0.005], "does not agree"),
        ("as_good", -0.05, 0.02, [-0.1, 0.1], "undecided"),
        ("as_good", -0.02, -0.01, [-0.01, -0.02], "agrees"),
        ("as_good", -0.02, -0.01, [-0.015], "undecided"),
    ],
)
def test_an_interval_decides_where_every_seed_agrees(claim, low, high, by_seed, said):
    contrast = Contrast("routed", "x", 0.3, list(range(len(by_seed))), (low + high) / 2, low, high, by_seed)
    assert agreement(claim, contrast) == said


def test_tasks_and_routes_have_tables():
    assert task_grid(STUDY).rows == (
        (
            "a",
            "75.0\N{NO-BREAK SPACE}%",
            "100.0\N{NO-BREAK SPACE}% (10.0\N{NO-BREAK SPACE}%)",
            "87.5\N{NO-BREAK SPACE}% (30.0\N{NO-BREAK SPACE}%)",
        ),
    )
    rows = {row[0]: row[1:] for row in routes_grid(STUDY, RUNS[1]).rows}
    assert rows["decisions that skip"] == ("29.0\N{NO-BREAK SPACE}%", "13.3\N{NO-BREAK SPACE}%")
    assert rows["distinct routes"] == ("1", "288")
    assert rows["questions at the fewest skipped"][0] == "50.0\N{NO-BREAK SPACE}%"
