"""Nothing about a call may live on the model: threads do not meet, and recomputation changes nothing."""

import threading

import pytest
import torch

from routing_experts.errors import RoutingExpertsError
from routing_experts.models.families import family_of
from routing_experts.models.options import RoutingOptions
from routing_experts.nn.gates import GateSettings
from tiny import GREEDY, batch_of, context_of, for_generate, prompt, route_everywhere, tiny_llava

ROUTES = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
GATES = {
    "random": GateSettings("random", bias=0.2, seed=3, step=7),
    "softmax": GateSettings("softmax", temperature=2.0, bias=0.5),
    "straight_through": GateSettings("straight_through", temperature=2.0),
    "gumbel_straight_through": GateSettings("gumbel_straight_through", temperature=2.0, seed=3, step=7),
}


@torch.no_grad()
def test_four_threads_with_four_routes(build):
    """Guards servers: routes, options and caches of concurrent calls on one model stay apart, bit for bit."""
    model = route_everywhere(build(), num_unrouted_layers=0)
    images = int(hasattr(model.config, "image_token_id"))
    batches = [for_generate(batch_of([prompt(i, images, 3 + i), prompt(9 + i, images, 2)])) for i in range(4)]

    @torch.no_grad()
    def serve(i):
        options = RoutingOptions(route=ROUTES[i])
        return model(**batches[i], routing_options=options).logits, model.generate(
            **batches[i], **GREEDY, routing_options=options
        )

    expected = [serve(i) for i in range(4)]
    assert not torch.equal(expected[0][0][:, -1], expected[1][0][:, -1])
    wrong, start = [], threading.Barrier(4)

    def work(i):
        start.wait()
        for _ in range(5):
            logits, tokens = serve(i)
            if not (torch.equal(logits, expected[i][0]) and torch.equal(tokens, expected[i][1])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def gradients(model, batch, gate, layout, checkpointing=None):
    """Gradients by name of a loss that hears logits and skip weights, and how often the MLP of layer 1 ran."""
    runs = []
    layer = family_of(model).decoder_layers(model)[1]
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: runs.append(args[0].shape[1]))
    model.train()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    context = context_of(model, batch, RoutingOptions(layout=layout), gate=gate, keys_B=torch.tensor([40, 41, 42]))
    logits = model(**batch, routing=context).logits
    skips = torch.stack([weights[..., 1].mean() for weights in context.weights.values()])
    loss = logits[batch["attention_mask"].bool()].square().mean() + skips.mean()
    loss.backward()
    handle.remove()
    if checkpointing:
        model.gradient_checkpointing_disable()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, loss.item(), len(runs)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("layout", ["two_call", "fused"])
@pytest.mark.parametrize("kind", GATES)
def test_checkpointing_gives_the_same_gradients(build, kind, layout):
    """Guards recomputation: a context written in place once gave gradients 43 % off at the same loss, silently."""
    model = route_everywhere(build(), num_unrouted_layers=0)
    images = (1, 2, 0) if hasattr(model.config, "image_token_id") else (0, 0, 0)
    prompts = [prompt(i, n, 3, earlier_turns=i % 2, answer=2) for i, n in enumerate(images)]
    batch = batch_of(prompts)
    plain, loss, runs = gradients(model, batch, GATES[kind], layout)
    again, loss_again, runs_again = gradients(model, batch, GATES[kind], layout, {"use_reentrant": False})
    assert loss == loss_again
    assert runs_again == 2 * runs  # it did recompute
    assert set(plain) == set(again)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name
    reads_tokens = kind != "random"
    assert ("routing_tokens" in plain) == reads_tokens
    routers = [name for name in plain if "router" in name.split(".")]
    assert bool(routers) == reads_tokens
    assert all(bool(plain[name].any()) for name in routers)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_is_refused():
    """Guards training: the reentrant variant loses the routing tokens' gradients without a word."""
    model = route_everywhere(tiny_llava())
    batch = batch_of([prompt(i) for i in range(3)])
    with pytest.raises(RoutingExpertsError, match="use_reentrant=True: it loses"):
        gradients(model, batch, GATES["softmax"], "two_call", {"use_reentrant": True})
