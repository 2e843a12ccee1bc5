"""The router: one linear map from two routing tokens to a keep and a skip logit (Wu et al., ICLR 2025).

z_q = W_r · [h(r_img); h(r_q)], W_r [2, 2D], no bias. Index 0 of the last axis is keep, index 1 skip.

Shapes: B examples, R = Q + 1 routing tokens (image first), Q turns, D hidden.
"""

import torch
from torch import Tensor, nn

KEEP, SKIP = 0, 1


def make_router(hidden_size: int) -> nn.Linear:
    """W_r, initialised as PyTorch initialises a linear map."""
    return nn.Linear(2 * hidden_size, 2, bias=False)


def router_logits(normed_BRD: Tensor, router: nn.Linear) -> Tensor:
    """Logits [B, Q, 2] of every turn, from the routing tokens' normalised states."""
    image_BQD = normed_BRD[:, :1].expand(-1, normed_BRD.shape[1] - 1, -1)
    return router(torch.cat([image_BQD, normed_BRD[:, 1:]], dim=-1))


def with_context(logits_BQ2: Tensor, valid_BQ: Tensor) -> Tensor:
    """Puts the context's logits in front: the mean over the example's valid turns. Returns [B, R, 2]."""
    valid = valid_BQ[..., None].to(logits_BQ2.dtype)
    mean_B12 = (logits_BQ2 * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    return torch.cat([mean_B12, logits_BQ2], dim=1)


def keeps(logits_BQ2: Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """The hard decision [B, Q]: keep iff z_keep + bias > z_skip; a tie skips, as in the authors' code.

    A tensor of biases broadcasts against the decisions.
    """
    return logits_BQ2[..., KEEP] + bias > logits_BQ2[..., SKIP]
