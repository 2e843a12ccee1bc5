"""The skip path's adapter."""

import pytest
import torch

from routing_experts.nn.adapter import make_adapter, skip_path


def test_zero_initialisation_is_an_identity():
    """Guards a fresh skip: it removes the layer and adds nothing."""
    down, up = make_adapter(6, 3, "zero")
    hidden = torch.randn(2, 4, 6)
    assert torch.equal(skip_path(hidden, torch.randn(2, 4, 6), down, up), hidden)
    assert bool(down.weight.any())


def test_zero_initialisation_can_learn():
    """Guards against a dead start: W_up gets a gradient although it is zero."""
    down, up = make_adapter(6, 3, "zero")
    skip_path(torch.randn(5, 6), torch.randn(5, 6), down, up).square().sum().backward()
    assert bool(up.weight.grad.any())


def test_skip_path_by_hand():
    """Guards x + W_up · ReLU(W_down · h): ReLU between, the residual from x, the branch from h."""
    down, up = make_adapter(2, 2, "xavier")
    down.weight.data = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    up.weight.data = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    got = skip_path(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0]]), down, up)
    assert got.tolist() == [[12.0, 21.0]]


@pytest.mark.parametrize("init", ["zero", "xavier"])
def test_shapes_and_no_biases(init):
    """Guards what checkpoints hold: W_down [K, D] and W_up [D, K] alone."""
    down, up = make_adapter(6, 3, init)
    assert (down.weight.shape, up.weight.shape) == ((3, 6), (6, 3))
    assert down.bias is None
    assert up.bias is None


def test_xavier_bounds():
    """Guards the paper's initialisation: uniform within √(6 / (D + K)), for both."""
    bound = (6 / (64 + 16)) ** 0.5
    for projection in make_adapter(64, 16, "xavier"):
        assert 0.9 * bound < projection.weight.abs().max() <= bound
