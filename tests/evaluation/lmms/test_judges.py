"""Benchmarks whose scorers ask a judge are found by what their code names, not by a list alone."""

import functools

import pytest

from routing_experts.errors import EvaluationError
from routing_experts.evaluation.lmms.judges import asks_a_judge, refuse_unjudged


def get_chat_response(prompt):
    return prompt


class Grader:
    def grade(self, answer):
        return get_chat_response(answer)


GRADER = Grader()


def plain(doc, results):
    return {"acc": float(results[0] == doc["answer"])}


def directly(doc, results):
    return {"acc": get_chat_response(results[0])}


def through_an_object(doc, results):
    return {"acc": GRADER.grade(results[0])}


def through_another(doc, results):
    return directly(doc, results)


def within(doc, results):
    return [get_chat_response(one) for one in results]


@pytest.mark.parametrize("scorer", [directly, through_an_object, through_another, within])
def test_a_scorer_that_reaches_a_judge_is_found(scorer):
    assert asks_a_judge([plain, functools.partial(scorer, None)])


def test_others_are_not():
    assert not asks_a_judge([plain, len, None])


def test_a_judged_task_is_refused_without_a_key(monkeypatch):
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    refuse_unjudged("mine", [plain])
    refuse_unjudged("mmbench_en_dev_static", [directly])  # shares its code with one that asks
    with pytest.raises(EvaluationError, match=r"'mine' is graded by a judge .*leave it out"):
        refuse_unjudged("mine", [directly])
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    refuse_unjudged("mine", [directly])


@pytest.mark.parametrize(
    ("task", "is_judged"), [("gqa", False), ("pope", False), ("mme", False), ("seedbench", False), ("mmvet", True)]
)
def test_lmms_eval_s_own_tasks(task, is_judged):
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(TaskManager("ERROR").task_index[task]["yaml_path"], mode="full")
    scorers = [config.get("process_results"), *(one.get("aggregation") for one in config["metric_list"])]
    assert asks_a_judge(filter(callable, scorers)) == is_judged
