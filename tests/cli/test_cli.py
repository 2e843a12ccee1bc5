"""Every verb through the command line's own entrance: help, results with all their keys, mistakes as one message."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from routing_experts import __version__
from routing_experts.cli.app import app
from routing_experts.cli.calibrate import calibrate
from routing_experts.cli.evaluate import evaluate
from routing_experts.config import RoEConfig
from routing_experts.evaluation import speed
from routing_experts.evaluation.questions import BATCH_SIZE
from routing_experts.records import Results

VERBS = sorted(command.name for command in app.registered_commands if command.name)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "white").save(path)
    return path


def assert_one_message(said: tuple[int, str, str], *expected: str) -> None:
    code, _, complaint = said
    assert code == 1, said
    assert complaint.count("error:") == 1
    assert "Traceback" not in complaint
    for words in expected:
        assert words in " ".join(complaint.split()), complaint


def test_the_verbs_are_there():
    """Guards the test below against an empty list."""
    assert {"convert", "evaluate", "families", "generate", "quickstart", "report", "train"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, roe):
    """Guards the first thing that a newcomer types."""
    code, out, _ = roe(verb, "--help")
    assert code == 0
    assert f"roe {verb}" in out
    assert "Example: " in out


def test_help_lists_the_verbs(roe):
    """Guards the overview."""
    code, out, _ = roe("--help")
    assert code == 0
    assert all(verb in out for verb in VERBS)


def test_version(roe):
    """Guards ``--version``."""
    assert roe("--version")[:2] == (0, f"{__version__}\n")


def test_families_are_listed(roe):
    """Guards the answer to: can my model be routed?"""
    code, out, _ = roe("families")
    assert code == 0
    assert "llava" in out
    assert "llama" in out


def test_convert_writes_a_routed_model(roe, routed_run, tmp_path):
    """Guards conversion without training, whole and RoE parts alone."""
    base = routed_run.parent / "base"
    assert roe("convert", base, tmp_path / "whole", "--target-skip-ratio", "0.2")[0] == 0
    assert roe("convert", base, tmp_path / "parts", "--no-base-weights", "--preset", "paper")[0] == 0
    whole, parts = (RoEConfig.load(tmp_path / name) for name in ("whole", "parts"))
    assert (whole.target_skip_ratio, parts.gate) == (0.2, "softmax")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert not (tmp_path / "parts" / "model.safetensors").exists()


def value(results: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        results = results[name]
    return results


SHARES = (
    *("dense.accuracy", "base.accuracy", "routed.accuracy", "routed.skip_rate", "static.accuracy", "static.skip_rate"),
    *("random.accuracy", "random.skip_rate"),
)


def test_evaluate_writes_every_key(roe, routed_run, tmp_path):
    """Guards the file that reports and users' scripts read."""
    target = tmp_path / "results.json"
    code, out, said = roe("evaluate", routed_run, "--questions", "24", "--seed", "7", "--no-speed", "--json", target)
    assert code == 0
    assert "layers skipped" in out
    assert str(target) in said.replace("\n", "")
    results = json.loads(target.read_text())
    assert all(0 <= value(results, path) <= 1 for path in SHARES)
    assert 0 < results["routed"]["skip_rate"] < 1
    for control in ("static", "random"):
        assert results[control]["skip_rate"] == pytest.approx(results["routed"]["skip_rate"], abs=1 / (24 * 12))
    assert results["tasks"]
    for task in results["tasks"].values():
        assert {"dense", "routed", "skip_rate"} <= task.keys()
    assert sum(task["questions"] for task in results["tasks"].values()) == results["questions"] == 24
    assert results["speed"]["dense_seconds"] == results["speed"]["routed_seconds"] == 0
    # A build's tag, "+cpu" or "+cu130", is not always part of what the package says of itself.
    assert results["environment"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["seconds_total"] > 0
    assert results["seed"] == 7
    assert Results.load(target).to_dict() == results
    assert not (routed_run / "results.json").exists()


def test_evaluate_measures_seconds(roe, routed_run, monkeypatch):
    """Guards timing, on a smaller larger model, and the place of a run's own results."""
    monkeypatch.setattr(speed, "LARGER", speed.LARGER | {"num_hidden_layers": 4, "hidden_size": 64})
    assert roe("evaluate", routed_run, "--questions", "24")[0] == 0
    results = json.loads((routed_run / "results.json").read_text())
    (routed_run / "results.json").unlink()
    assert results["speed"]["dense_seconds"] > 0
    assert results["speed"]["routed_seconds"] > 0
    assert {(case["phase"], case["batch"]) for case in results["speed"]["cases"]} >= {("prefill", 1), ("decode", 16)}


def test_evaluate_asks_more_than_one_batch(roe, routed_run, tmp_path):
    """Guards the seam between batches, where routes of one must not reach the next."""
    found = []
    for size in ("24", "9"):
        asked = ("--questions", "24", "--batch-size", size, "--no-speed", "--json", tmp_path / f"{size}.json")
        assert roe("evaluate", routed_run, *asked)[0] == 0
        found.append(Results.load(tmp_path / f"{size}.json"))
    one, several = found
    assert several.routed == one.routed
    assert (several.dense, several.static, several.routes) == (one.dense, one.static, one.routes)


def test_batches_are_as_large_by_verb_as_by_function():
    """Guards the verbs' default, a number of its own so that ``--help`` need not load torch."""
    defaults = [inspect.signature(verb).parameters["batch_size"].default for verb in (evaluate, calibrate)]
    assert defaults == [BATCH_SIZE, BATCH_SIZE]


def test_evaluate_takes_a_plain_model(roe, routed_run, tmp_path):
    """Guards dense baselines: accuracy by task, no routes."""
    target = tmp_path / "results.json"
    code, *_ = roe("evaluate", routed_run.parent / "base", "--questions", "16", "--json", target)
    assert code == 0
    results = json.loads(target.read_text())
    assert 0 <= results["dense"]["accuracy"] <= 1
    assert "environment" in results


def test_generate_answers_about_a_picture(roe, routed_run, picture):
    """Guards a question with a picture, and the route shown under the answer."""
    code, out, _ = roe(
        "generate", routed_run, "--image", picture, "--prompt", "Read all digits.", "--max-new-tokens", 3
    )
    assert code == 0
    strip = out.strip().splitlines()[-1]
    assert sum(strip.count(mark) for mark in "■·") >= 12
    assert "layers skipped" in strip


def test_generate_answers_without_a_picture_as_json(roe, routed_run):
    """Guards text-only questions, scripts that read the answer, and the budget knob."""
    asked = ("generate", routed_run, "--prompt", "Add 3 and 4.", "--max-new-tokens", "2", "--json")
    answers = [json.loads(roe(*asked, "--keep-bias", bias)[1]) for bias in ("1000", "-1000")]
    assert [answer["skip_rate"] for answer in answers] == [0.0, pytest.approx(11 / 12)]
    assert all(answers[0]["route"])
    assert isinstance(answers[0]["answer"], str)


def test_routes_are_recorded_and_followed(roe, routed_run, tmp_path):
    """Guards replay: the same answers and routes under another bias of the model, question by question."""
    file = tmp_path / "routes.jsonl"
    asked = ("generate", routed_run, "--max-new-tokens", "3", "--json", "--prompt", "Add 3 and 4.", "--prompt", "What?")
    first = json.loads(roe(*asked, "--record-routes", file)[1])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["1", "2"]
    assert not all(first[0]["route"])
    assert json.loads(roe(*asked, "--routes", file)[1]) == first
    swapped = [json.loads(line) | {"id": name} for line, name in zip(file.read_text().splitlines(), "21", strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in swapped))
    again = json.loads(roe(*asked, "--routes", file)[1])
    assert [given["route"] for given in again] == [given["route"] for given in first[::-1]]
    assert_one_message(roe(*asked, "--prompt", "Why?", "--routes", file), "no route for request '3'")
    assert_one_message(roe(*asked, "--routes", file, "--skip-ratio", "0"), "Give one")
    base = ("generate", routed_run.parent / "base", "--prompt", "What?")
    assert_one_message(roe(*base, "--routes", file), "not routed")


def test_evaluate_records_the_routes_of_its_questions(roe, routed_run, tmp_path):
    """Guards the file beside the results: a line a question, and the rate that was reported."""
    asked = ("evaluate", routed_run, "--questions", "16", "--no-speed", "--json", tmp_path / "r.json")
    assert roe(*asked, "--record-routes", tmp_path / "routes.jsonl")[0] == 0
    routes = [json.loads(line)["route"] for line in (tmp_path / "routes.jsonl").read_text().splitlines()]
    results = json.loads((tmp_path / "r.json").read_text())
    assert len(routes) == 16
    assert "".join(routes).count("0") / len("".join(routes)) == pytest.approx(results["routed"]["skip_rate"])
    base = ("evaluate", routed_run.parent / "base", "--questions", "16", "--record-routes", tmp_path / "none")
    assert_one_message(roe(*base), "not routed")


def test_a_budget_is_traced_and_asked_for(roe, routed_run):
    """Guards the dial: refused before calibration, but for all layers; then a table, and ratios that are followed."""
    asked = ("generate", routed_run, "--prompt", "Add 3 and 4.", "--max-new-tokens", "1", "--json", "--skip-ratio")
    assert_one_message(roe(*asked, "0.2"), "skip_ratio=0.2", "roe calibrate")
    assert json.loads(roe(*asked, "0")[1])["skip_rate"] == 0
    code, out, _ = roe("calibrate", routed_run, "--questions", "16")
    assert code == 0
    assert "held out" in out
    assert "50.0" in out
    assert json.loads(roe(*asked, "0.5")[1])["skip_rate"] > 0
    assert_one_message(roe(*asked, "0.95"), "calibrated from 0 to")
    assert_one_message(roe(*asked, "0.2", "--keep-bias", "1"), "Give one")
    assert_one_message(
        roe("generate", routed_run.parent / "base", "--prompt", "What?", "--skip-ratio", "0.2"), "not routed"
    )


@pytest.mark.parametrize("verb", [("evaluate",), ("generate", "--prompt", "What?")], ids=lambda verb: verb[0])
@pytest.mark.parametrize("name", ["./nothing", "runs/nothing", "nothing"])
def test_a_missing_run_is_one_message(verb, name, roe, tmp_path, monkeypatch):
    """Guards the commonest slip."""
    monkeypatch.chdir(tmp_path)
    assert_one_message(roe(verb[0], name, *verb[1:]), name)


def test_a_missing_recipe_is_one_message(roe, tmp_path, monkeypatch):
    """Guards slips in a recipe's name or settings; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert_one_message(roe("train", "quickstrat"), "no such file", "quickstart")
    assert_one_message(roe("train", "quickstart", "--set", "training.stepps=3"), "stepps")
    assert_one_message(roe("train", "quickstart", "--set", "training.steps"), "--set")
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_read_are_one_message(roe, routed_run, tmp_path):
    """Guards a picture that is missing, and one that is none."""
    ask = ("generate", routed_run, "--prompt", "What?", "--image")
    assert_one_message(roe(*ask, tmp_path / "none.png"), "none.png")
    (tmp_path / "notes.png").write_text("not a picture")
    assert_one_message(roe(*ask, tmp_path / "notes.png"), "notes.png")


def test_a_missing_data_file_is_one_message(roe, routed_run, tmp_path):
    """Guards evaluation on one's own records."""
    assert_one_message(roe("evaluate", routed_run, "--data", tmp_path / "none.json"), "none.json")


def test_a_run_without_results_is_one_message(roe, tmp_path):
    """Guards reports of runs that were never evaluated."""
    assert_one_message(roe("report", tmp_path), str(tmp_path))


def test_wrong_usage_is_told_from_mistakes(roe):
    """Guards exit codes: 2 for what the command line itself refuses."""
    assert roe("evaluate", "x", "--questions", "0")[0] == 2
    assert roe("no-such-verb")[0] == 2


def test_an_estimate_trains_nothing(roe, tmp_path, monkeypatch):
    """Guards the table and its JSON: every stage by every way to tune, the recipe's own marked, and no folder made."""
    monkeypatch.chdir(tmp_path)
    asked = ["train", "quickstart", "--estimate", "--tokens", "32", "--set", "training.batch_size=2"]
    code, said, _ = roe(*asked)
    assert code == 0
    assert "full *" in said
    assert "instruction_tuning " in said  # in 80 columns, whole
    assert "batch 2, 32 tokens, fp32" in " ".join(said.split())
    code, said, _ = roe(*asked, "--json")
    found = json.loads(said)
    assert (code, found["method"], found["processes"]) == (0, "full", 1)
    stages = ["adapter_warmup", "router_warmup", "instruction_tuning"]
    assert [row["stage"] for row in found["bytes"]] == stages * 4
    assert all(row["total"] > row["weights"] > 0 for row in found["bytes"])
    assert not list(tmp_path.iterdir())
