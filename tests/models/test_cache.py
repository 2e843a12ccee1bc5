"""Contract 5: cached generation equals uncached generation, and what a routed cache cannot do is refused by name."""

import contextlib

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from routing_experts.errors import RouteError
from routing_experts.models.cache import RoutedCache, RoutedCacheLayer
from routing_experts.models.options import RoutingOptions
from tiny import BOS, GREEDY, NUM_LAYERS, batch_of, for_generate, prompt, route_everywhere, tiny_llama, tiny_llava

ROUTES = {
    "layer 0 skipped by some": [[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]],
    "layer 0 skipped by all": [[0, 1, 0, 1, 1], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]],
    "everything skipped by one": [[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 1, 0]],
    "everything skipped": [[0] * NUM_LAYERS] * 3,
}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "sampled": {"do_sample": True, "top_k": 0},
    "sampled thrice": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "top_k": 0},
}


def model_for(build, attention="eager", **settings):
    return route_everywhere(build(attention=attention), **({"num_unrouted_layers": 0, "seed": 1} | settings))


def requests(model):
    images = (1, 2, 0) if hasattr(model.config, "image_token_id") else (0, 0, 0)
    return for_generate(batch_of([prompt(i, images=n, words=3 + i) for i, n in enumerate(images)]))


@contextlib.contextmanager
def forced(model, route):
    """Forces a route on every call, as a caller of plain forwards would; generate itself has no such option."""

    def add(module, args, kwargs):
        return args, kwargs | {"routing_options": RoutingOptions(route=route)}

    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    yield
    handle.remove()


@torch.no_grad()
def generate(model, batch, **settings):
    torch.manual_seed(11)
    out = model.generate(**batch, **(GREEDY | settings), return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits)


def assert_same(first, second):
    assert torch.equal(first[0], second[0])
    assert torch.allclose(first[1], second[1], atol=2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ROUTES)
def test_cached_equals_uncached_on_forced_routes(build, name, mode):
    """Guards length, row map and masks of the cache, left-padded, with eager attention (SDPA hides misalignment)."""
    model, route = model_for(build), torch.tensor(ROUTES[name]).bool()
    batch = requests(model)
    cached = generate(model, batch, routing_options=RoutingOptions(route=route), **MODES[mode])
    with forced(model, route):
        uncached = generate(model, batch, use_cache=False, **MODES[mode])
    assert_same(cached, uncached)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_unrouted", [0, 1])
def test_cached_equals_uncached_where_routers_decide(build, num_unrouted, mode, attention):
    """Guards that generated tokens never move a decision: uncached, the routers are asked at each step anew."""
    model = model_for(build, attention, num_unrouted_layers=num_unrouted)
    batch = requests(model)
    cached, uncached = (generate(model, batch, use_cache=use, **MODES[mode]) for use in (True, False))
    assert_same(cached, uncached)


def test_cached_equals_uncached_where_history_decides():
    """Guards the preset ``paper``: its routing token sees the dialogue's history, but never what is generated."""
    model = model_for(tiny_llava, num_unrouted_layers=1, text_span="history")
    batch = for_generate(batch_of([prompt(i, images=i % 3, words=2 + i % 5, earlier_turns=i % 2) for i in range(8)]))
    cached, uncached = (generate(model, batch, use_cache=use, max_new_tokens=8) for use in (True, False))
    assert_same(cached, uncached)


def test_beams_carry_each_request_s_own_route(build):
    """Guards the row map under reordering: requests of other routes in one beam search are as alone."""
    model, route = model_for(build), torch.tensor(ROUTES["layer 0 skipped by some"]).bool()
    images = (1, 2, 0) if hasattr(model.config, "image_token_id") else (0, 0, 0)
    prompts = [prompt(i, images=n, words=3 + i) for i, n in enumerate(images)]
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    together, _ = generate(
        model, for_generate(batch_of(prompts)), routing_options=RoutingOptions(route=route), **settings
    )
    for row, one in enumerate(prompts):
        options = RoutingOptions(route=route[row])
        alone, _ = generate(model, for_generate(batch_of([one])), routing_options=options, **settings)
        new = GREEDY["max_new_tokens"]
        assert torch.equal(together[2 * row : 2 * row + 2, -new:], alone[:, -new:])


@torch.no_grad()
def test_a_used_cache_goes_on_where_it_stopped(build):
    """Guards reuse with layer 0 skipped: a second question feeds its own tokens only, on the first one's route."""
    model, route = model_for(build), torch.tensor(ROUTES["layer 0 skipped by all"]).bool()
    batch = requests(model)
    cache = RoutedCache(model.config, RoutingOptions(route=route))
    first = model.generate(**batch, **GREEDY, past_key_values=cache)
    held = cache.get_seq_length()
    assert held == first.shape[1] - 1
    longer = torch.cat([first, torch.tensor([[9, 8, 7]] * 3)], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, longer.shape[1] - batch["input_ids"].shape[1])], dim=1)
    again = {"input_ids": longer, "attention_mask": mask.long()}
    fed = []
    handle = model.register_forward_pre_hook(lambda m, a, k: fed.append(k["input_ids"].shape[1]), with_kwargs=True)
    going_on = generate(model, again, past_key_values=cache)
    handle.remove()
    assert fed[0] == longer.shape[1] - held
    with forced(model, route):
        uncached = generate(model, batch | again, use_cache=False)
    assert_same(going_on, uncached)


@torch.no_grad()
def test_plain_forward_makes_a_routed_cache():
    """Guards manual decoding loops: a forward that is given no cache returns a routed one, unless told not to."""
    model = model_for(tiny_llama)
    batch = requests(model)
    for asked in ({}, {"use_cache": True}, {"use_cache": None}):
        assert isinstance(model(**batch, **asked).past_key_values, RoutedCache)
    assert model(**batch, use_cache=False).past_key_values is None


@torch.no_grad()
def test_positional_arguments_are_heard(build):
    """Guards calls by position, of forward (a mask not heard would move spans) and of generate (its config)."""
    model = model_for(build)
    batch = requests(model)
    names = ("input_ids", "pixel_values", "attention_mask") if "pixel_values" in batch else tuple(batch)
    assert torch.equal(model(*(batch[name] for name in names)).logits, model(**batch).logits)
    ids = torch.tensor([[BOS, 50, 5, 6, 51, 52]])
    settings = GenerationConfig(**GREEDY, prompt_lookup_num_tokens=2)
    with pytest.raises(RouteError, match="prompt_lookup_num_tokens"):
        model.generate(ids, settings)


@torch.no_grad()
def test_a_generation_config_may_turn_the_cache_off():
    """Guards ``use_cache=False`` when it comes in a config: no routed cache may then be handed over."""
    model = model_for(tiny_llama)
    batch = requests(model)
    out = model.generate(
        **batch, generation_config=GenerationConfig(**GREEDY, use_cache=False), return_dict_in_generate=True
    )
    assert out.past_key_values is None
    assert torch.equal(out.sequences, model.generate(**batch, **GREEDY))


REFUSED = {
    "assistant_model": lambda: tiny_llama(seed=1),
    "prompt_lookup_num_tokens": lambda: 2,
    "assistant_early_exit": lambda: 2,
    "use_mtp": lambda: True,
    "prefill_chunk_size": lambda: 4,
    "cache_implementation": lambda: "static",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_generation_is_refused_by_name(name):
    """Guards against silently wrong answers: what would undo or outrun a routing decision is named and refused."""
    model = model_for(tiny_llama)
    with pytest.raises(RouteError, match=name):
        model.generate(**requests(model), **GREEDY, **{name: REFUSED[name]()})


@pytest.mark.parametrize("where", ["argument", "config of the call", "config of the model"])
def test_refusals_hold_wherever_the_setting_stands(where):
    """Guards the two other places where transformers reads generation settings."""
    model = model_for(tiny_llama)
    settings = dict(GREEDY)
    if where == "argument":
        settings["cache_implementation"] = "quantized"
    elif where == "config of the call":
        settings = {"generation_config": GenerationConfig(cache_implementation="quantized")}
    else:
        model.generation_config.cache_implementation = "quantized"
    with pytest.raises(RouteError, match="quantized"):
        model.generate(**requests(model), **settings)


@torch.no_grad()
@pytest.mark.parametrize("through", ["forward", "generate"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_foreign_cache_is_refused(kind, through):
    """Guards rows of unequal number: a plain cache would store them silently misaligned."""
    model = model_for(tiny_llama)
    cache = kind(config=model.config) if kind is DynamicCache else kind(config=model.config, max_cache_len=32)
    call = model.forward if through == "forward" else model.generate
    with pytest.raises(RouteError, match=kind.__name__):
        call(**requests(model), past_key_values=cache, **({"max_new_tokens": 2} if through == "generate" else {}))


def test_a_foreign_cache_with_a_past_is_refused():
    """Guards a cache that was filled by the base model before conversion."""
    model = tiny_llama()
    ids = torch.tensor([[BOS, 5, 6]])
    cache = model(input_ids=ids).past_key_values
    route_everywhere(model)
    with pytest.raises(RouteError, match="DynamicCache with a past"):
        model(input_ids=ids, past_key_values=cache)


def test_options_beside_a_cache_or_without_one_are_refused():
    """Guards options that generate would have to ignore."""
    model = model_for(tiny_llama)
    options = RoutingOptions(keep_bias=0.0)
    for other in ({"past_key_values": RoutedCache(model.config)}, {"use_cache": False}):
        with pytest.raises(RouteError, match="options live on the cache"):
            model.generate(**requests(model), routing_options=options, **other)


def test_uncached_generation_without_markers_is_refused():
    """Guards decisions: without markers, generated tokens would count as question."""
    model = model_for(tiny_llama)
    model.roe_config.markers = None
    with pytest.raises(RouteError, match="turn markers"):
        model.generate(**requests(model), use_cache=False)


def test_embeddings_without_ids_are_refused():
    """Guards spans: they are read from token ids."""
    model = model_for(tiny_llava)
    with pytest.raises(RouteError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32))


# The layer alone.


def keys_of(rows, tokens, first=0):
    """Row r's token t is 100 r + t, for one head of size one."""
    return (100.0 * torch.tensor(rows)[:, None] + torch.arange(first, first + tokens))[:, None, :, None]


def filled(keep, tokens=3, inner=None):
    layer = RoutedCacheLayer(inner or DynamicLayer())
    layer.set_keep(torch.tensor(keep))
    kept = [row for row, keeps in enumerate(keep) if keeps]
    if kept:
        layer.update(keys_of(kept, tokens), -keys_of(kept, tokens))
    else:
        layer.skip(tokens)
    return layer


def rows_in(layer):
    return [] if layer.keys is None else (layer.keys[:, 0, 0, 0] // 100).int().tolist()


def test_length_counts_tokens_run_or_skipped():
    """Guards positions: transformers asks layer 0 how long the past is, whoever ran it."""
    layer = RoutedCacheLayer(DynamicLayer())
    assert (layer.get_seq_length(), layer.is_initialized, layer.get_mask_sizes(4)) == (0, False, (4, 0))
    layer.skip(4)
    assert (layer.get_seq_length(), layer.is_initialized, layer.get_mask_sizes(1)) == (4, True, (5, 0))
    assert filled([True, False]).get_seq_length() == filled([False, False]).get_seq_length() == 3


@pytest.mark.parametrize(
    ("keep", "indices"),
    [
        ([True, False, True, True], [2, 2, 1, 0]),
        ([True, False, True, True], [1, 1, 1, 1]),
        ([False, True], [1, 1, 0, 1]),
        ([False, False], [1, 0]),
        ([True, True], [1, 0]),
    ],
)
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
def test_rows_move_with_their_decision(keep, indices, how):
    """Guards the row map: after any selection each kept row's slot holds its own keys and values."""
    layer = filled(keep)
    getattr(layer, how)(torch.tensor(indices))
    assert layer.keep.tolist() == [keep[i] for i in indices]
    assert rows_in(layer) == [i for i in indices if keep[i]]
    if layer.keys is not None:
        assert torch.equal(layer.values, -layer.keys)
    if not layer.all_keep and layer.any_keep:
        assert layer.kept_rows.tolist() == [row for row, i in enumerate(indices) if keep[i]]
        assert layer.skipped_rows.tolist() == [row for row, i in enumerate(indices) if not keep[i]]
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("keep", [[True, False, True], [True, True], [False, False]])
def test_repeating_rows_repeats_each_in_place(keep):
    """Guards returned sequences and contrastive use: row i becomes rows 2i and 2i + 1."""
    layer = filled(keep)
    layer.batch_repeat_interleave(2)
    assert layer.keep.tolist() == [keeps for keeps in keep for _ in range(2)]
    assert rows_in(layer) == [row for row, keeps in enumerate(keep) if keeps for _ in range(2)]


def test_unrouted_layers_move_like_the_base_s():
    """Guards layers without a decision: every row is there."""
    layer = RoutedCacheLayer(DynamicLayer())
    layer.batch_repeat_interleave(2)  # nothing yet
    layer.update(keys_of([0, 1], 2), keys_of([0, 1], 2))
    layer.batch_repeat_interleave(2)
    assert rows_in(layer) == [0, 0, 1, 1]
    layer.reorder_cache(torch.tensor([3, 0]))
    assert rows_in(layer) == [1, 0]


def test_a_skipped_sliding_layer_advances_its_window():
    """Guards Gemma-like models: masks come from the inner layer's own counter, run or skipped."""
    skipped = filled([False, False], 3, DynamicSlidingWindowLayer(sliding_window=4))
    plain, ran = DynamicSlidingWindowLayer(sliding_window=4), filled([True], 3, DynamicSlidingWindowLayer(4))
    plain.update(keys_of([0], 3), keys_of([0], 3))
    for first in range(3, 7):
        for query in (1, 2):
            assert skipped.get_mask_sizes(query) == ran.get_mask_sizes(query) == plain.get_mask_sizes(query)
        skipped.skip(1)
        plain.update(keys_of([0], 1, first), keys_of([0], 1, first))
        keys, _ = ran.update(keys_of([0], 1, first), keys_of([0], 1, first))
        assert keys.shape[-2] <= 4
        assert skipped.get_seq_length() == ran.get_seq_length() == first + 1
    assert skipped.is_sliding
    assert skipped.get_max_length() == 4


def test_reset_forgets_keys_length_and_route():
    """Guards reuse of one cache for the next request."""
    for inner in (DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)):
        layer = filled([True, False], 3, inner)
        layer.reset()
        assert (layer.get_seq_length(), layer.is_initialized, layer.keep) == (0, False, None)
        layer.set_keep(torch.tensor([False, True]))
        keys, _ = layer.update(keys_of([1], 2), keys_of([1], 2))
        assert keys.shape[-2] == 2


def test_crop_is_refused():
    """Guards against assisted decoding by another door."""
    assert not RoutedCacheLayer.is_croppable
    with pytest.raises(RouteError, match="assisted"):
        filled([True]).crop(-1)


@torch.no_grad()
def test_a_cache_knows_its_route_from_the_prefill_on():
    """Guards what engines read: None before, bool [B, L] after, unrouted layers kept, options on the cache."""
    model = model_for(tiny_llama, num_unrouted_layers=2)
    route = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    cache = RoutedCache(model.config, RoutingOptions(route=route))
    assert cache.route is None
    assert cache.num_bytes == 0
    model(**requests(model), past_key_values=cache)
    assert torch.equal(cache.route, route)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(cache.route, route[[2, 2, 0]])
    cache.reset()
    assert cache.route is None
