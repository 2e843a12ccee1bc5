"""What of a batch the model takes, and what its routers decided.

Shapes: B examples, Q turns, L routed layers.
"""

import torch
from torch import Tensor

from routing_experts.models.context import RoutingContext

OURS = ("labels", "segment_ids", "example_keys")


def model_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the model itself takes."""
    return {name: value for name, value in inputs.items() if name not in OURS}


def skip_weights(context: RoutingContext) -> Tensor:
    """Every routed layer's skip weights of every turn [L, B, Q]; the context's row is left out."""
    return torch.stack([context.weights[layer][:, 1:, 1] for layer in sorted(context.weights)])


def rates_by_layer(skip_LBQ: Tensor, valid_BQ: Tensor) -> Tensor:
    """Each routed layer's skip weight [L]: the mean over examples of the mean over their turns, as in the loss."""
    valid = valid_BQ.to(skip_LBQ.dtype)
    return ((skip_LBQ * valid).sum(2) / valid.sum(1).clamp_min(1)).mean(1)
