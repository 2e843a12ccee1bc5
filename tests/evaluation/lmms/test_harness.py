"""`roe evaluate --tasks`: sides beside each other, the record, and what is refused before a model is loaded."""

import json
import subprocess
import sys

import pytest
from filelock import FileLock, Timeout
from PIL import ImageFile

from routing_experts.errors import EvaluationError
from routing_experts.evaluation.lmms.harness import Plan, run_tasks, sides_of
from routing_experts.evaluation.lmms.scorers import elements_found
from routing_experts.records import TaskScores
from routing_experts.reports import tasks_markdown


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gqqa", r"task 'gqqa': .* has no such task; near it are .*gqa"),
        ("zzzzzz", r"has no such task\. `lmms-eval tasks` lists all"),
        ("mmvet", r"OPENAI_API_KEY is not set: its answers would be scored 0.*take roe_mmvet"),
        ("mmbench_en_dev", "take mmbench_en_dev_static"),
        ("mmvetv2", "OPENAI_API_KEY is not set.*leave it out"),
        ("pope", r"pope: its data cannot be loaded .*`hf download (\S+/POPE) --repo-type dataset --local-dir \1`"),
        ("mmbench_en", r"mmbench_en: its data cannot be loaded .*It needs lmms-lab(-encoder)?/MMBench"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused_before_anything_is_loaded(task, message, tmp_path, monkeypatch):
    """The folder is no model at all: nobody looked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EvaluationError, match=message):
        run_tasks("nowhere", Plan((task,)), sides_of(True, ()))


def test_a_folder_of_tasks_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EvaluationError, match="none: no folder of tasks"):
        run_tasks("nowhere", Plan(("gqa",), include=(tmp_path / "none",)), sides_of(True, ()))


def test_several_processes_are_sent_to_lmms_eval(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EvaluationError, match="Start lmms-eval itself"):
        run_tasks("nowhere", Plan(("gqa",)), sides_of(True, ()))


def test_sides_stand_beside_each_other(routed_folder, digits, tmp_path):
    plan = Plan(("roe_digits",), (digits,), 24, 8, tmp_path / "log", tmp_path, {"device": "cpu"})
    record = run_tasks(str(routed_folder), plan, sides_of(True, (0.05,)))
    (score,) = record.scores
    dense, routed, at = score.sides
    assert [dense.side, routed.side, at.side] == ["dense", "routed", "routed, 5 %"]
    assert (dense.skip_rate, dense.difference) == (0, None)
    assert routed.value - dense.value == pytest.approx(routed.difference)
    assert routed.low <= routed.difference <= routed.high
    assert at.skip_rate > 0
    assert at.skip_rate != routed.skip_rate
    assert len(routed.layer_skip_rates) == record.num_layers == 12
    assert score.samples == 24
    assert dense.seconds_to_first.low <= dense.seconds_to_first.median <= dense.seconds_to_first.high
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["dense", "routed", "routed-5"]
    record.save(tmp_path / "tasks.json")
    assert TaskScores.load(tmp_path / "tasks.json") == record
    table = tasks_markdown(record)
    assert "| roe\\_digits | exact\\_match | routed, 5 % |" in table
    assert "The difference" in table or "the difference on the same samples" in table


def test_answers_of_another_batch_size_are_told_and_their_times_do_not_count(routed_folder, digits, tmp_path):
    """Guards a speed-up of 64 rows against 8, where one side ran out of memory and was asked anew."""
    plans = [Plan(("roe_digits",), (digits,), 12, size, tmp_path, tmp_path, {"device": "cpu"}) for size in (4, 6)]
    first, again = (run_tasks(str(routed_folder), plan, sides_of(True, ())) for plan in plans)
    for record, sizes in ((first, [4]), (again, [4])):
        assert [side.batch_sizes for side in record.scores[0].sides] == [sizes, sizes]
    assert first.scores[0].sides[1].seconds_to_first is not None
    assert again.scores[0].sides[1].seconds_to_first is None
    assert "kept from runs at batches of 4" in tasks_markdown(again)
    assert "kept from" not in tasks_markdown(first)


def test_what_a_scorer_raises_is_told_by_task_and_side(routed_folder, digits, tmp_path, monkeypatch):
    """The answers are there already: the same command scores them once the scorer can run."""

    def broken(*args, **kwargs):
        raise OSError("java: not found")

    monkeypatch.setattr("lmms_eval.evaluator.evaluate", broken)
    plan = Plan(("roe_digits",), (digits,), 4, 4, tmp_path / "log", tmp_path, {"device": "cpu"})
    with pytest.raises(EvaluationError, match="task roe_digits, dense: lmms-eval failed with OSError: java: not found"):
        run_tasks(str(routed_folder), plan, sides_of(True, ()))


def test_a_dense_model_has_one_side(digits, tmp_path):
    plan = Plan(("roe_digits",), (digits,), 16, 8, settings={"device": "cpu"}, output=tmp_path)
    record = run_tasks("pocket", plan, sides_of(False, ()))
    assert [side.side for side in record.scores[0].sides] == ["dense"]
    assert record.scores[0].sides[0].skip_rate == 0


@pytest.mark.parametrize("lenient", [False, True])
def test_the_process_is_left_as_it_was(lenient, digits, tmp_path, monkeypatch):
    """A lock that is held is not got a second time; what Pillow does with pictures that are cut short is as before."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    plan = Plan(("roe_digits",), (digits,), 2, 2, settings={"device": "cpu"}, output=tmp_path)
    for _ in range(2):
        run_tasks("pocket", plan, sides_of(False, ()))
        assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES
        with FileLock(tmp_path / "held"), pytest.raises(Timeout):
            FileLock(tmp_path / "held").acquire(timeout=0)


@pytest.mark.parametrize(
    ("said", "truth", "share"),
    [
        ("It is -1 or 5", "-1<AND>-5", 0.5),
        ("x = 15", "5", 0.0),
        ("The DOG, of course.", "dog<OR>cat", 1.0),
        ("2,5 metres", "2,5", 1.0),
        ("A red car and a blue bike", "red car <AND> blue bike<OR>nothing", 1.0),
        ("", "yes", 0.0),
        ("anything", "", 0.0),
    ],
)
def test_elements_are_whole_words(said, truth, share):
    assert elements_found(said, truth) == share


WORKER = """
import json, sys
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
manager = TaskManager("ERROR", include_path=[sys.argv[1]], include_defaults=False)
found = simple_evaluate(
    model="roe", model_args=f"pretrained={sys.argv[2]},log={sys.argv[3]}", tasks=["roe_digits"], task_manager=manager,
    device="cpu", batch_size=4, bootstrap_iters=0, verbosity="ERROR", limit=23,
)
if found is not None:
    value = found["results"]["roe_digits"]["exact_match,none"]
    routes = {s["doc_id"]: s["token_counts"][0]["route"] for s in found["samples"]["roe_digits"]}
    print("FOUND", json.dumps([value, [routes[i] for i in sorted(routes)]]), flush=True)
torch.distributed.destroy_process_group()  # left to the interpreter's end, its threads may abort the process
"""


@pytest.mark.distributed
def test_two_processes_share_the_samples(run, routed_folder, digits, tmp_path):
    """An odd number of samples, so that one process is given one to pad with, which must count nowhere."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    done = subprocess.run(
        [*command, str(script), str(digits), str(routed_folder), str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    value, routes = json.loads(told.removeprefix("FOUND"))
    alone = run({"pretrained": routed_folder}, "roe_digits", digits, batch_size=4, limit=23)
    samples = sorted(alone["samples"]["roe_digits"], key=lambda sample: sample["doc_id"])
    assert value == alone["results"]["roe_digits"]["exact_match,none"]
    assert routes == [sample["token_counts"][0]["route"] for sample in samples]
    logs = sorted((tmp_path / "log").glob("samples-*.jsonl"))
    assert [path.name for path in logs] == ["samples-0.jsonl", "samples-1.jsonl"]
    ids = [{json.loads(line)["id"] for line in path.read_text().splitlines()} for path in logs]
    assert len(ids[0] | ids[1]) == 23
    assert not ids[0] & ids[1]
