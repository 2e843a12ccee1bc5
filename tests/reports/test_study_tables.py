"""A study's tables by hand: who stands where, what is compared with what, and how the paper's claims come out."""

import pytest

from routing_experts.records import ArmSpeed, BaseAnswers, Contrast, RouteCount, StudyRecord
from routing_experts.reports.study_data import agreement
from routing_experts.reports.study_tables import claims_grid, rate_grids, routes_grid, task_grid
from tiny_records import study_run

PLAN = {
    "arms": {
        "routed": {},
        "soft": {"about": "softer", "claim": "as_good"},
        "bare": {"claim": "worse", "remark": "too few steps."},
        "static": {},
        "dense": {},
    }
}


def run(arm, wanted, seed, right, **changes):
    by_task = {"task_accuracy": {"a": right.count("1") / 4}, "task_skip_rate": {"a": wanted}}
    return study_run(arm, wanted, seed, right, layer_skip_rates=[0.0, 0.9, 0.5, 0.0], **(by_task | changes))


RUNS = [
    run("routed", 0.1, 0, "1111"),
    run("routed", 0.3, 0, "1110", skip_rate=0.29, routes=[RouteCount("1011", 4, 0.75)], layers_run="4433"),
    run("routed", 0.3, 1, "1111", skip_rate=0.31, routes=[RouteCount("1011", 4, 1.0)]),
    run("soft", 0.3, 0, "1100", skip_rate=0.28, raw_skip_rate=0.2),
    run("bare", 0.3, 0, "1110"),
    run("static", 0.25, 0, "1100"),
    run("static", 0.5, 0, "1000"),
    run("dense", 0.0, 0, "1111"),
]
CONTRASTS = [
    Contrast("routed", "soft", 0.3, [0], 0.25, 0.1, 0.4, [0.25]),
    Contrast("routed", "bare", 0.3, [0], 0.0, -0.1, 0.1, [0.0]),
    Contrast("routed", "static", 0.3, [0], 0.3, 0.2, 0.4, [0.3]),
    Contrast("routed", "dense", 0.3, [0], -0.25, -0.3, -0.2, [-0.25]),
    Contrast("routed", "dense", 0.1, [0], 0.0, 0.0, 0.0, [0.0]),
]
SPEEDS = [ArmSpeed("soft", 0.3, 0, "generate", 1, [3.0], [2.0]), ArmSpeed("dense", 0.0, 0, "generate", 1, [1.0], [1.0])]
BASE = BaseAnswers(0.75, "1101", ["a"], "0000", "0123", 0)
STUDY = StudyRecord("s", PLAN, 0.75, 4, 0, RUNS, CONTRASTS, {}, base=BASE, speeds=SPEEDS)


def test_the_main_table_has_a_part_a_rate_and_the_strongest_rival_first():
    low, main = rate_grids(STUDY)
    assert [row[0] for row in low.rows] == ["routed", "dense"]
    assert [row[0] for row in main.rows] == ["routed", "dense", "bare", "soft", "static"]
    assert main.rows[0][1:5] == ("87.5\N{NO-BREAK SPACE}%", "75.0 / 100.0", "30.0\N{NO-BREAK SPACE}%", "—")
    assert (low.note, main.note != "") == ("", True)


def test_what_is_left_out_is_what_was_measured_and_of_mixtures_what_was_wanted():
    rows = {row[0]: row for row in rate_grids(STUDY)[1].rows}
    assert rows["soft"][3] == "28.0\N{NO-BREAK SPACE}%"
    assert rows["static"][1:4] == ("45.0\N{NO-BREAK SPACE}%", "45.0", "30.0\N{NO-BREAK SPACE}%")
    assert rows["dense"][3] == "0.0\N{NO-BREAK SPACE}%"
    assert (rows["soft"][6], rows["dense"][6], rows["bare"][6]) == ("1.50×", "1.00×", "—")


def test_claims_stand_beside_what_was_measured():
    grid = claims_grid(STUDY)
    assert [row[:4] for row in grid.rows] == [
        ("soft", "softer", "has it so", "does not agree"),
        ("bare", "", "needs what it lacks", "no difference"),
    ]
    assert (grid.rows[0][-1], grid.rows[1][-1]) == ("20.0\N{NO-BREAK SPACE}%", "—")
    assert grid.note.endswith("bare: too few steps.")


def test_a_plan_without_claims_has_no_such_table():
    silent = {"arms": {name: {} for name in PLAN["arms"]}}
    assert claims_grid(StudyRecord("s", silent, 0.75, 4, 0, RUNS, CONTRASTS, {})) is None
    assert claims_grid(StudyRecord("s", {}, 0.75, 4, 0, RUNS, CONTRASTS, {})) is None


@pytest.mark.parametrize(
    ("claim", "low", "high", "said"),
    [
        ("worse", 0.01, 0.02, "agrees"),
        ("worse", 0.0, 0.02, "no difference"),
        ("worse", -0.01, 0.02, "no difference"),
        ("worse", -0.02, -0.01, "does not agree"),
        ("as_good", 0.01, 0.02, "does not agree"),
        ("as_good", -0.01, 0.02, "agrees"),
        ("as_good", -0.02, -0.01, "agrees"),
    ],
)
def test_an_interval_decides(claim, low, high, said):
    assert agreement(claim, Contrast("routed", "x", 0.3, [0], (low + high) / 2, low, high, [0.0])) == said


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
