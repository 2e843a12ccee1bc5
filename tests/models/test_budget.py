"""The budget: a skip ratio becomes a keep bias, row by row, and each row gets what it gets alone."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import REQUESTS, TOLERANCE, look, model_of, prompts_of

from routing_experts.config import BUDGET_GAP, RoEConfig
from routing_experts.errors import ConfigError, RouteError
from routing_experts.inference.prefill import compatible, together
from routing_experts.models.options import RoutingOptions, settle
from tiny import GREEDY, NUM_LAYERS, batch_of, for_generate, prompt, route_everywhere, tiny_llama

CURVE = tuple((step / 64, 8.0 - step / 2) for step in range(33))
JUMPING = ((0.0, 4.0), (0.01, 2.0), (0.3, 1.999), (0.31, 0.0))
RISING = st.lists(st.floats(0, 1), unique=True, min_size=1, max_size=12).map(sorted)


@given(rates=RISING, ratio=st.floats(0, 1, exclude_min=True))
def test_a_ratio_s_bias_lies_between_those_of_the_rates_around_it(rates, ratio):
    """Guards interpolation: never past a neighbour, and refused just where both are further than the promise."""
    budget = tuple((rate, 20.0 - 3 * number) for number, rate in enumerate(rates))
    config = RoEConfig(budget=budget)
    around = [(0.0, math.inf), *budget]
    if ratio > rates[-1]:
        with pytest.raises(RouteError, match="calibrated from 0 to"):
            config.keep_bias_for(ratio)
        return
    less, more = next(pair for pair in pairwise(around) if pair[0][0] < ratio <= pair[1][0])
    if more[0] - less[0] > BUDGET_GAP and min(ratio - less[0], more[0] - ratio) > BUDGET_GAP:
        with pytest.raises(RouteError, match="jumps from"):
            config.keep_bias_for(ratio)
    else:
        assert more[1] <= config.keep_bias_for(ratio) <= less[1]


def test_interpolation_by_hand():
    """Guards the line between two pairs, the pairs themselves, and the dense end."""
    config = RoEConfig(budget=((0.0, 4.0), (0.01, 2.0), (0.02, 1.0)))
    assert config.keep_bias_for(0) == math.inf
    assert config.keep_bias_for(0.005) == pytest.approx(3.0)
    assert config.keep_bias_for(0.01) == 2.0
    assert config.keep_bias_for(0.0125) == pytest.approx(1.75)
    assert config.keep_bias_for(0.02) == 1.0


def test_a_ratio_within_a_jump_is_met_nearly_or_refused():
    """Guards the promise where no bias gives the rate: the nearer end if it is near enough, else no answer."""
    config = RoEConfig(budget=JUMPING)
    assert config.keep_bias_for(0.025) == 2.0
    assert config.keep_bias_for(0.285) == 1.999
    with pytest.raises(RouteError, match=r"jumps from 0\.010 to 0\.300"):
        config.keep_bias_for(0.15)


@pytest.mark.parametrize(
    ("config", "ratio", "expected"),
    [
        (RoEConfig(), 0.2, "Run `roe calibrate"),
        (RoEConfig(budget=CURVE), 0.51, r"from 0 to 0\.500"),
        (RoEConfig(budget=CURVE), -0.1, r"from 0 to 0\.500"),
        (RoEConfig(budget=CURVE), math.nan, r"from 0 to 0\.500"),
        (RoEConfig(gate="static", routed_layers=(1, 2)), 0.2, "never trained"),
        (RoEConfig(gate="random"), 0.2, "never trained"),
    ],
)
def test_ratios_that_nobody_calibrated_are_refused(config, ratio, expected):
    """Guards against a guess in place of a measured bias."""
    with pytest.raises(RouteError, match=expected):
        settle(RoutingOptions(skip_ratio=ratio), config, NUM_LAYERS)


@pytest.mark.parametrize(
    "budget",
    [((0.2, 1.0), (0.1, 0.0)), ((0.1, 1.0), (0.2, 1.0)), ((0.1, 1.0), (0.1, 0.5)), ((1.2, 0.0),), ((0.1, math.inf),)],
)
def test_budgets_that_are_no_curve_are_refused(budget):
    """Guards hand-written pairs: interpolating them would give any rate."""
    with pytest.raises(ConfigError, match="roe calibrate"):
        RoEConfig(budget=budget)


def test_one_way_of_choosing_layers_at_a_time():
    """Guards against options of which one would be ignored."""
    route = torch.ones(NUM_LAYERS, dtype=torch.bool)
    for options in ({"route": route, "keep_bias": 1.0}, {"keep_bias": 0.0, "skip_ratio": 0}):
        with pytest.raises(RouteError, match="Give one"):
            RoutingOptions(**options)


def test_a_control_gate_takes_what_needs_no_router():
    """Guards controls: all layers, or their own route, become routes that share a call; a finite bias is refused."""
    config = RoEConfig(gate="static", routed_layers=(1, 3))
    routes = {"dense": {"skip_ratio": 0}, "own": {}, "skipping": {"keep_bias": -math.inf}}
    settled = {name: settle(RoutingOptions(**asked), config, NUM_LAYERS) for name, asked in routes.items()}
    assert {name: options.route.int().tolist() for name, options in settled.items()} == {
        "dense": [1] * NUM_LAYERS,
        "own": [1, 0, 1, 0, 1],
        "skipping": [1, 0, 1, 0, 1],
    }
    assert compatible(settled["dense"], settled["own"])
    with pytest.raises(RouteError, match=r"keep_bias=1\.0 on a model with gate 'static'"):
        settle(RoutingOptions(keep_bias=1.0), config, NUM_LAYERS)


ASKED = st.one_of(
    st.just({}),
    st.floats(-12, 12).map(lambda bias: {"keep_bias": bias}),
    st.sampled_from([math.inf, -math.inf]).map(lambda bias: {"keep_bias": bias}),
    st.floats(0, 0.5).map(lambda ratio: {"skip_ratio": ratio}),
)


@pytest.mark.parametrize("layout", ["two_call", "fused"])
@pytest.mark.parametrize("kind", ["llava", "llama"])
@settings(max_examples=15, derandomize=True, database=None)
@given(drawn=REQUESTS, asked=st.lists(ASKED, min_size=5, max_size=5))
def test_rows_of_different_budgets_are_as_alone(kind, layout, drawn, asked):
    """Guards one prefill of many budgets, all layers and none among them: routes equal, logits to 1e-10."""
    model, prompts = model_of(kind), prompts_of(kind, drawn)
    config = replace(model.roe_config, budget=CURVE)
    options = [RoutingOptions(**one, layout=layout) for one in asked[: len(prompts)]]
    settled = [settle(one, config, NUM_LAYERS) for one in options]
    assert all(compatible(settled[0], other) for other in settled)
    logits, route = look(model, prompts, "left", together(settled))
    for row, one in enumerate(prompts):
        (alone,), alone_route = look(model, [one], "left", settled[row])
        assert torch.equal(route[row], alone_route[0])
        assert (logits[row] - alone).abs().max() <= TOLERANCE


def test_biases_of_rows_move_their_own_routes_alone():
    """Guards the guard above: the same prompt under three biases skips differently within one batch."""
    model = model_of("llama")
    biases = torch.tensor([-12.0, 0.0, 12.0])
    _, route = look(model, [prompt(5, images=0)] * 3, "left", RoutingOptions(keep_bias=biases))
    kept = route.sum(1).tolist()
    assert kept[0] < kept[1] < kept[2]


def test_biases_repeat_for_beams():
    """Guards generate with beams: a request's bias follows it into each of its rows."""
    model = route_everywhere(tiny_llama(dtype=torch.float64), seed=1)
    prompts = [prompt(seed, images=0) for seed in range(2)]
    beams = GREEDY | {"num_beams": 2, "num_return_sequences": 2}
    biases = torch.tensor([-12.0, math.inf])
    both = model.generate(**for_generate(batch_of(prompts)), **beams, routing_options=RoutingOptions(keep_bias=biases))
    for row, one in enumerate(prompts):
        options = RoutingOptions(keep_bias=biases[row].item())
        alone = model.generate(**for_generate(batch_of([one])), **beams, routing_options=options)
        assert torch.equal(both[2 * row : 2 * row + 2], alone)


def test_a_bias_means_the_same_in_half_the_precision():
    """Guards bf16: a row's bias is not rounded to the logits' precision, whether it comes alone or with others."""
    model = route_everywhere(tiny_llama(dtype=torch.bfloat16), seed=1)
    prompts = [prompt(seed, images=0) for seed in range(8)]
    for bias in (0.1, 1.7, -3.3):
        _, alone = look(model, prompts, "left", RoutingOptions(keep_bias=bias))
        _, rows = look(model, prompts, "left", RoutingOptions(keep_bias=torch.full((8,), bias, dtype=torch.float64)))
        assert torch.equal(alone, rows)
