"""Training's mix leaves out what has no weight: it must give the weighted sum's values and gradients all the same."""

import pytest
import torch

from routing_experts.models.options import RoutingOptions
from routing_experts.nn.gates import GateSettings
from tiny import batch_of, context_of, prompt, route_everywhere, segments_of

ROUNDING = 1e-7  # Llama's norms compute in 32 bits whatever they are given
HARD = ("random", "straight_through", "gumbel_straight_through")
GATES = pytest.mark.parametrize("kind", HARD)
LAYOUTS = pytest.mark.parametrize("layout", ["two_call", "fused"])


def dialogues(side="right"):
    """Dialogues of one to three turns, padded."""
    return batch_of([prompt(i, images=0, answer=3, earlier_turns=i % 3) for i in range(6)], side, torch.float64)


def gradients_of(model, batch, context):
    """Of a loss that sees every real token and the routers' weights."""
    model.zero_grad()
    logits = model(**batch, routing=context, use_cache=False).logits
    real = batch["attention_mask"].bool()
    chosen = sum(weights[..., 1].square().sum() for weights in context.weights.values())
    (torch.log_softmax(logits[real], -1)[:, :7].square().mean() + 0.01 * chosen).backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return logits.detach()[real], grads


def weighted_sum(monkeypatch):
    """Both paths of every token, each times its weight: the equation as it stands in the paper."""
    from routing_experts.models import layer, mixing

    def textbook(call, hidden):
        routing, gate = call.routing, call.routing.gate
        tokens = routing.tokens.get(call.index)
        if tokens is None:
            logits = hidden.new_zeros(*routing.valid_BQ.shape, 2)
        else:
            logits = mixing.router_logits(call.layer.input_layernorm(tokens), call.layer.router)
        weights = mixing.gate_weights(gate, logits, routing.valid_BQ, routing.keys_B, call.index)
        routing.weights[call.index] = weights
        by_token = weights.gather(1, routing.turns_BT[..., None].expand(-1, -1, 2))
        if tokens is not None and routing.carries_after(call.index):
            ran, ran_tokens = call.run_both(hidden, tokens)
            routing.tokens[call.index + 1] = weights[..., :1] * ran_tokens + weights[..., 1:] * call.adapt(tokens)
        else:
            ran = call.run_rows(hidden)
        return by_token[..., :1] * ran + by_token[..., 1:] * call.adapt(hidden)

    monkeypatch.setattr(layer, "mix", textbook)


@GATES
@LAYOUTS
@pytest.mark.parametrize("recomputed", [False, True])
def test_values_and_gradients_are_the_weighted_sums(build, layout, kind, recomputed, monkeypatch):
    """Over several steps, so that rows skip a layer whole, in part and not at all."""
    model = route_everywhere(build(dtype=torch.float64), num_unrouted_layers=0).train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, seen = dialogues(), []

    def context(step, **settings):
        gate = GateSettings(kind, bias=0.1, seed=3, step=step)
        return context_of(model, batch, RoutingOptions(layout=layout), gate=gate, **settings)

    for step in range(3):
        ours = context(step)
        found = [gradients_of(model, batch, ours), gradients_of(model, batch, context(step, same_calls=True))]
        seen += [weights[..., 1].gather(1, ours.turns_BT) for weights in ours.weights.values()]
        with monkeypatch.context() as patch:
            weighted_sum(patch)
            logits, grads = gradients_of(model, batch, context(step))
        for other_logits, other_grads in found:
            torch.testing.assert_close(other_logits, logits, atol=ROUNDING, rtol=1e-6)
            for name, grad in grads.items():
                torch.testing.assert_close(
                    other_grads[name], grad, atol=ROUNDING, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )
    shares = torch.cat(seen).mean(1)
    assert bool((shares == 1).any() and (shares == 0).any() and ((shares > 0) & (shares < 1)).any())


def calls_of(model, batch, context):
    """(module, tokens) of every linear layer's call, in order."""
    calls, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            note = lambda module, args, output, name=name: calls.append((name, output.shape[:-1].numel()))  # noqa: E731
            hooks.append(module.register_forward_hook(note))
    gradients_of(model, batch, context)
    for hook in hooks:
        hook.remove()
    return calls


@GATES
def test_all_processes_call_the_same_modules(build, kind):
    """Guards sharded training: whatever its examples skip, a process asks for the same weights in the same order."""
    model = route_everywhere(build(dtype=torch.float64), num_unrouted_layers=0).train()
    batch = dialogues()

    def context(step, bias):
        return context_of(model, batch, gate=GateSettings(kind, bias=bias, step=step), same_calls=True)

    routes = [(0, 0.0), (1, 0.0), (2, -100.0), (3, 100.0)]  # of all layers skipped and all kept, too
    orders = [[name for name, _ in calls_of(model, batch, context(*route))] for route in routes]
    assert all(order == orders[0] for order in orders)


@GATES
@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_every_layer_gets_gradients(build, kind, bias):
    """Guards DDP, which waits for a gradient of every parameter: with all layers skipped and all kept, too."""
    model = route_everywhere(build(dtype=torch.float64), num_unrouted_layers=0).train()
    batch = dialogues()
    gradients_of(model, batch, context_of(model, batch, gate=GateSettings(kind, bias=bias)))
    layers = [(name, p) for name, p in model.named_parameters() if ".layers." in name and "vision" not in name]
    trained = [p for name, p in layers if kind != "random" or "skip_" in name]  # random routes train adapters alone
    assert len(trained) >= 10
    assert all(p.grad is not None for p in trained)


def test_random_routes_compute_what_they_choose(build):
    """Each token takes one path: the adapters see the skipped ones alone, the layers rows that keep something."""
    model = route_everywhere(build(dtype=torch.float64), num_unrouted_layers=0).train()
    batch = dialogues()
    context = context_of(model, batch, gate=GateSettings("random", bias=0.1, step=1))
    calls = calls_of(model, batch, context)
    for index, weights in context.weights.items():
        skips = weights[..., 1].gather(1, context.turns_BT) > 0
        adapted = [count for name, count in calls if name.endswith(f"layers.{index}.skip_down")]
        ran = [count for name, count in calls if name.endswith(f"layers.{index}.mlp.down_proj")]
        assert adapted == [int(skips.sum())]
        assert ran == [int((~skips.all(1)).sum()) * skips.shape[1]]
    assert segments_of(model, batch).max() > 2  # more than one turn
