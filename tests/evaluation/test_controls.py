"""The controls spend the routed model's skip rate on fixed layers or at random, and on nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing_experts.evaluation.controls import most_skipped, random_routes, static_routes

LAYERS = 12
ROUTED = tuple(range(1, LAYERS))
rates = st.floats(0, len(ROUTED) / LAYERS)
counts = st.integers(1, 60)
seeds = st.integers(0, 5)


@given(rate=rates, questions=counts, seed=seeds)
def test_both_controls_skip_as_much_as_asked(rate, questions, seed):
    """Guards a fair comparison: the same rate to within one layer of one question, and only routed layers."""
    for routes in (
        static_routes(ROUTED, rate, questions, LAYERS, seed),
        random_routes(ROUTED, rate, questions, LAYERS, seed),
    ):
        assert routes.shape == (questions, LAYERS)
        assert routes.dtype == torch.bool
        assert routes[:, 0].all()
        assert abs(int((~routes).sum()) - rate * LAYERS * questions) <= 0.5 + 1e-6


@given(rate=rates, questions=counts, seed=seeds)
def test_static_routes_are_equal_up_to_one_layer(rate, questions, seed):
    """Guards what static means: everyone skips the same layers, some one more to meet the rate."""
    order = most_skipped([0.0, *(layer / LAYERS for layer in ROUTED)], ROUTED)
    routes = static_routes(order, rate, questions, LAYERS, seed)
    skipped = (~routes).sum(1)
    assert int(skipped.max() - skipped.min()) <= 1
    for row, count in zip(routes, skipped.tolist(), strict=True):
        assert set((~row).nonzero()[:, 0].tolist()) == set(order[:count])


@given(rate=rates, questions=counts, seed=seeds)
def test_random_routes_differ_in_layers_not_in_number(rate, questions, seed):
    """Guards the random control: as many layers a question as the static one's, whichever they are."""
    drawn, fixed = (make(ROUTED, rate, questions, LAYERS, seed) for make in (random_routes, static_routes))
    assert torch.equal((~drawn).sum(1), (~fixed).sum(1))


def test_random_routes_use_every_layer_evenly():
    """Guards against a draw that prefers some layers."""
    routes = random_routes(ROUTED, 0.25, 4000, LAYERS, seed=0)
    share = (~routes).float().mean(0)
    assert share[0] == 0
    assert share[1:].tolist() == pytest.approx([3 / 11] * 11, abs=0.03)
    assert len({tuple(row) for row in routes.tolist()}) > 100


def test_controls_are_functions_of_their_seed():
    """Guards repetition: the same seed gives the same routes, another seed others."""
    one, again, other = (random_routes(ROUTED, 0.3, 40, LAYERS, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_most_skipped_come_first():
    """Guards the order of the static control: by rate, then by index, and routed layers only."""
    assert most_skipped([0.9, 0.2, 0.5, 0.5, 0.0], (1, 2, 3, 4)) == [2, 3, 1, 4]


def test_a_rate_beyond_the_routed_layers_skips_them_all():
    """Guards the end of the scale: layers that are not routed stay."""
    routes = static_routes((2, 1), 0.9, 5, 4, seed=0)
    assert routes.tolist() == [[True, False, False, True]] * 5
