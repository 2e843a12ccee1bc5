"""Gates: router logits to keep and skip weights while training.

A gate perturbs the turns' logits (bias, noise, or random draws in their place), gives the context their mean, and
turns each pair into weights: softly (the paper's), or as a one-hot choice with the soft weights' gradient.

Draws are a pure function of (seed, step, example, layer, turn): the same on any number of processes and in any
recomputation, which a global random generator cannot give.

Shapes: B examples, R = Q + 1 rows (context first), Q turns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_experts.config import CONTROL_GATES
from routing_experts.nn.router import KEEP, with_context

_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685  # splitmix64's multipliers as signed integers
_GOLDEN = -7046029254386353131


@dataclass(frozen=True)
class GateSettings:
    """What the gate does at one moment of training.

    Attributes:
        kind: "random" (one-hot draws that skip with probability ρ), "static" (always skip), "softmax",
            "straight_through" or "gumbel_straight_through".
        temperature: τ that logits are divided by.
        bias: b, added to keep logits (or keep draws).
        seed, step: of the draws.
    """

    kind: str
    temperature: float = 1.0
    bias: float = 0.0
    seed: int = 0
    step: int = 0

    @property
    def asks_router(self) -> bool:
        """Whether the weights depend on router logits."""
        return self.kind not in CONTROL_GATES

    @property
    def is_hard(self) -> bool:
        """Whether one weight of each pair is zero."""
        return self.kind != "softmax"


def gate_weights(settings: GateSettings, logits_BQ2: Tensor, valid_BQ: Tensor, keys_B: Tensor, layer: int) -> Tensor:
    """Keep and skip weights of the context and of every turn.

    Args:
        settings: kind, temperature, bias, seed and step.
        logits_BQ2: the router's; a random gate reads only their shape.
        valid_BQ: which turns exist.
        keys_B: an integer an example, the same wherever the example is processed.
        layer: the layer's index.

    Returns:
        [B, R, 2], each pair summing to one; float32, or float64 for logits of that dtype.
    """
    # At least float32: bfloat16 draws tie once in some hundred times, and a tie skips.
    perturbed = logits_BQ2.to(torch.promote_types(logits_BQ2.dtype, torch.float32))
    if settings.kind == "static":
        return one_hot(with_context(perturbed.new_zeros(perturbed.shape), valid_BQ))  # ties skip
    draws = uniform(settings.seed, settings.step, keys_B, layer, logits_BQ2.shape[1]).to(perturbed.dtype)
    if settings.kind == "random":
        perturbed = draws
    elif settings.kind == "gumbel_straight_through":
        perturbed = perturbed - torch.log(-torch.log(draws))
    keep_bias = torch.zeros(2, dtype=perturbed.dtype, device=perturbed.device)
    keep_bias[KEEP] = settings.bias
    rows_BR2 = with_context(perturbed + keep_bias, valid_BQ)
    if settings.kind == "random":
        return one_hot(rows_BR2)
    soft_BR2 = torch.softmax(rows_BR2 / settings.temperature, dim=-1)
    if settings.kind == "softmax":
        return soft_BR2
    assert settings.kind in ("straight_through", "gumbel_straight_through")
    return one_hot(rows_BR2) + (soft_BR2 - soft_BR2.detach())  # in this order exactly one-hot: (1 + s) - s rounds


def one_hot(rows_BR2: Tensor) -> Tensor:
    """The larger of each pair gets weight one; a tie skips, as at inference."""
    keep = rows_BR2[..., 0] > rows_BR2[..., 1]
    return torch.stack([keep, ~keep], dim=-1).to(rows_BR2.dtype)


def uniform(seed: int, step: int, keys_B: Tensor, layer: int, num_turns: int) -> Tensor:
    """Draws from the open interval (0, 1), [B, Q, 2] float32, by hashing their coordinates."""
    state_B = keys_B.to(torch.int64)
    for coordinate in (seed, step, layer):
        state_B = _mix(state_B + _wrap(_GOLDEN * (coordinate + 1)))
    offsets = torch.arange(2 * num_turns, device=keys_B.device, dtype=torch.int64).view(num_turns, 2)
    bits = _mix(state_B[:, None, None] + _GOLDEN * (offsets + 1))
    return ((_shift(bits, 41)).to(torch.float32) + 0.5) / 2**23


def _mix(state: Tensor) -> Tensor:
    """Splitmix64's finaliser on wrapping 64-bit integers."""
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _wrap(value: int) -> int:
    """A Python integer modulo 2^64 as a signed one; torch takes no larger."""
    return (value + 2**63) % 2**64 - 2**63


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's own keeps the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
