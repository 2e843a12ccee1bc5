"""`roe evaluate --tasks` and `roe data`: from the command line to the record in the run's folder."""

import json

import pytest

from routing_experts.records import TaskScores

pytest.importorskip("lmms_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    _resolve_hf_datasets_cache_dir.cache_clear()


def test_the_digits_become_a_task_and_the_task_a_record(roe, routed_run, tasks):
    code, said, complaint = roe("data", "export", "digits", tasks, "--layout", "lmms-eval", "--records", "24", "--json")
    assert code == 0, complaint
    assert json.loads(said) == {"folder": str(tasks), "task": "roe_digits", "questions": 24, "seed": 1000}
    arguments = ("--tasks", "roe_digits", "--include", tasks, "--batch-size", "8", "--device", "cpu")
    code, said, complaint = roe("--quiet", "evaluate", routed_run, *arguments)
    assert code == 0, complaint
    assert "Tasks" in said
    assert "Times" in said
    assert not complaint.strip()
    record = TaskScores.load(routed_run / "tasks.json")
    assert [side.side for side in record.scores[0].sides] == ["dense", "routed"]
    assert (routed_run / "samples" / "routed" / "samples-0.jsonl").is_file()
    code, said, complaint = roe("evaluate", routed_run, *arguments, "--json", "-", "--limit", "8")
    assert code == 0, complaint
    assert json.loads(said)["scores"][0]["samples"] == 8


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tasks", "gqa", "--data", "mine.json"], 2, "--data with --tasks"),
        (["--tasks", "gqa", "--no-speed"], 2, "--no-speed with --tasks"),
        (["--limit", "3"], 2, "--limit with no --tasks"),
        (["--tasks", " , "], 1, "name at least one"),
        (["--tasks", "gqaa"], 1, "near it are"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, code, message, roe, routed_run):
    found, _, complaint = roe("evaluate", routed_run, *arguments)
    assert found == code
    assert message in " ".join(complaint.replace("│", " ").split())


def test_a_skip_ratio_needs_routes(roe):
    code, _, complaint = roe("evaluate", "pocket", "--tasks", "gqa", "--skip-ratio", "0.2")
    assert code == 1
    assert "is not routed" in complaint
