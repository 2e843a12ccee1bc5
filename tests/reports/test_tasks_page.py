"""Benchmarks on a page of their own, and on a run's: tables, heat maps by benchmark, files for papers."""

import csv
import json

import pytest
from test_reports import results_values

from routing_experts.errors import ReportError
from routing_experts.records import TASKS_NAME, SideScore, Spread, TaskScore, TaskScores
from routing_experts.reports import write_folder_report
from routing_experts.reports.tasks_page import task_drawings


def side(name, value, rates, first, difference=None):
    skip_rate = sum(rates) / len(rates)
    gap = {} if difference is None else {"difference": difference, "low": difference - 0.01, "high": difference + 0.01}
    return SideScore(name, value, skip_rate, rates, seconds_to_first=Spread(first, first, first), **gap)


def score(task, metric="exact_match", layer=1):
    skipped = [0.0] * 4
    skipped[layer] = 1.0
    sides = [
        side("dense", 0.5, [0.0] * 4, 0.3),
        side("routed", 0.48, skipped, 0.2, -0.02),
        side("routed, 20 %", 0.49, [0.2] * 4, 0.25, -0.01),
    ]
    return TaskScore(task, metric, True, 100, sides)


SCORES = [score("gqa"), score("pope", "accuracy", 3), score("pope", "f1", 3)]
RECORD = TaskScores("mine<b>", 8, 4, SCORES, "0.7.3", {"date": "2026-11-24T00:00:00"})


def test_benchmarks_alone_have_a_page_and_files(tmp_path):
    RECORD.save(tmp_path / TASKS_NAME)
    page = write_folder_report(tmp_path).read_text()
    assert "2 benchmarks, 200 samples: dense; routed; routed, 20 %" in page
    assert "mine&lt;b&gt;" in page
    assert page.count("<figure") == 2
    assert "1.50×" in page, "0.3 s against 0.2 s to the first token"
    rows = list(csv.DictReader((tmp_path / "tasks.csv").open()))
    assert [(row["task"], row["metric"], row["side"]) for row in rows[:4]] == [
        ("gqa", "exact_match", "dense"),
        ("gqa", "exact_match", "routed"),
        ("gqa", "exact_match", "routed, 20 %"),
        ("pope", "accuracy", "dense"),
    ]
    assert (rows[0]["difference"], rows[1]["difference"], rows[1]["seconds_a_token"]) == ("", "-0.02", "")
    assert "| gqa | exact\\_match | routed |" in (tmp_path / "tasks.md").read_text()
    assert (tmp_path / "tasks.tex").read_text().count(r"\begin{table}") == 2


def test_a_heat_map_has_a_row_a_benchmark_whatever_its_metrics(tmp_path):
    routed, at = task_drawings(RECORD, tmp_path)
    assert routed.alternative == "gqa 25.0\N{NO-BREAK SPACE}%; pope 25.0\N{NO-BREAK SPACE}%"
    assert routed.title.endswith(": routed")
    assert at.title.endswith(": routed, 20 %")
    assert {path.stem for path in tmp_path.iterdir()} >= {
        "which-layers-each-benchmark-skips-routed",
        "which-layers-each-benchmark-skips-routed-20",
    }


def test_a_model_that_skips_nothing_has_no_heat_map(tmp_path):
    dense = TaskScore("gqa", "exact_match", True, 10, [side("dense", 0.5, [0.0] * 4, 0.3)])
    TaskScores("base", 8, 4, [dense], "0.7.3", {}).save(tmp_path / TASKS_NAME)
    assert "<figure" not in write_folder_report(tmp_path).read_text()


def test_a_run_s_own_page_shows_its_benchmarks(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results_values()))
    before = write_folder_report(tmp_path).read_text()
    RECORD.save(tmp_path / TASKS_NAME)
    page = write_folder_report(tmp_path).read_text()
    assert "Benchmarks: tasks" not in before
    assert "Benchmarks: tasks" in page
    assert page.count("<figure") == before.count("<figure") + 2
    assert (tmp_path / "tasks.csv").is_file()


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / TASKS_NAME).write_text('{"model": "x"}')
    with pytest.raises(ReportError, match=r"tasks\.json.*batch_size"):
        write_folder_report(tmp_path)
