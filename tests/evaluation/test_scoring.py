"""Exact match by task, skip rates by layer, and answers that follow the routes they are given."""

import pytest
import torch

from routing_experts import api
from routing_experts.config import RoEConfig
from routing_experts.data.records import Record, Turn
from routing_experts.errors import ConfigError
from routing_experts.evaluation.controls import random_routes
from routing_experts.evaluation.evaluate import ask, compare, sweep_bias, task_results
from routing_experts.evaluation.questions import Question, digits_questions
from routing_experts.evaluation.scoring import Evaluation, is_right
from routing_experts.inference.generate import Answer
from routing_experts.models.load import load_base, load_processor


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("yes", "yes", True),
        (" Yes\n", "yes", True),
        ("3 1 4", "3 1 4", True),
        ("yes.", "yes", False),
        ("yes and no", "yes", False),
        ("", "yes", False),
        ("STRASSE", "straße", True),
    ],
)
def test_an_answer_is_right_if_it_is_the_answer(said, expected, right):
    """Guards exact match: case and outer space aside, nothing is forgiven."""
    assert is_right(said, expected) is right


def question(task: str, answer: str) -> Question:
    return Question(Record(task, (Turn("?", ""),)), answer, task)


def test_scores_are_shares_by_task_and_layer():
    """Guards the arithmetic on four answers."""
    questions = [question("sum", "3"), question("sum", "4"), question("exists", "yes"), question("exists", "no")]
    routes = [(True, False), (True, True), (False, False), (True, False)]
    said = ["3", "5", "yes", "NO"]
    asked = Evaluation(questions, [Answer("x", text, route) for text, route in zip(said, routes, strict=True)])
    assert asked.right == [True, False, True, True]
    assert (asked.accuracy, asked.skip_rate, asked.layer_skip_rates) == (0.75, 0.5, [0.25, 0.75])
    parts = asked.by_task()
    assert list(parts) == ["exists", "sum"]
    assert [part.accuracy for part in parts.values()] == [1.0, 0.5]
    results = task_results(asked, asked)
    assert (results["exists"].skip_rate, results["sum"].skip_rate) == (0.75, 0.25)
    assert results["sum"].questions == 2


def test_answers_and_questions_must_pair():
    """Guards against a lost answer that would shift all others."""
    with pytest.raises(ValueError):
        Evaluation([question("sum", "3")], []).right  # noqa: B018


def test_no_questions_are_refused():
    """Guards a division by zero, and an accuracy of nothing."""
    with pytest.raises(ConfigError, match="0 questions"):
        digits_questions(0, seed=0)


@pytest.fixture(scope="module")
def routed():
    """The pocket model with random weights and routers that tell questions apart, and its processor."""
    torch.manual_seed(0)
    processor = load_processor("pocket")
    model = api.convert(load_base("pocket", random_init=True), RoEConfig(routing_token_std=1.0), processor)
    for name, parameter in model.named_parameters():
        if "router." in name:
            torch.nn.init.normal_(parameter, std=2.0)
        elif parameter.dim() > 1:
            parameter.data *= 5  # of the usual 0.02, what the text says would hardly reach a router
    return model.eval(), processor


@pytest.mark.parametrize("batch_size", [4, 10, 64])
def test_given_routes_are_followed_row_by_row(routed, batch_size):
    """Guards controls over several batches: every question takes the route that was meant for it."""
    routes = random_routes(range(1, 12), 0.3, 10, 12, seed=3)
    asked = ask(*routed, digits_questions(10, 0), batch_size=batch_size, routes=routes, max_new_tokens=1)
    assert [list(answer.route) for answer in asked.answers] == routes.tolist()


def test_own_routes_do_not_leak_into_the_next_batch(routed):
    """Guards batches without given routes: each question decides for itself, whoever came before."""
    questions = digits_questions(12, 0)
    single, batched = (ask(*routed, questions, batch_size=size, max_new_tokens=1) for size in (1, 5))
    assert [answer.route for answer in single.answers] == [answer.route for answer in batched.answers]
    assert len({answer.route for answer in single.answers}) > 1


def test_the_comparison_spends_one_skip_rate(routed):
    """Guards the three columns of a report: the controls skip what the routers do, and say which layers."""
    questions = digits_questions(16, 0)
    told: list[int] = []
    found = compare(*routed, questions, seed=0, advance=told.append)
    for control in (found.static, found.random):
        assert control.skip_rate == pytest.approx(found.routed.skip_rate, abs=1 / (16 * 12))
    skipped = {frozenset(i for i, keep in enumerate(answer.route) if not keep) for answer in found.static.answers}
    assert max(skipped, key=len) == set(found.static_layers)
    assert max(map(len, skipped)) - min(map(len, skipped)) <= 1
    assert 0 not in found.static_layers
    assert sum(told) == 3 * 16


def test_a_keep_bias_moves_the_skip_rate(routed):
    """Guards the sweep's two ends: nothing skipped, all that can be skipped, and no more skipped with more bias."""
    biases = (-1e4, -1.0, 0.0, 1.0, 1e4)
    points = sweep_bias(*routed, digits_questions(4, 0), biases)
    assert [point.keep_bias for point in points] == list(biases)
    assert points[0].skip_rate == pytest.approx(11 / 12)
    assert points[-1].skip_rate == 0
