"""The dialogue cache against a slow textbook twin that knows no cache, no mask and no batch.

In the twin every layer makes keys and values of every token from what enters it, whatever the token's turn does with
the layer; each token then takes the layer or the adapter as its own turn's route says.
"""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from routing_experts.errors import RouteError
from routing_experts.models.convert import convert
from routing_experts.models.dialogue import DialogueCache
from routing_experts.models.families import family_of
from routing_experts.models.options import KEEP_ALL, RoutingOptions
from tiny import (
    ANSWER,
    BOS,
    END,
    GREEDY,
    HEAD_SIZE,
    IMAGE,
    KEY_VALUE_HEADS,
    NUM_LAYERS,
    TOKENS_PER_IMAGE,
    USER,
    route_everywhere,
    text_config,
    tiny_llama,
    tiny_llava,
)

TOLERANCE = 1e-5  # models run in float64, but generate's logits are float32, and so is eager attention's softmax
LAYOUTS = pytest.mark.parametrize("layout", ["two_call", "fused"])
ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
ROUTES = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()


@dataclass
class Told:
    """A dialogue with what a test needs to know of each token, from how it was put together."""

    ids: list[int] = field(default_factory=list)
    call: list[int] = field(default_factory=list)  # the turn whose prefill or decoding ran the token
    part: list[str] = field(default_factory=list)  # "context", "question 1", …, "answer"
    logits: list[torch.Tensor] = field(default_factory=list)  # where tokens were generated
    routes: list[list[bool]] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)

    def say(self, ids, part):
        self.ids += ids
        self.part += [part] * len(ids)


def converse(model, images=(0, 0, 0), options=None, cache=None, seed=0):
    """A dialogue through one cache: a turn an entry of ``images``, its number of pictures."""
    generator = torch.Generator().manual_seed(seed)
    cache, told = DialogueCache(model.config) if cache is None else cache, Told()
    for turn, count in enumerate(images):
        words = torch.randint(3, 50, (3 + turn,), generator=generator).tolist()
        picture = [IMAGE] * (TOKENS_PER_IMAGE * count)
        if turn == 0:
            told.say([BOS], "context")
            told.say([USER, *picture], "context" if picture else "question 0")
        else:
            told.say([END], "answer")  # as a chat template would behind an answer that was cut off
            told.say([USER, *picture], f"question {turn}")
            cache.open_turn(torch.tensor([told.ids + words + list(ANSWER)]))
        told.say([*words, *ANSWER], f"question {turn}")
        if options:
            cache.options = options[turn]
        new = torch.randn(count, 3, 16, 16, generator=generator, dtype=model.dtype)
        told.pictures.append(new)
        out = model.generate(
            torch.tensor([told.ids]),
            attention_mask=torch.ones(1, len(told.ids)).long(),  # padding's id may have been generated
            **({"pixel_values": new} if count else {}),
            **GREEDY,
            past_key_values=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        told.say(out.sequences[0, len(told.ids) :].tolist(), "answer")
        told.call += [turn] * (cache.get_seq_length() - len(told.call))
        told.logits.append(torch.stack(out.logits)[:, 0])
        told.routes.append(cache.route[0].tolist())
    return told


class Twin:
    """The slow computation, on a routed Llama decoder in float64."""

    def __init__(self, model, told, forced=False):
        self.model, self.told, self.forced = model, told, forced
        held = len(told.call)
        self.positions, self.call, self.part = torch.arange(held), torch.tensor(told.call), told.part[:held]
        self.turns = range(len(told.routes))
        self.routes = [[] for _ in self.turns]

    def run(self, states):
        """Logits [T, V] from the embeddings [T, D]; ``routes`` afterwards."""
        pairs = [self.model.routing_tokens.clone() for _ in self.turns]
        for index, layer in enumerate(family_of(self.model).decoder_layers(self.model)):
            states, pairs = self.layer(layer, index, states, pairs)
        return self.model.lm_head(self.model.get_decoder().norm(states))

    def layer(self, layer, index, states, pairs):
        keys, values = self.key_values(layer, states, self.positions)
        kept = [self.keeps(layer, index, turn, pairs[turn]) for turn in self.turns]
        for turn in self.turns:
            self.routes[turn].append(kept[turn])
        sees = self.positions[:, None] >= self.positions
        ran = self.block(layer, states, keys, values, sees, self.positions)
        keep = torch.tensor([kept[call] for call in self.call])
        new_pairs = []
        for turn, pair in enumerate(pairs):
            own_keys, own_values = self.key_values(layer, pair, torch.zeros(2).long())
            span = torch.tensor([[p == "context" for p in self.part], [p == f"question {turn}" for p in self.part]])
            sees = torch.cat([span, torch.eye(2).bool()], dim=1)
            both = torch.cat([keys, own_keys]), torch.cat([values, own_values])
            ran_pair = self.block(layer, pair, *both, sees, torch.zeros(2).long())
            new_pairs.append(ran_pair if kept[turn] else self.adapted(layer, pair))
        return torch.where(keep[:, None], ran, self.adapted(layer, states)), new_pairs

    def keeps(self, layer, index, turn, pair):
        if "router" not in layer._modules:
            return True
        if self.forced:
            return self.told.routes[turn][index]
        keep, skip = layer.router.weight @ layer.input_layernorm(pair).flatten()
        return bool(keep > skip)

    def adapted(self, layer, states):
        if "skip_down" not in layer._modules:
            return states
        inner = (layer.input_layernorm(states) @ layer.skip_down.weight.T).clamp_min(0)
        return states + inner @ layer.skip_up.weight.T

    def key_values(self, layer, states, positions):
        normed = layer.input_layernorm(states)
        keys = (normed @ layer.self_attn.k_proj.weight.T).unflatten(-1, (KEY_VALUE_HEADS, HEAD_SIZE))
        values = (normed @ layer.self_attn.v_proj.weight.T).unflatten(-1, (KEY_VALUE_HEADS, HEAD_SIZE))
        return self.turned(keys, positions), values

    def block(self, layer, states, keys, values, sees, positions):
        queries = (layer.input_layernorm(states) @ layer.self_attn.q_proj.weight.T).unflatten(-1, (-1, HEAD_SIZE))
        queries = self.turned(queries, positions)
        repeats = queries.shape[1] // KEY_VALUE_HEADS
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhe,khe->hqk", queries, keys) / math.sqrt(HEAD_SIZE)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        attended = torch.einsum("hqk,khe->qhe", weights, values).flatten(1) @ layer.self_attn.o_proj.weight.T
        states = states + attended
        return states + layer.mlp(layer.post_attention_layernorm(states))

    def turned(self, heads, positions):
        cos, sin = self.model.get_decoder().rotary_emb(heads, position_ids=positions[None])
        cos, sin = cos[0][:, None], sin[0][:, None]
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def embeddings_of(model, told):
    """What enters layer 0 when the whole dialogue is given at once, pictures in place."""
    caught = []
    handle = (
        family_of(model)
        .decoder_layers(model)[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    pictures = torch.cat(told.pictures)
    ids = torch.tensor([told.ids[: len(told.call)]])
    model(ids, **({"pixel_values": pictures} if len(pictures) else {}), routing_options=KEEP_ALL, use_cache=False)
    handle.remove()
    return caught[0][0]


@torch.no_grad()
def assert_is_twin(model, told, forced=False):
    twin = Twin(model, told, forced)
    logits = twin.run(embeddings_of(model, told))
    assert twin.routes == told.routes
    # Each turn's first logits stand at its prompt's last token; its last generated token ran in the turn that followed.
    end = 0
    for turn, generated in enumerate(told.logits):
        end = told.call.count(turn) + end
        expected = logits[end - len(generated) : end]
        assert (generated - expected).abs().max() <= TOLERANCE, turn


def model_for(build, seed=1, attention="sdpa", **routing):
    return route_everywhere(build(dtype=torch.float64, attention=attention), seed=seed, **routing)


@ATTENTIONS
def test_forced_routes_are_the_twin_s(build, attention):
    """Guards keys of skipped layers, for every pair of turns that skip and keep a layer, layer 0 among them."""
    model = model_for(build, attention=attention, num_unrouted_layers=0)
    told = converse(model, (0,) * 4, [RoutingOptions(route=route) for route in ROUTES])
    assert told.routes == ROUTES.tolist()
    assert_is_twin(model, told, forced=True)


@settings(max_examples=6, derandomize=True, database=None)
@given(bits=st.lists(st.integers(0, 2**NUM_LAYERS - 1), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_routes_are_the_twin_s(bits, seed):
    """Guards the same for any routes and lengths of a dialogue."""
    model = model_for(tiny_llama, num_unrouted_layers=0)
    routes = [torch.tensor([bool(b >> layer & 1) for layer in range(NUM_LAYERS)]) for b in bits]
    told = converse(model, (0,) * len(bits), [RoutingOptions(route=route) for route in routes], seed=seed)
    assert_is_twin(model, told, forced=True)


@LAYOUTS
@ATTENTIONS
def test_routers_decide_as_the_twin_s(build, layout, attention):
    """Guards a new turn's routing tokens: their spans, positions and keys, over a past that other routes computed."""
    seen = set()
    for seed, num_unrouted in ((4, 1), (6, 0)):
        model = model_for(build, seed=seed, attention=attention, layout=layout, num_unrouted_layers=num_unrouted)
        images = (1, 0, 0) if build is tiny_llava else (0, 0, 0)
        told = converse(model, images, seed=seed)
        assert_is_twin(model, told)
        seen |= {tuple(map(tuple, told.routes))}
    assert any(len(set(routes)) > 1 for routes in seen)  # or nothing was decided anew


@LAYOUTS
def test_pictures_may_come_in_later_turns(layout):
    """Guards the context, which ends in the first turn, and pictures that are part of a later question."""
    model = model_for(tiny_llava, seed=2, layout=layout)
    for images in ((1, 2, 0), (0, 1, 1)):
        assert_is_twin(model, converse(model, images))


@torch.no_grad()
@LAYOUTS
@pytest.mark.parametrize("images", [(0, 0, 0), (1, 0, 1)])
def test_routers_that_keep_all_are_the_base_model(layout, images):
    """Guards the whole: without skipping, a dialogue turn by turn is the base's own over all of its tokens at once."""
    model = tiny_llava(dtype=torch.float64)
    base = tiny_llava(dtype=torch.float64)
    route_everywhere(model, layout=layout, keep_bias=1e6)
    told = converse(model, images)
    assert all(map(all, told.routes))
    pictures, end = torch.cat(told.pictures), 0
    logits = base(
        torch.tensor([told.ids]), **({"pixel_values": pictures} if len(pictures) else {}), use_cache=False
    ).logits[0]
    for turn, generated in enumerate(told.logits):
        end += told.call.count(turn)
        assert (generated - logits[end - len(generated) : end]).abs().max() <= TOLERANCE


@LAYOUTS
def test_a_turn_runs_its_own_tokens_alone(layout):
    """Guards the saving: no layer sees an earlier turn's token again, and a skipped layer runs no MLP at all."""
    model = model_for(tiny_llama, seed=3, layout=layout, num_unrouted_layers=0)
    cache = DialogueCache(model.config)
    lengths = [[] for _ in range(NUM_LAYERS)]
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: lengths[index].append(args[0].shape[1]))
    told = converse(model, (0, 0, 0), cache=cache)
    steps = GREEDY["max_new_tokens"] - 1
    prompts = [told.call.count(turn) - steps for turn in range(3)]
    assert sum(prompts) + 3 * steps == len(told.call)
    assert not all(map(all, told.routes))
    for index in range(NUM_LAYERS):
        kept = [turn for turn in range(3) if told.routes[turn][index]]
        # Routing tokens run beside a turn's own or behind them, and end before the last layer.
        beside = {2} if layout == "two_call" else {prompts[turn] + 2 for turn in kept}
        ordinary = [length for length in lengths[index] if length not in beside]
        routed = index < NUM_LAYERS - 1
        fused = routed and layout == "fused"
        assert ordinary == [n for turn in kept for n in [prompts[turn]] * (not fused) + [1] * steps]
        assert len(lengths[index]) - len(ordinary) == len(kept) * routed
        assert cache.layers[index].keys.shape[-2] == len(told.call)  # of all tokens, whoever skipped


def test_what_one_dialogue_cannot_do_is_refused():
    """Guards against wrong answers: several rows, beams, a turn in pieces, a turn without news."""
    model = model_for(tiny_llama)
    ids = torch.tensor([[BOS, USER, 5, 6, *ANSWER]])
    with pytest.raises(RouteError, match="2 rows"):
        model.generate(ids.expand(2, -1), **GREEDY, past_key_values=DialogueCache(model.config))
    with pytest.raises(RouteError, match="3 rows"):
        model.generate(ids, **GREEDY, num_beams=3, past_key_values=DialogueCache(model.config))
    cache = DialogueCache(model.config)
    with pytest.raises(RouteError, match="0 tokens"):
        cache.open_turn(ids)
    first = model.generate(ids, **GREEDY, past_key_values=cache)
    with pytest.raises(RouteError, match="open_turn"):
        cache.open_turn(first[:, :-1])
    longer = torch.cat([first, ids], dim=1)
    cache.open_turn(longer)
    with pytest.raises(RouteError, match="all of its new tokens"):
        model(longer[:, -3:], past_key_values=cache)


def test_sliding_windows_are_refused():
    """Guards the context: a window would have forgotten it."""
    config = text_config(sliding_window=4, layer_types=["sliding_attention"] * NUM_LAYERS)
    model = convert(LlamaForCausalLM._from_config(config))
    with pytest.raises(RouteError, match="sliding windows"):
        DialogueCache(model.config)
