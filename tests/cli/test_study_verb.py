"""`roe study` with runs of three steps: what it records, going on with a part, and folders of another plan."""

import csv
import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from routing_experts.records import StudyRecord
from routing_experts.studies.jobs import Job

PLAN = {
    "recipe": "digits",
    "rates": [0.25],
    "seeds": [0],
    "questions": 16,
    "calibration_questions": 16,
    "set": {"training.steps": 3, "training.batch_size": 8, "training.logging_steps": 1, "data.records": 32},
    "arms": {
        "routed": {},
        "static": {"control": "most_skipped"},
        "random": {"control": "random"},
        "dense": {"control": "dense"},
        "exit": {"control": "early_exit"},
        "pruned": {"control": "pruning", "of": "dense"},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study")


def plan(folder: Path, **changes) -> Path:
    path = folder / "little.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


def test_a_part_is_recorded_and_the_rest_goes_on(roe, folder):
    """Guards studies of many sittings: whatever is trained now, the record holds all that was ever asked."""
    said = roe("study", plan(folder), "--output", folder / "runs", "--only", "routed")
    assert said[0] == 0, said
    record = folder / "runs" / "study.json"
    assert [run["arm"] for run in json.loads(record.read_text())["runs"]] == ["routed"]
    said = roe("study", plan(folder), "--output", folder / "runs", "--json", folder / "record.json")
    assert said[0] == 0, said
    study = json.loads(record.read_text())
    runs = {run["arm"]: run for run in study["runs"]}
    assert set(runs) == set(PLAN["arms"])
    assert {(c["first"], c["second"]) for c in study["contrasts"]} == {
        ("routed", arm) for arm in set(runs) - {"routed"}
    }
    assert sorted(runs["static"]["layer_skip_rates"]) == [0.0] * 9 + [1.0] * 3
    assert runs["exit"]["layer_skip_rates"] == [0.0] * 9 + [1.0] * 3
    assert runs["pruned"]["skip_rate"] == pytest.approx(0.25, abs=0.03)
    assert not any(runs["pruned"]["layer_skip_rates"])
    assert runs["random"]["layers_run"] == ""  # every question as many
    assert runs["random"]["varied_layers"] > 0.5
    assert runs["routed"]["settings"]["training.steps"] == 3
    assert set(study["untrained"]) == {"0.25"}
    assert [len(study["base"][name]) for name in ("right", "task_of", "tenth_of")] == [16, 16, 16]
    layers = json.loads((folder / "runs" / "layers.json").read_text())
    assert len(set(layers["by_harm"])) == 3
    assert sorted(layers["by_importance"]) == list(range(1, 12))


def test_a_killed_study_goes_on_from_its_record_alone(roe, folder, tmp_path):
    """Guards records that are committed while the weights are lost: nothing is trained again."""
    study = json.loads((folder / "record.json").read_text())
    study["runs"] = [run for run in study["runs"] if run["arm"] != "exit"]
    (tmp_path / "record.json").write_text(json.dumps(study))
    said = roe("study", plan(folder), "--output", tmp_path / "runs", "--json", tmp_path / "record.json")
    assert said[0] == 0, said
    assert sorted(path.parts[-3] for path in (tmp_path / "runs").glob("*/*/log.jsonl")) == ["exit-25"]
    whole = json.loads((tmp_path / "record.json").read_text())
    assert {run["arm"]: run["right"] for run in whole["runs"]} == {
        run["arm"]: run["right"] for run in json.loads((folder / "record.json").read_text())["runs"]
    }


def test_a_study_s_report_is_for_people_papers_and_programs(roe, folder):
    """The models are at hand: they are timed, and asked what they win and lose."""
    runs = folder / "runs"
    said = roe("study", plan(folder), "--output", runs, "--minutes", "0", "--speed")
    assert said[0] == 0, said
    study = StudyRecord.load(runs / "study.json")
    assert {one.arm for one in study.speeds} == set(PLAN["arms"]) - {"random"}
    assert {(one.phase, one.batch) for one in study.speeds} == set(product(("prefill", "generate"), (1, 16)))
    assert all(len(one.base_seconds) == len(one.arm_seconds) == 7 for one in study.speeds)
    assert roe("report", runs)[0] == 0
    page = (runs / "report.html").read_text()
    assert page.count("<figure") == 8
    assert "Not drawn" not in page
    for title in ("Accuracy against work left out", "25.0 % left out", "Difficulty and depth", "the authors&#39; log"):
        assert title in page or title.replace(" %", "\N{NO-BREAK SPACE}%") in page
    rows = list(csv.DictReader((runs / "study.csv").open()))
    assert {row["arm"]: row["accuracy"] for row in rows} == {run.arm: str(run.accuracy) for run in study.runs}
    paper = (runs / "study.tex").read_text()
    assert paper.count(r"\begin{table}") == paper.count(r"\end{table}") == 5
    assert r"layers\_run" not in paper
    assert r"25.0~\%" in paper
    assert "| **routed** |" in (runs / "study.md").read_text()
    if (runs / "gallery.json").exists():
        assert "Wins and losses" in page


def test_a_run_that_another_process_does_is_left_to_it(roe, folder, tmp_path):
    job = Job("routed", 0.25, 0)
    with job.claimed(tmp_path / "runs") as free:
        assert free
        said = roe("study", plan(folder), "--output", tmp_path / "runs", "--only", "routed")
    assert said[0] == 0, said
    assert "1 of 1 runs are left" in said[2] + said[1]
    assert not list((tmp_path / "runs").glob("*/*/log.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": PLAN["set"] | {"training.steps": 6}}, "was trained with training.steps 3, the study asks for 6"),
        ({"questions": 17}, "was asked with questions 16, the study has 17"),
        ({"question_seed": 7}, "was asked with question_seed 1000, the study has 7"),
        ({"set": PLAN["set"] | {"data.source": "mine.json"}}, "a study asks questions on the digits"),
        ({"rates": [0.04]}, "less than half a layer"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(changes, message, roe, folder):
    """Guards a table against runs of another plan that lie in the same folder."""
    only = ["--only", "static"] if "rates" in changes else []
    code, _, complaint = roe("study", plan(folder, **changes), "--output", folder / "runs", *only)
    assert code == 1
    assert message in " ".join(complaint.split())
