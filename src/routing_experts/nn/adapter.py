"""The skip path: a bottleneck adapter that stands in for a whole decoder layer (Wu et al., ICLR 2025).

A(h) = W_up · ReLU(W_down · h), and x' = x + A(h), where h is the layer's normalised input.
"""

import torch
from torch import Tensor, nn


def make_adapter(hidden_size: int, bottleneck_size: int, init: str) -> tuple[nn.Linear, nn.Linear]:
    """The two projections, without biases.

    Args:
        hidden_size: D.
        bottleneck_size: K.
        init: "zero" for W_up = 0, so that a fresh skip is an identity; "xavier" for both, as in the paper.

    Returns:
        W_down [K, D] and W_up [D, K].
    """
    down = nn.Linear(hidden_size, bottleneck_size, bias=False)
    up = nn.Linear(bottleneck_size, hidden_size, bias=False)
    nn.init.xavier_uniform_(down.weight)
    if init == "zero":
        nn.init.zeros_(up.weight)
    else:
        assert init == "xavier"
        nn.init.xavier_uniform_(up.weight)
    return down, up


def skip_path(hidden: Tensor, normed: Tensor, skip_down: nn.Linear, skip_up: nn.Linear) -> Tensor:
    """x + A(h) for tensors [..., D]."""
    return hidden + skip_up(torch.relu(skip_down(normed)))
