import json
from dataclasses import replace
from pathlib import Path

import pytest

from routing_experts.errors import ReportError
from routing_experts.records import LogLine, Results, TrainingLog, environment, read_log, seconds_left

RESULTS = {
    "base": {"accuracy": 0.9},
    "tuned": None,
    "dense": {"accuracy": 0.9, "source": "base"},
    "routed": {"accuracy": 0.89, "skip_rate": 0.25, "layer_skip_rates": [0.0, 0.5]},
    "static": {"accuracy": 0.8, "skip_rate": 0.5, "skipped_layers": [1]},
    "random": {"accuracy": 0.6, "skip_rate": 0.25},
    "speed": {
        "dense_seconds": 0.2,
        "routed_seconds": 0.1,
        "cases": [
            {
                "name": "generate",
                "phase": "generate",
                "batch": 1,
                "model": "this",
                "skip_rate": 0.25,
                "mixed": False,
                "dense_seconds": [0.2, 0.3, 0.1],
                "routed_seconds": [0.1],
            }
        ],
        "note": "",
    },
    "tasks": {"sum": {"questions": 5, "dense": 0.9, "routed": 1, "skip_rate": 0.25, "layer_skip_rates": [0.0, 0.5]}},
    "sweep": [{"keep_bias": -1.0, "accuracy": 0.7, "skip_rate": 0.5}],
    "questions": 100,
    "seed": 0,
    "environment": {"python": "3.12"},
    "seconds_total": 12.5,
    "recipe": "digits",
    "num_layers": 2,
    "notes": {"kept": ["as", "it", "was"]},
}


def log_line(step: int, **changes: object) -> LogLine:
    line = LogLine(step, step / 100, "adapter_warmup", 1.0, 0.9, 0.3, 0.3, 10.0, 0.2, 1e-4, None, 1.5)
    return replace(line, **changes)


def changed(path: str, value: object) -> dict:
    """A copy of RESULTS with one field set by dotted path, or left out if the value is ``...``."""
    values = json.loads(json.dumps(RESULTS))
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


def test_results_survive_saving_with_keys_that_this_version_does_not_know(tmp_path: Path):
    path = tmp_path / "results.json"
    results = Results.from_dict(RESULTS)
    results.save(path)
    assert Results.load(path) == results
    written = json.loads(path.read_text())
    assert {name: written[name] for name in RESULTS} | {"tasks": RESULTS["tasks"]} == RESULTS
    assert all(RESULTS["tasks"][name].items() <= task.items() for name, task in written["tasks"].items())
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("routed.accuracy", ..., "routed.accuracy missing"),
        ("tuned", ..., "tuned missing"),
        ("speed.cases.0.batch", 0, r"speed\.cases\[0\]\.batch is 0: expected a count"),
        ("speed.cases.0.phase", "warm", r"speed\.cases\[0\]\.phase is 'warm': expected one of 'prefill'"),
        ("speed.cases.0.routed_seconds", [], r"speed\.cases\[0\] is .*expected a timing or more"),
        ("tasks.sum.dense", 1.2, r"tasks\.sum\.dense is 1\.2: expected a share"),
        ("tasks.sum.layer_skip_rates", [0.1], r"tasks\.sum\.layer_skip_rates .*num_layers=2"),
        ("routed.layer_skip_rates", [0.1, True], r"routed\.layer_skip_rates\[1\] is True: expected a number"),
        ("static.skipped_layers", [2], r"static\.skipped_layers is \[2\]: expected layers below 2"),
        ("dense.source", "tuned", r"dense\.source is 'tuned'.*tuned is null"),
        ("base", 0.9, "base is 0.9: expected an object"),
        ("seed", "x" * 500, "seed is 'xxx"),
        ("recipe", None, "recipe is None: expected a text"),
        ("seconds_total", float("nan"), "seconds_total is nan: expected a finite"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(tmp_path: Path, field: str, value: object, named: str):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed(field, value)))
    with pytest.raises(ReportError, match=named) as caught:
        Results.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"])
def test_unreadable_results_are_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ReportError, match=r"results\.json"):
        Results.load(path)


def test_saving_what_could_not_be_read_back_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "results.json"
    results = Results.from_dict(RESULTS)
    results.save(path)
    for wrong in (replace(results, questions=0), replace(results, extra={"odd": {1, 2}})):
        with pytest.raises(ReportError, match="was not written"):
            wrong.save(path)
    assert Results.load(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_log_lines_are_readable_as_soon_as_they_are_written(tmp_path: Path):
    with TrainingLog(tmp_path / "log.jsonl") as log:
        log.append(log_line(10))
        assert read_log(tmp_path / "log.jsonl") == [log_line(10)]
        log.append(log_line(20, loss=float("nan"), skip_rate=None))
        assert read_log(tmp_path / "log.jsonl")[1] == log_line(20, loss=None, skip_rate=None)


def test_a_resumed_log_reads_like_an_uninterrupted_one(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with TrainingLog(path) as log:
        for step in (10, 20, 30, 40):
            log.append(log_line(step, loss=1.0))
    with TrainingLog(path):
        pass  # a resume that dies before its first line loses nothing
    assert [line.step for line in read_log(path)] == [10, 20, 30, 40]
    with TrainingLog(path) as log:
        log.append(log_line(30, loss=2.0))
        log.append(log_line(40, loss=2.0))
    assert [(line.step, line.loss) for line in read_log(path)] == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]


def test_a_torn_last_line_is_left_out_and_does_not_stay_behind(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with TrainingLog(path) as log:
        log.append(log_line(10))
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole[: len(whole) // 2], encoding="utf-8")
    assert read_log(path) == [log_line(10)]
    with TrainingLog(path) as log:
        log.append(log_line(20))
    assert [line.step for line in read_log(path)] == [10, 20]


def test_a_log_from_before_tokens_were_counted_is_read(tmp_path: Path):
    """Guards runs that an older version logged, and one that it began and this one goes on with."""
    path = tmp_path / "log.jsonl"
    older = {name: value for name, value in log_line(10).to_dict().items() if name != "tokens_per_second"}
    path.write_text(json.dumps(older) + "\n", encoding="utf-8")
    assert read_log(path) == [log_line(10, tokens_per_second=None)]
    with TrainingLog(path) as log:
        log.append(log_line(20, tokens_per_second=1234.5))
    assert [line.tokens_per_second for line in read_log(path)] == [None, 1234.5]


def test_the_time_left_follows_the_marks_alone():
    """Guards runs that go on at step 500: their first 500 steps took none of these seconds."""
    assert seconds_left([(500, 40.0), (510, 60.0)], 1000) == pytest.approx(490 * 2.0)
    assert seconds_left([(990, 0.0), (1000, 5.0)], 1000) == 0
    assert seconds_left([], 1000) is None
    assert seconds_left([(500, 40.0)], 1000) is None


def test_a_broken_line_within_the_log_is_named_by_number(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    with TrainingLog(path) as log:
        log.append(log_line(10))
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"step": 2\n' + whole, encoding="utf-8")
    with pytest.raises(ReportError, match=r"log\.jsonl, line 2 is not JSON"):
        read_log(path)
    path.write_text(whole + '{"step": 20}\n', encoding="utf-8")
    with pytest.raises(ReportError, match=r"log\.jsonl, line 2: progress, stage, .* missing"):
        read_log(path)


def test_an_empty_log_has_no_lines_and_a_missing_one_is_named(tmp_path: Path):
    (tmp_path / "log.jsonl").touch()
    assert read_log(tmp_path / "log.jsonl") == []
    with pytest.raises(ReportError, match=r"other\.jsonl"):
        read_log(tmp_path / "other.jsonl")


def test_environment_is_plain_and_complete():
    facts = environment()
    assert {
        "date",
        "python",
        "platform",
        "cpu",
        "cpu_count",
        "routing-experts",
        "torch",
        "transformers",
        "commit",
    } <= set(facts)
    assert facts["cpu"]
    assert json.loads(json.dumps(facts)) == facts
