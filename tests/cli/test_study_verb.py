"""`roe study` with runs of three steps: what it records, going on with a part, and folders of another plan."""

import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from routing_experts.cli.app import app
from routing_experts.models.convert import is_routed
from routing_experts.models.families import family_of
from routing_experts.records import StudyRecord
from routing_experts.studies import contest as contest_module
from routing_experts.studies.contest import Contest
from routing_experts.studies.gallery import write_wins_and_losses
from routing_experts.studies.jobs import Job
from routing_experts.studies.ledger import Ledger
from routing_experts.studies.plan import load_study
from routing_experts.studies.speed import _model_of, timed_jobs
from routing_experts.studies.work import work_on

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
    """The study in two sittings: one arm, whose record is laid aside, then the rest."""
    folder = tmp_path_factory.mktemp("study")
    for more in (["--only", "routed"], ["--json", folder / "record.json"]):
        words = ["study", plan(folder), "--output", folder / "runs", *more]
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        if not (folder / "part.json").exists():
            shutil.copy(folder / "runs" / "study.json", folder / "part.json")
    return folder


def plan(folder: Path, **changes) -> Path:
    path = folder / "little.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


def test_a_part_is_recorded_and_the_rest_goes_on(folder):
    """Guards studies of many sittings: whatever is trained now, the record holds all that was ever asked."""
    assert [run["arm"] for run in json.loads((folder / "part.json").read_text())["runs"]] == ["routed"]
    study = json.loads((folder / "runs" / "study.json").read_text())
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


def little_contest(folder: Path) -> Contest:
    """The module's study, whose runs are done."""
    return Contest(load_study(str(plan(folder))), folder / "runs", Console(quiet=True), lambda *what: nullcontext(int))


def test_one_model_is_timed_of_each_arm_whatever_seed_is_left(folder):
    """Guards studies whose early models are gone: the record alone knows them, later seeds' models are timed."""
    contest = little_contest(folder)
    both = Contest(replace(contest.study, seeds=(7, 0)), contest.output, contest.console, contest.bar)
    assert [(job.arm, job.seed) for job in timed_jobs(both)] == [(job.arm, 0) for job in timed_jobs(contest)]
    assert len(timed_jobs(contest)) == len(PLAN["arms"]) - 1


def test_what_is_won_and_lost_is_shown_with_who_said_it(roe, folder, tmp_path):
    """Question 0 is called a win and 1 a loss; both models are asked what they say to them."""
    runs = tmp_path / "runs"
    shutil.copytree(folder / "runs", runs)
    contest = little_contest(folder)
    contest.output = runs
    routed = replace(contest.found(Job("routed", 0.25, 0)), right="10" + "1" * 14)
    dense = replace(contest.found(Job("dense", 0.0, 0)), right="01" + "1" * 14)
    contest._checked[Job("dense", 0.0, 0)] = dense
    write_wins_and_losses(contest, routed)
    shown = json.loads((runs / "gallery.json").read_text())
    questions = [question.answer for question in contest.questions[:2]]
    assert [item["answer"] for item in shown] == questions
    assert {tuple(item["names"]) for item in shown} == {("dense", "routed at 25%")}
    assert roe("report", runs)[0] == 0
    assert "Wins and losses against dense" in (runs / "report.html").read_text()
    shutil.rmtree(runs / "dense-0")
    write_wins_and_losses(contest, replace(routed, right=flipped(contest.answers_of_base.right)))
    assert {item["names"][0] for item in json.loads((runs / "gallery.json").read_text())} == {"the base model"}
    write_wins_and_losses(contest, None)
    assert not (runs / "gallery.json").exists()


def flipped(right: str) -> str:
    return right.translate(str.maketrans("01", "10"))


def test_nothing_is_begun_when_time_is_up_and_every_run_is_told(folder):
    """Guards shards: a source may take all the time, and its dependent is left for the next one."""
    contest = little_contest(folder)
    done: dict[Job, bool] = {}
    contest.found = done.get
    told = []
    contest.run = lambda job: done.update({job: True})
    jobs = [Job("static", 0.25, 0)]
    work_on(contest, jobs, 0.0, lambda: told.append(len(done)))
    assert not done
    work_on(contest, jobs, None, lambda: told.append(len(done)))
    assert list(done) == [Job("routed", 0.25, 0), *jobs]
    assert told == [1, 2]


def test_pruning_claims_the_run_whose_model_it_asks(folder):
    """Guards against two processes that train one folder: the model may have to be trained again."""
    contest = little_contest(folder)
    source, job = Job("dense", 0.0, 0), Job("pruned", 0.25, 0)
    done = {source: True}
    contest.found = done.get
    contest.run = lambda one: done.update({one: True})
    with source.claimed(contest.output):
        work_on(contest, [job])
    assert job not in done
    work_on(contest, [job])
    assert job in done


def test_dense_rivals_are_asked_as_they_were_trained(folder, monkeypatch):
    """Guards against a rival that loses for its prompt: a dense model's folder does not say how it was trained."""
    said = PLAN["set"] | {"data.prompt_format": "vicuna_v1"}
    contest = Contest(load_study(str(plan(folder, set=said))), folder / "runs", Console(quiet=True), None)
    contest.bar = lambda *what: nullcontext(int)
    monkeypatch.setattr(contest_module, "ask", lambda *args, prompt_format, **settings: prompt_format)
    job = Job("dense", 0.0, 0)
    assert contest._asked(job, contest.recipe(job), None) == "vicuna_v1"


def test_rivals_without_layers_are_timed_without_them(folder):
    """Guards the comparison: no routing stands in their way, and an early exit has no adapters either."""
    contest = little_contest(folder)
    layers = {}
    for arm in ("static", "exit", "routed"):
        model, _ = _model_of(contest, Job(arm, 0.25, 0))
        layers[arm] = [type(layer).__name__ for layer in family_of(model).decoder_layers(model)]
        assert is_routed(model) == (arm == "routed")
    assert layers["static"].count("AdapterLayer") == 3
    assert layers["exit"] == ["LlamaDecoderLayer"] * 9


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
        ({"rates": [0.5833]}, "all of them make"),
        ({"arms": PLAN["arms"] | {"static": {"control": "early_exit"}}}, "the study asks for [9, 10, 11]"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused(changes, message, roe, folder):
    """Guards a table against runs of another plan that lie in the same folder."""
    code, _, complaint = roe("study", plan(folder, **changes), "--output", folder / "runs")
    assert code == 1
    assert message in " ".join(complaint.split())


def test_a_record_is_not_written_over_by_a_plan_of_fewer_runs(roe, folder, tmp_path):
    record = tmp_path / "record.json"
    shutil.copy(folder / "record.json", record)
    fewer = {name: arm for name, arm in PLAN["arms"].items() if name != "exit"}
    code, _, complaint = roe("study", plan(folder, arms=fewer), "--output", tmp_path / "runs", "--json", record)
    assert code == 1
    assert "1 runs that the plan does not name, such as exit at 25.0%, seed 0" in " ".join(complaint.split())
    assert record.read_text() == (folder / "record.json").read_text()


def test_what_another_process_wrote_since_is_kept(folder, tmp_path):
    """Guards two sittings with folders of their own that write one record."""
    contest = little_contest(folder)
    contest.output, record = tmp_path / "runs", tmp_path / "record.json"
    ledger = Ledger("little", contest, record)
    shutil.copy(folder / "record.json", record)
    assert {run.arm for run in ledger.write().runs} == set(PLAN["arms"])
    assert {run.arm for run in StudyRecord.load(record).runs} == set(PLAN["arms"])


def test_records_without_settings_are_held_to_their_steps(roe, folder, tmp_path):
    """Guards older records: what they say of a run has to fit."""
    record = tmp_path / "record.json"
    study = json.loads((folder / "record.json").read_text())
    for run in study["runs"]:
        run["settings"] = {}
    record.write_text(json.dumps(study))
    longer = PLAN["set"] | {"training.steps": 4}
    code, _, complaint = roe("study", plan(folder, set=longer), "--output", tmp_path / "runs", "--json", record)
    assert code == 1
    assert "was trained with training.steps 3, the study asks for 4" in " ".join(complaint.split())
