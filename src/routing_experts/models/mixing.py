"""Training's layer: both paths, mixed by each token's turn weights (Wu et al., ICLR 2025).

A path of weight zero adds nothing, and no gradient reaches it. One-hot gates therefore leave work out: a random one's
tokens take one path each; a learned one's router still compares both, but backward follows the chosen one alone. Every
process calls the same modules as often and in the same order, whatever its examples skip, where weights are shared out.

Shapes: B examples, T tokens, R rows of weights (context first, then turns), D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from routing_experts.models.context import RoutingContext
from routing_experts.nn.gates import GateSettings, gate_weights
from routing_experts.nn.router import router_logits


def mix(call: Any, hidden: Tensor) -> Tensor:
    """What a routed layer makes of hidden states [B, T, D] while a gate trains.

    Args:
        call: the layer's, with its paths.
        hidden: the layer's input.
    """
    routing: RoutingContext = call.routing
    gate = routing.gate
    assert gate is not None
    tokens = call.routing_tokens(hidden)
    if not gate.asks_router:
        return _choose(call, hidden, gate)
    normed = call.router_input(hidden)
    logits = router_logits(normed, call.layer.router)
    weights = gate_weights(gate, logits, routing.valid_BQ, routing.keys_B, call.index)
    _note(routing, call.index, logits, weights)  # the loss reads them in the gate's precision
    weights = weights.to(hidden.dtype)
    spares = gate.is_hard and torch.is_grad_enabled() and not routing.same_calls
    skip_BT = weights[..., 1].gather(1, routing.turns_BT)
    skips_BT = (skip_BT > 0).cpu() if spares else None  # the one wait for the device
    rows = None if skips_BT is None else _rows_that_run(skips_BT, hidden.device)
    if tokens is not None and routing.carries_after(call.index):
        ran, ran_tokens = _run_both(call, hidden, tokens, rows)
        mixed_tokens = ran_tokens.lerp(call.adapt(tokens, normed), weights[..., 1:])
        routing.tokens.setdefault(call.index + 1, mixed_tokens)
    else:
        ran = _run(call, hidden, rows)
    adapted = call.adapt(hidden) if skips_BT is None else _adapt(call, hidden, skips_BT)
    return ran.lerp(adapted, skip_BT[..., None])  # one pass where a weighted sum takes three


def _note(routing: RoutingContext, index: int, logits: Tensor, weights: Tensor) -> None:
    """Recomputation comes here again: the first time counts."""
    routing.logits.setdefault(index, logits)
    routing.weights.setdefault(index, weights)


def _choose(call: Any, hidden: Tensor, gate: GateSettings) -> Tensor:
    """No router is asked: rows run that keep some token, and tokens are adapted that skip.

    Decided on the host, where the whole call's draws can be made without waiting for the device.
    """
    routing: RoutingContext = call.routing
    valid_BQ, keys_B, turns_BT = routing.on_host
    logits = torch.zeros(*valid_BQ.shape, 2, dtype=hidden.dtype)
    weights = gate_weights(gate, logits, valid_BQ, keys_B, call.index)
    _note(routing, call.index, logits.to(hidden.device), weights.to(hidden.device))
    if gate.kind == "static":
        return call.adapt(hidden)  # nobody keeps the layer, on any process
    skip_BT = weights[..., 1].gather(1, turns_BT) > 0
    rows = _rows_that_run(skip_BT, hidden.device)
    ran = call.run_rows(hidden) if rows is None else hidden.index_copy(0, rows[0], call.run_rows(hidden, rows[0]))
    skipped = skip_BT.flatten().nonzero()[:, 0].to(hidden.device)
    adapted = call.adapt(hidden.flatten(0, 1)[skipped])
    # No view: FSDP hangs its backward on what a layer returns.
    return ran.index_put((skipped // hidden.shape[1], skipped % hidden.shape[1]), adapted)


def _rows_that_run(skips_BT: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Indices of rows that keep some token and of the others; None if all rows do."""
    running = ~skips_BT.all(1)
    # One row runs whatever they choose: processes call the same modules, and DDP waits for every parameter's gradient.
    running[0] |= not bool(running.any())
    if bool(running.all()):
        return None
    return running.nonzero()[:, 0].to(device), (~running).nonzero()[:, 0].to(device)


def _run(call: Any, hidden: Tensor, rows: tuple[Tensor, Tensor] | None) -> Tensor:
    """The base layer on all rows; of those that skip it whole, only the value is wanted.

    The call with gradients comes first, here and below: autocast keeps the 16-bit copies of weights that it makes, and
    copies that were made without gradients pass none on.
    """
    if rows is None:
        return call.run_rows(hidden)
    running, others = rows
    ran = call.run_rows(hidden, running)
    with torch.no_grad():
        value = call.run_rows(hidden, others)
    return merge_rows(hidden, running, ran, others, value)


def _run_both(call: Any, hidden: Tensor, tokens: Tensor, rows: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The same with routing tokens."""
    if rows is None:
        return call.run_both(hidden, tokens)
    running, others = rows
    ran = call.run_both(hidden[running], tokens[running], running)
    with torch.no_grad():
        values = call.run_both(hidden[others], tokens[others], others)
    ran_all = merge_rows(hidden, running, ran[0], others, values[0])
    return ran_all, merge_rows(tokens, running, ran[1], others, values[1])


def _adapt(call: Any, hidden: Tensor, skips_BT: Tensor) -> Tensor:
    """The skip path of all tokens; of those that keep the layer, only the value is wanted."""
    flat, skips = hidden.flatten(0, 1), skips_BT.flatten()
    skipped, kept = (mask.nonzero()[:, 0].to(hidden.device) for mask in (skips, ~skips))
    adapted = call.adapt(flat[skipped])
    with torch.no_grad():
        value = call.adapt(flat[kept])
    return merge_rows(flat, skipped, adapted, kept, value).view_as(hidden)


def merge_rows(like: Tensor, rows: Tensor, ran: Tensor, others: Tensor, value: Tensor) -> Tensor:
    """Puts two groups of rows back in order, by their indices."""
    return torch.empty_like(like).index_copy(0, rows, ran).index_copy(0, others, value)
