"""A slow textbook twin of RoE training on a Llama decoder: one dialogue, one token at a time, plain tensors.

Written from the equations of Wu et al. (ICLR 2025) alone; it shares no code with the library or with transformers, and
knows no batch, padding, mask or cache. A dialogue is a list that says of each token what it belongs to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """The decoder's numbers."""

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    eps: float
    rope_base: float
    routed_layers: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """What one token belongs to: ("context", 0), ("question", q) or ("answer", q), with q from 1."""

    part: str
    turn: int


@dataclass
class Result:
    """All that is worth comparing; per layer lists start with what enters layer 0."""

    states: list[list[Tensor]]
    routing: list[list[Tensor]]
    router_logits: dict[int, list[Tensor]]
    weights: dict[int, list[Tensor]]
    logits: list[Tensor]
    cross_entropy: Tensor
    skip_rate: Tensor
    loss: Tensor


def train(
    weights: dict[str, Tensor],
    shape: Shape,
    dialogue: list[Place],
    ids: list[int],
    labels: list[int | None],
    temperature: float,
    bias: float,
    target: float,
) -> Result:
    """The training loss of one dialogue.

    Args:
        weights: by the names of the routed model's parameters.
        shape: the decoder's numbers.
        dialogue: what each token belongs to.
        ids: token ids.
        labels: what each position is, if it is to be predicted by the one before; None where no loss falls.
        temperature, bias: of the softmax gate.
        target: ρ.
    """
    num_turns = max(place.turn for place in dialogue)
    states = [weights["model.embed_tokens.weight"][token] for token in ids]
    routing = [weights["routing_tokens"][0]] + [weights["routing_tokens"][1]] * num_turns
    result = Result([states], [routing], {}, {}, [], torch.zeros(()), torch.zeros(()), torch.zeros(()))
    for layer in range(shape.num_layers):
        parts = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        states, routing = _layer(parts, shape, layer, dialogue, states, routing, temperature, bias, result)
        result.states.append(states)
        result.routing.append(routing)
    for state in states:
        result.logits.append(weights["lm_head.weight"] @ _norm(state, weights["model.norm.weight"], shape.eps))
    losses = []
    for position in range(len(ids) - 1):
        answer = labels[position + 1]
        if answer is not None:
            scores = result.logits[position]
            losses.append(scores.exp().sum().log() - scores[answer])
    result.cross_entropy = sum(losses) / len(losses)
    skips = [result.weights[layer][turn][1] for layer in shape.routed_layers for turn in range(1, num_turns + 1)]
    result.skip_rate = sum(skips) / len(skips)
    confidence = torch.exp(-5 * result.cross_entropy).detach()
    missing = target - result.skip_rate
    result.loss = result.cross_entropy + confidence * (missing if missing > 0 else 0 * missing)
    return result


def _layer(
    parts: dict[str, Tensor],
    shape: Shape,
    layer: int,
    dialogue: list[Place],
    states: list[Tensor],
    routing: list[Tensor],
    temperature: float,
    bias: float,
    result: Result,
) -> tuple[list[Tensor], list[Tensor]]:
    num_turns = len(routing) - 1
    normed = [_norm(x, parts["input_layernorm.weight"], shape.eps) for x in states]
    routing_normed = [_norm(r, parts["input_layernorm.weight"], shape.eps) for r in routing]
    key_values = [_key_value(parts, shape, h, position) for position, h in enumerate(normed)]
    # All routing tokens stand where the dialogue's first token stands.
    routing_key_values = [_key_value(parts, shape, h, 0) for h in routing_normed]

    full = []
    for position, (x, h) in enumerate(zip(states, normed, strict=True)):
        seen = key_values[: position + 1]
        full.append(_block(parts, shape, x, h, position, seen))
    routing_full = []
    for turn, (r, h) in enumerate(zip(routing, routing_normed, strict=True)):
        part = "context" if turn == 0 else "question"
        seen = [kv for kv, place in zip(key_values, dialogue, strict=True) if place == Place(part, turn)]
        routing_full.append(_block(parts, shape, r, h, 0, [*seen, routing_key_values[turn]]))
    if layer not in shape.routed_layers:
        return full, routing_full

    logits = []
    for turn in range(1, num_turns + 1):
        logits.append(parts["router.weight"] @ torch.cat([routing_normed[0], routing_normed[turn]]))
    biased = [torch.stack([z[0] + bias, z[1]]) for z in logits]
    context = sum(biased) / num_turns
    weights = []
    for z in [context, *biased]:
        odds = torch.exp((z - z.max()) / temperature)
        weights.append(odds / odds.sum())
    result.router_logits[layer], result.weights[layer] = logits, weights

    def mix(w: Tensor, ran: Tensor, x: Tensor, h: Tensor) -> Tensor:
        inner = parts["skip_down.weight"] @ h
        adapted = x + parts["skip_up.weight"] @ torch.where(inner > 0, inner, 0)
        return w[0] * ran + w[1] * adapted

    mixed = [
        mix(weights[place.turn], ran, x, h) for place, ran, x, h in zip(dialogue, full, states, normed, strict=True)
    ]
    routing_mixed = [mix(w, *rest) for w, *rest in zip(weights, routing_full, routing, routing_normed, strict=True)]
    return mixed, routing_mixed


def _norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return scale * x / torch.sqrt((x * x).mean() + eps)


def _rotate(vector: Tensor, position: int, shape: Shape) -> Tensor:
    half = shape.head_size // 2
    turned = list(vector)
    for j in range(half):
        angle = torch.tensor(position * shape.rope_base ** (-2 * j / shape.head_size), dtype=vector.dtype)
        turned[j] = vector[j] * angle.cos() - vector[j + half] * angle.sin()
        turned[j + half] = vector[j + half] * angle.cos() + vector[j] * angle.sin()
    return torch.stack(turned)


def _key_value(parts: dict[str, Tensor], shape: Shape, h: Tensor, position: int) -> tuple[list[Tensor], list[Tensor]]:
    keys = (parts["self_attn.k_proj.weight"] @ h).split(shape.head_size)
    values = (parts["self_attn.v_proj.weight"] @ h).split(shape.head_size)
    return [_rotate(key, position, shape) for key in keys], list(values)


def _block(parts: dict[str, Tensor], shape: Shape, x: Tensor, h: Tensor, position: int, seen: list) -> Tensor:
    """Attention over what is seen, then the MLP, each added to what came in."""
    heads = []
    for head, query in enumerate((parts["self_attn.q_proj.weight"] @ h).split(shape.head_size)):
        shared = head * shape.num_key_value_heads // shape.num_heads
        turned = _rotate(query, position, shape)
        scores = torch.stack([turned @ keys[shared] for keys, _ in seen]) / shape.head_size**0.5
        share = torch.exp(scores - scores.max())
        share = share / share.sum()
        heads.append(sum(p * values[shared] for p, (_, values) in zip(share, seen, strict=True)))
    x = x + parts["self_attn.o_proj.weight"] @ torch.cat(heads)
    h = _norm(x, parts["post_attention_layernorm.weight"], shape.eps)
    gate = parts["mlp.gate_proj.weight"] @ h
    return x + parts["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (parts["mlp.up_proj.weight"] @ h))
