"""Requests of different budgets through the engine: they share prefills, and each gets what it gets alone."""

import math
from dataclasses import replace

import pytest
import torch

from routing_experts.data.encode import Encoded
from routing_experts.errors import RouteError
from routing_experts.inference.engine import Engine
from routing_experts.inference.prefill import Prefiller
from routing_experts.inference.requests import Request, Sampling
from routing_experts.models.options import RoutingOptions
from tiny import NUM_LAYERS, prompt, route_everywhere, tiny_llama

CURVE = tuple((step / 64, 8.0 - step / 2) for step in range(33))
ASKED = [
    None,
    {"skip_ratio": 0},
    {"skip_ratio": 0.3},
    {"keep_bias": -12.0},
    {"keep_bias": math.inf},
    {"skip_ratio": 0.1},
]


def request(seed, asked, new_tokens=6):
    ids = torch.tensor(prompt(seed, images=0, words=2 + seed % 5).ids)
    encoded = Encoded(str(seed), ids, torch.full_like(ids, -100), torch.ones_like(ids))
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    return Request(encoded, sampling=sampling, routing=asked and RoutingOptions(**asked), id=str(seed))


@pytest.fixture(scope="module")
def model():
    model = route_everywhere(tiny_llama(dtype=torch.float64), seed=1)
    model.roe_config = replace(model.roe_config, budget=CURVE)
    return model


def test_budgets_share_a_prefill_and_answers_are_as_alone(model):
    """Guards the dial in the engine: one prefill for six budgets; tokens and routes are those of each one alone."""
    requests = [request(seed, asked) for seed, asked in enumerate(ASKED)]
    engine = Engine(model)
    answers = engine.generate(requests)
    assert engine.statistics.prefills == 1
    assert len({answer.route for answer in answers}) > 2
    for one, answer in zip(requests, answers, strict=True):
        (alone,) = Engine(model).generate([one])
        assert (alone.token_ids, alone.route, alone.error) == (answer.token_ids, answer.route, None)


def test_forced_routes_take_a_prefill_of_their_own(model):
    """Guards mixtures of forced and decided requests: no call holds both, and nobody's route is another's."""
    route = torch.tensor([True, False, True, False, True])
    asked = [
        {"skip_ratio": 0.3},
        {"keep_bias": 0.5},
        {"route": route},
        {"route": torch.ones(5).bool()},
        {"skip_ratio": 0},
    ]
    requests = [request(seed, one) for seed, one in enumerate(asked)]
    engine = Engine(model)
    answers = engine.generate(requests)
    assert engine.statistics.prefills == 3
    assert answers[2].route == tuple(route.tolist())
    for one, answer in zip(requests, answers, strict=True):
        (alone,) = Engine(model).generate([one])
        assert (alone.token_ids, alone.route) == (answer.token_ids, answer.route)


def test_a_group_of_dense_requests_carries_no_routing_tokens(model):
    """Guards the dense end: such a group's logits are bitwise the base's, which routing tokens would not leave them."""
    prefiller = Prefiller(model, None)
    prompts = [prefiller.prompt(request(seed, asked)) for seed, asked in enumerate([{"skip_ratio": 0}] * 3)]
    logits, _ = prefiller.run(prompts)
    expected, _ = Prefiller(tiny_llama(dtype=torch.float64), None).run(
        [replace(one, routing=RoutingOptions()) for one in prompts]
    )
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "asked", [{"skip_ratio": 0.9}, {"keep_bias": torch.zeros(2)}, {"keep_bias": math.nan}], ids=str
)
def test_a_budget_that_cannot_be_had_fails_alone(model, asked):
    """Guards the others of the batch against one request's mistake."""
    wrong, right = Engine(model).generate([request(0, asked), request(1, {"skip_ratio": 0.2})])
    assert wrong.error
    assert right.error is None
    assert len(right.route) == NUM_LAYERS


def test_a_dense_model_refuses_a_budget():
    """Guards against options that would be ignored."""
    with pytest.raises(RouteError, match="not routed"):
        Prefiller(tiny_llama(), None).prompt(request(0, {"skip_ratio": 0.2}))
