"""The training objective: per-example cross-entropy, the sparsity loss (Wu et al., ICLR 2025), and distillation (ours).

Shapes: B examples, T tokens, V vocabulary, L routed layers, Q turns.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

PRESSURE_WIDTH = 0.05  # of the skip rate: the band below the target in which the pressure falls from 1 to 0
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


def cross_entropy_per_example(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The mean cross-entropy over each example's answer tokens [B]; an example without any gets 0, not NaN.

    Args:
        logits_BTV: at n, the prediction of token n + 1.
        labels_BT: token ids, -100 where no loss falls.
    """
    scored_BT = labels_BT[:, 1:] != IGNORED
    losses = cross_entropy(_scored(logits_BTV, scored_BT), labels_BT[:, 1:][scored_BT], reduction="none")
    return _mean_by_example(losses, scored_BT)


def distillation_per_example(logits_BTV: Tensor, dense_logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The mean over each example's answer tokens of KL(dense ‖ routed) [B]; an example without any gets 0.

    Args:
        logits_BTV: of the routed model.
        dense_logits_BTV: of the same model with all layers kept; no gradient goes there.
        labels_BT: token ids, -100 where no loss falls.
    """
    scored_BT = labels_BT[:, 1:] != IGNORED
    routed, dense = (_scored(logits, scored_BT).log_softmax(-1) for logits in (logits_BTV, dense_logits_BTV.detach()))
    return _mean_by_example(kl_div(routed, dense, reduction="none", log_target=True).sum(-1), scored_BT)


def _scored(logits_BTV: Tensor, scored_BT: Tensor) -> Tensor:
    """The predictions of scored tokens, in 32 bits or more."""
    logits = logits_BTV[:, :-1][scored_BT]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _mean_by_example(losses: Tensor, scored_BT: Tensor) -> Tensor:
    """Scored tokens' losses, averaged by example."""
    row_of = scored_BT.nonzero()[:, 0]
    total_B = torch.zeros(len(scored_BT), device=losses.device, dtype=losses.dtype).index_add(0, row_of, losses)
    return total_B / scored_BT.sum(1).clamp_min(1)


def skip_rate_per_example(skip_weights_LBQ: Tensor, valid_BQ: Tensor) -> Tensor:
    """s_i [B]: the mean of the skip weights over an example's valid turns and all routed layers."""
    valid = valid_BQ.to(skip_weights_LBQ.dtype)
    per_layer_LB = (skip_weights_LBQ * valid).sum(-1) / valid.sum(-1).clamp_min(1)
    return per_layer_LB.mean(0)


def roe_loss(
    cross_entropy_B: Tensor,
    skip_rate_B: Tensor,
    target_skip_ratio: float,
    coef: float = 1.0,
    sharpness: float = 5.0,
    pressure: float | None = None,
) -> Tensor:
    """L_i [B] = CE_i + c · stopgrad(exp(−α · CE_i)) · max(0, ρ − s_i): examples answered badly may skip less.

    With a ``pressure`` p the hinge gives way to p · (ρ − s_i): every example is paid alike for what it skips, beyond
    ρ as well, and the pressure sees to the mean (ours; see ``sparsity_pressure``).
    """
    confidence_B = torch.exp(-sharpness * cross_entropy_B.detach())
    missing_B = target_skip_ratio - skip_rate_B
    return cross_entropy_B + coef * confidence_B * (
        missing_B.clamp_min(0) if pressure is None else pressure * missing_B
    )


def sparsity_pressure(mean_skip_rate: float, target_skip_ratio: float) -> float:
    """The share of the sparsity loss that applies at a mean skip rate: 1 well below the target, 0 from it on."""
    return min(1.0, max(0.0, (target_skip_ratio - mean_skip_rate) / PRESSURE_WIDTH))
