"""`roe study` with runs of three steps: what it records, going on with a part, and folders of another plan."""

import json
from pathlib import Path

import pytest
import yaml

PLAN = {
    "recipe": "digits",
    "rates": [0.25],
    "seeds": [0],
    "questions": 16,
    "calibration_questions": 16,
    "set": {"training.steps": 3, "training.batch_size": 8, "training.logging_steps": 1, "data.records": 32},
    "arms": {"routed": {}, "static": {"control": "most_skipped"}, "random": {"control": "random"}},
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
    said = roe("study", plan(folder), "--output", folder / "runs", "--only", "random", "--only", "static")
    assert said[0] == 0, said
    study = json.loads(record.read_text())
    assert {run["arm"] for run in study["runs"]} == {"routed", "static", "random"}
    assert {(c["first"], c["second"]) for c in study["contrasts"]} == {("routed", "static"), ("routed", "random")}
    fixed = next(run for run in study["runs"] if run["arm"] == "static")
    assert sorted(fixed["layer_skip_rates"]) == [0.0] * 9 + [1.0] * 3
    assert roe("study", plan(folder), "--output", folder / "runs", "--minutes", "0")[0] == 0
    study = json.loads(record.read_text())
    assert len(study["runs"]) == 3
    assert set(study["untrained"]) == {"0.25"}
    layers = json.loads((folder / "runs" / "layers.json").read_text())
    assert len(set(layers["by_harm"])) == 3
    assert sorted(layers["by_importance"]) == list(range(1, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set": PLAN["set"] | {"training.steps": 6}}, "holds another run: training.steps: 3 there, 6 asked for"),
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
