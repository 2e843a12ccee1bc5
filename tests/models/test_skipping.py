"""Contract 4: skipped means not run. Calls are counted per layer and row, bytes per layer."""

import pytest
import torch

from counting import counting
from routing_experts.models.cache import RoutedCache
from routing_experts.models.families import family_of
from routing_experts.models.options import SKIP_ALL, RoutingOptions
from tiny import (
    GREEDY,
    HEAD_SIZE,
    KEY_VALUE_HEADS,
    NUM_LAYERS,
    batch_of,
    context_of,
    for_generate,
    prompt,
    route_everywhere,
    tiny_llava,
)

MIXED = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
NEW_TOKENS = 4


def batch_for(model):
    images = (1, 2, 0) if hasattr(model.config, "image_token_id") else (0, 0, 0)
    return batch_of([prompt(i, images=n, words=4) for i, n in enumerate(images)])


def bytes_of(route, num_tokens):
    return int(route.sum()) * num_tokens * 2 * KEY_VALUE_HEADS * HEAD_SIZE * torch.float32.itemsize


@torch.no_grad()
def test_forced_routes_run_their_layer_rows_and_no_more(build):
    """Guards prefill and every decoding step: rows that run = rows that keep, for attention and for the MLP."""
    model = route_everywhere(build(), num_unrouted_layers=0)
    batch = batch_for(model)
    length = batch["input_ids"].shape[1]
    with counting(model) as calls:
        model.generate(
            **for_generate(batch),
            **(GREEDY | {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}),
            routing_options=RoutingOptions(route=MIXED),
        )
    assert {tokens for _, _, tokens in calls} == {length, 1}
    for layer in range(NUM_LAYERS):
        rows = int(MIXED[:, layer].sum())
        for name in ("attention", "mlp"):
            assert calls[layer, name, length] == ([rows] if rows else [])
            assert calls[layer, name, 1] == ([rows] * (NEW_TOKENS - 1) if rows else [])
    assert not any(calls[2, name, tokens] for name in ("attention", "mlp") for tokens in (length, 1))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["two_call", "fused"])
def test_router_decided_routes_run_their_layer_rows_and_no_more(build, layout):
    """Guards routing tokens too: they run a layer for the rows that keep it, and not behind the last routed one."""
    model = route_everywhere(build(), seed=1)
    batch = batch_of([prompt(i, images=i % 3 if hasattr(model.config, "image_token_id") else 0) for i in range(8)])
    length, num_routing = batch["input_ids"].shape[1], 2
    context, cache = context_of(model, batch, RoutingOptions(layout=layout)), RoutedCache(model.config)
    with counting(model) as calls:
        model(**batch, routing=context, past_key_values=cache)
    kept = cache.route.sum(0).tolist()
    assert any(0 < rows < 8 for rows in kept)
    for layer, rows in enumerate(kept):
        carries = layer < NUM_LAYERS - 1
        expected = {length: rows}
        if carries:
            expected = {length: rows, num_routing: rows} if layout == "two_call" else {length + num_routing: rows}
        seen = {tokens: counts for (at, name, tokens), counts in calls.items() if (at, name) == (layer, "attention")}
        assert seen == ({tokens: [count] for tokens, count in expected.items()} if rows else {})


@torch.no_grad()
def test_a_skipped_layer_holds_nothing(build):
    """Guards memory: bytes of keys and values are exactly proportional to the layer-rows kept, after decoding too."""
    model = route_everywhere(build(), num_unrouted_layers=0)
    batch = batch_for(model)
    length = batch["input_ids"].shape[1]
    for route in (MIXED, torch.ones_like(MIXED), torch.zeros_like(MIXED)):
        cache = RoutedCache(model.config, RoutingOptions(route=route))
        model(**batch, past_key_values=cache)
        assert cache.num_bytes == bytes_of(route, length)
        for step in range(2):
            mask = torch.cat([batch["attention_mask"], torch.ones(3, step + 1, dtype=torch.long)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            token = torch.full((3, 1), 7)
            model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache)
            assert cache.num_bytes == bytes_of(route, length + step + 1)
        for index, layer in enumerate(cache.layers):
            held = 0 if layer.keys is None else len(layer.keys)
            assert held == int(route[:, index].sum())
            assert layer.get_seq_length() == length + 2


@torch.no_grad()
def test_routing_tokens_are_never_stored():
    """Guards the cache in both layouts: it holds the prompt's tokens and none besides."""
    model = route_everywhere(tiny_llava(), seed=3)
    batch = batch_for(model)
    for layout in ("two_call", "fused"):
        cache = RoutedCache(model.config, RoutingOptions(layout=layout))
        model(**batch, past_key_values=cache)
        assert cache.num_bytes == bytes_of(cache.route, batch["input_ids"].shape[1])


@torch.no_grad()
def test_a_skipped_layer_computes_the_adapter(build):
    """Guards what takes the layer's place: x + A(norm(x)), by a plain computation."""
    model = route_everywhere(build())
    batch = batch_for(model)
    hidden = model(**batch, routing_options=SKIP_ALL, output_hidden_states=True).hidden_states
    for index, layer in enumerate(family_of(model).decoder_layers(model)[:-1]):
        if index == 0:
            continue  # unrouted
        normed = layer.input_layernorm(hidden[index])
        inner = (normed @ layer.skip_down.weight.T).clamp_min(0)
        assert torch.allclose(hidden[index + 1], hidden[index] + inner @ layer.skip_up.weight.T, atol=1e-5)
