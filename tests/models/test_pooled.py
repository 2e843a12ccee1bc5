"""Routers that read means of ordinary tokens' states instead of routing tokens: `router_input="pooled"`."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_experts.errors import RouteError
from routing_experts.models.cache import RoutedCache
from routing_experts.models.dialogue import DialogueCache
from routing_experts.models.families import family_of
from routing_experts.nn.gates import GateSettings
from tiny import (
    GREEDY,
    NUM_LAYERS,
    batch_of,
    context_of,
    for_generate,
    prompt,
    real_logits,
    route_everywhere,
    segments_of,
    tiny_llava,
)


@functools.cache
def model_of(dtype=torch.float64):
    return route_everywhere(tiny_llava(dtype=dtype), seed=4, router_input="pooled")


@torch.no_grad()
def look(model, batch):
    context = context_of(model, batch)
    cache = RoutedCache(model.config)
    out = model(**batch, routing=context, past_key_values=cache)
    return real_logits(out.logits, batch), cache.route, context


REQUESTS = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=5)


@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=25, derandomize=True, database=None)
@given(drawn=REQUESTS)
def test_a_row_of_a_batch_gets_what_it_gets_alone(side, drawn):
    """Contract 3: neither padding nor neighbours enter a row's means."""
    model, prompts = model_of(), [prompt(seed, images=images, words=words) for seed, images, words in drawn]
    together, routes, _ = look(model, batch_of(prompts, side, model.dtype))
    for row, one in enumerate(prompts):
        alone, route, _ = look(model, batch_of([one], side, model.dtype))
        assert torch.equal(routes[row], route[0])
        assert torch.allclose(together[row], alone[0], atol=1e-10)


def test_routes_differ_and_no_routing_token_travels():
    model = model_of()
    _, routes, context = look(model, batch_of([prompt(seed) for seed in range(12)], dtype=model.dtype))
    assert len({tuple(route) for route in routes.tolist()}) > 2
    assert not context.tokens


def test_routers_read_the_means_of_their_spans():
    """The textbook: one row, one span after the other, by hand."""
    model = model_of()
    batch = batch_of([prompt(7, words=3), prompt(8, images=0, words=6)], dtype=model.dtype)
    entered, normed = {}, []
    layer = family_of(model).decoder_layers(model)[1]
    hook = layer.register_forward_pre_hook(lambda module, args: entered.setdefault("hidden", args[0]))
    _, _, context = look(model, batch)
    hook.remove()
    segments = segments_of(model, batch)
    for row in range(2):
        normed_TD = layer.input_layernorm(entered["hidden"][row])
        question = int(segments[row].max())
        spans = [normed_TD[segments[row] == 0].mean(0), normed_TD[segments[row] == question].mean(0)]
        normed.append(layer.router(torch.cat(spans)))
    assert torch.allclose(context.logits[1][:, -1], torch.stack(normed), atol=1e-12)


def test_the_one_hot_training_mix_is_the_hard_decision():
    """Contract 6, for dialogues of one turn."""
    model = model_of()
    batch = batch_of([prompt(seed) for seed in range(6)], dtype=model.dtype)
    hard, route, _ = look(model, batch)
    context = context_of(model, batch, gate=GateSettings("straight_through"))
    soft = real_logits(model(**batch, routing=context, use_cache=False).logits, batch)
    assert torch.equal(torch.stack([context.weights[i][:, 1, 0] > 0 for i in range(1, NUM_LAYERS)], 1), route[:, 1:])
    for one, other in zip(hard, soft, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_routers_learn_and_routing_tokens_do_not():
    model = route_everywhere(tiny_llava(), seed=4, router_input="pooled")
    batch = batch_of([prompt(seed) for seed in range(3)])
    context = context_of(model, batch, gate=GateSettings("softmax"))
    model(**batch, routing=context, use_cache=False).logits.sum().backward()
    layers = family_of(model).decoder_layers(model)
    assert all(bool(layer.router.weight.grad.abs().sum() > 0) for layer in layers[1:])
    assert model.routing_tokens.grad is None


def test_generation_with_and_without_a_cache_is_the_same():
    """Contract 5."""
    model = model_of()
    batch = for_generate(batch_of([prompt(seed, words=seed % 3 + 2) for seed in range(4)], dtype=model.dtype))
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))


def test_a_new_turn_on_a_cache_is_refused():
    """Guards against routes that silently miss the picture: its states are in no cache."""
    model = model_of()
    whole = batch_of([prompt(1, earlier_turns=1)], dtype=model.dtype)
    held = int((whole["input_ids"][0] == 2).nonzero()[0]) + 1
    first = {n: t[:, :held] if n != "pixel_values" else t for n, t in whole.items()}
    cache = DialogueCache(model.config)
    with torch.no_grad():
        model(**first, past_key_values=cache)
        cache.open_turn(whole["input_ids"])
        with pytest.raises(RouteError, match="router_input='pooled'"):
            model(input_ids=whole["input_ids"][:, held:], past_key_values=cache)
