"""The contracts, on the families whose pictures, positions or module names are not LLaVA's."""

import sys

import pytest
import torch
import transformers

from counting import counting
from routing_experts.errors import ConfigError, ModelFamilyError
from routing_experts.models.auto import loader_class
from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import convert, revert
from routing_experts.models.families import Family, family_of, known_families, register
from routing_experts.models.load import from_pretrained
from routing_experts.models.options import SKIP_ALL, RoutingOptions
from routing_experts.nn.gates import GateSettings
from routing_experts.training.lora import with_lora
from routing_experts.training.parameters import freeze_all_but, group_of
from routing_experts.training.recipe import LoraSettings
from tiny import END, GREEDY, NUM_LAYERS, context_of, prompt, real_logits, route_everywhere
from tiny_families import FAMILIES, family_batch

KEEPING = RoutingOptions(keep_bias=1e4, layout="two_call")  # finite: the routers are asked, routing tokens travel
LAYOUTS = pytest.mark.parametrize("layout", ["two_call", "fused"])
MIXED = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1]]).bool()
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}


@pytest.fixture(params=FAMILIES)
def build(request):
    return FAMILIES[request.param]


def requests(model, side="left", dtype=torch.float32, images=(1, 2, 0), answer=0):
    prompts = [prompt(i, images=n, words=3 + i, answer=answer) for i, n in enumerate(images)]
    return family_batch(model, prompts, side, dtype)


def test_layers_and_picture_tokens_are_found(build):
    """Guards the declarations: the decoder's own layers, never the tower's, and ids that the config gives."""
    model = build()
    family = family_of(model)
    layers = family.decoder_layers(model)
    assert len(layers) == NUM_LAYERS
    assert all(hasattr(layer, "self_attn") and hasattr(layer, "input_layernorm") for layer in layers)
    assert family.image_token_ids(model.config)[0] == model.config.image_token_id
    with pytest.raises(ModelFamilyError, match="registered already"):
        register(Family(family.model_type))


@pytest.mark.parametrize("family", known_families().values(), ids=known_families())
def test_a_family_s_auto_class_gives_a_loader_of_its_model(family):
    """Guards declarations: nothing looks them up before somebody loads such a model."""
    mapping = getattr(transformers, family.auto_class)._model_mapping
    found = mapping[transformers.CONFIG_MAPPING[family.model_type]]
    (base,) = found.__bases__
    assert issubclass(base, transformers.PreTrainedModel)
    assert found is loader_class(base)
    assert base is getattr(sys.modules[found.__module__], found.__name__)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_keep_is_bitwise_the_base_and_skipping_is_not(build, attention):
    """Guards the identity: forward and generate of the same object before and after conversion, and reverting."""
    model = build(attention=attention)
    batch, state = requests(model), {name: value.clone() for name, value in model.state_dict().items()}
    both = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    before, generated = model(**batch).logits, model.generate(**batch, **both)
    several = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    beams = model.generate(**batch, **several)
    route_everywhere(model, num_unrouted_layers=0)
    assert (model(**batch, routing_options=SKIP_ALL).logits - before).abs().max() > 0.1
    assert torch.equal(model(**batch, routing_options=KEEPING).logits, before)
    fused = model(**batch, routing_options=RoutingOptions(keep_bias=1e4, layout="fused")).logits
    for one, other in zip(real_logits(before, batch), real_logits(fused, batch), strict=True):
        assert (one - other).abs().max() <= 5e-6 * before.abs().max()
    kept = model.generate(**batch, **both, routing_options=KEEPING)
    assert torch.equal(kept.sequences, generated.sequences)
    assert torch.equal(torch.stack(kept.logits), torch.stack(generated.logits))
    assert torch.equal(model.generate(**batch, **several, routing_options=KEEPING), beams)
    revert(model)
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(model(**batch).logits, before)


@torch.no_grad()
@LAYOUTS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["random", "straight_through"])
def test_the_hard_mix_is_what_inference_computes(build, layout, side, kind):
    """Guards training's mix: with one-hot weights, drawn or the routers' own, each row gets the hard route's result."""
    model = route_everywhere(build(dtype=torch.float64), seed=1)
    batch = requests(model, side, torch.float64, images=(1, 2, 0, 1, 2, 0), answer=3)
    training = context_of(model, batch, RoutingOptions(layout=layout), gate=GateSettings(kind, bias=0.1))
    mixed = model(**batch, routing=training).logits
    route = torch.ones(6, NUM_LAYERS, dtype=torch.bool)
    for layer, weights in training.weights.items():
        route[:, layer] = weights[:, 1, 0] == 1
    assert any(column.any() and not column.all() for column in route.T)
    options = RoutingOptions(layout=layout) if kind != "random" else RoutingOptions(route=route, layout=layout)
    if kind == "straight_through":  # a bias of the gate is one of the decision
        options = RoutingOptions(keep_bias=0.1, layout=layout)
    inference = context_of(model, batch, options)
    hard = model(**batch, routing=inference).logits
    for layer, keep in inference.keep.items():
        assert torch.equal(keep, route[:, layer])
    for one, other in zip(real_logits(mixed, batch), real_logits(hard, batch), strict=True):
        assert (one - other).abs().max() <= 1e-10


def test_recomputation_gives_the_same_gradients(build):
    """Guards gradient checkpointing, and what reaches routers, adapters, tower and projector."""
    gradients = []
    for checkpointing in (False, True):
        model = route_everywhere(build(dtype=torch.float64), seed=1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = requests(model, "right", torch.float64, answer=2)
        context = context_of(model, batch, gate=GateSettings("softmax"))
        model(**batch, routing=context, use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert {group_of(name) for name in plain} == {"adapters", "routers", "decoder", "projector", "vision"}
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-9, atol=1e-12), name


@torch.no_grad()
@pytest.mark.parametrize("options", [RoutingOptions(), RoutingOptions(route=MIXED)], ids=["decided", "forced"])
def test_a_row_of_a_batch_gets_what_it_gets_alone_with_a_cache_or_without(build, options):
    """Guards pictures by row, positions on a grid behind padding, and decoding over layers that rows skip."""
    model = route_everywhere(build(dtype=torch.float64), seed=5, num_unrouted_layers=0)
    prompts = [prompt(i, images=n, words=3 + 2 * i) for i, n in enumerate((1, 2, 0))]
    batch = family_batch(model, prompts, "left", torch.float64)
    cache = RoutedCache(model.config, options)
    together = model.generate(**batch, **GREEDY, past_key_values=cache)
    assert any(column.any() and not column.all() for column in cache.route.T)
    for row, one in enumerate(prompts):
        single, route = family_batch(model, [one], dtype=torch.float64), RoutingOptions(route=cache.route[row])
        alone = model.generate(**single, **GREEDY, routing_options=options if options.route is None else route)
        assert torch.equal(alone[0, -5:], together[row, -5:])
        assert torch.equal(alone, without_cache(model, single, route))


def without_cache(model, batch, options):
    """Greedy words, each found from the whole sequence anew."""
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(**batch, routing_options=options, use_cache=False).logits[:, -1]
        logits[:, [END, *GREEDY["suppress_tokens"]]] = float("-inf")
        more = {"input_ids": logits.argmax(-1)[:, None], "attention_mask": torch.ones(1, 1, dtype=torch.long)}
        more["mm_token_type_ids"] = torch.zeros(1, 1, dtype=torch.long)
        batch = {name: torch.cat([t, more[name]], 1) if name in more else t for name, t in batch.items()}
    return batch["input_ids"]


@torch.no_grad()
def test_sliding_window_layers_can_be_skipped():
    """Guards layers that get masks of their own kind: identity, and decoding past the window."""
    model = FAMILIES["qwen2_5_vl"](**SLIDING)
    assert len(set(model.config.text_config.layer_types)) == 2
    batch = requests(model)
    before = model(**batch).logits
    route_everywhere(model, num_unrouted_layers=0)
    assert torch.equal(model(**batch, routing_options=KEEPING).logits, before)
    for row, route in enumerate(MIXED):
        single = requests(model, images=(1, 2, 0)[row : row + 1])
        cached = model.generate(**single, **GREEDY, routing_options=RoutingOptions(route=route))
        assert torch.equal(cached, without_cache(model, single, RoutingOptions(route=route)))


@torch.no_grad()
def test_skipped_rows_run_nothing(build):
    """Guards the compute that is saved: prefill and every step run a layer's kept rows, and no others."""
    model = route_everywhere(build(), num_unrouted_layers=0)
    batch = requests(model)
    length = batch["input_ids"].shape[1]
    forced = GREEDY | {"max_new_tokens": 4, "min_new_tokens": 4}
    with counting(model) as calls:
        model.generate(**batch, **forced, routing_options=RoutingOptions(route=MIXED))
    for layer in range(NUM_LAYERS):
        rows = int(MIXED[:, layer].sum())
        for name in ("attention", "mlp"):
            assert calls[layer, name, length] == ([rows] if rows else [])
            assert calls[layer, name, 1] == ([rows] * 3 if rows else [])
    assert {tokens for _, _, tokens in calls} == {length, 1}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_saved_and_loaded_it_computes_the_same(build, dtype, shards, tmp_path):
    """Guards key conversion by family: all weights come back, the RoE parts among them, and so does the route."""
    model = route_everywhere(build(), seed=1)
    for parameter in model.parameters():  # as loading does it; ``to`` would round the rotary table too
        parameter.data = parameter.data.to(dtype)
    batch = requests(model, dtype=dtype)
    before = model(**batch).logits
    model.save_pretrained(tmp_path, **shards)
    assert (len(list(tmp_path.glob("model*.safetensors"))) > 1) == bool(shards)
    loaded = from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(loaded(**batch).logits, before)


def test_every_parameter_is_in_its_group(build):
    """Guards freezing, on the families' real names: what a stage trains is what it says."""
    model = convert(build())
    towers = ("model.visual.", "model.vision_model.", "model.vision_tower.")
    between = ("model.visual.merger.", "model.connector.", "model.multi_modal_projector.")
    between += ("model.vision_tower.fusion_projector.",)  # trained with the projector, from LLaVA-HR's first stage on
    for name, _ in model.named_parameters():
        expected = "decoder"
        if name.startswith(between):
            expected = "projector"
        elif name.startswith(towers):
            expected = "vision"
        elif "skip_" in name:
            expected = "adapters"
        elif "router" in name or name == "routing_tokens":
            expected = "routers"
        assert group_of(name) == expected, name
    counts = freeze_all_but(model, ("vision",))
    assert counts["vision"] > 0
    assert counts["decoder"] == 0
    assert all(freeze_all_but(model, (group,))[group] > 0 for group in ("projector", "decoder", "adapters", "routers"))


def test_lora_takes_the_decoder_s_layers_and_nothing_else(build):
    """Guards targets: towers have ``q_proj`` too, and routers are linear layers of a decoder layer."""
    pytest.importorskip("peft")
    model = convert(build())
    every = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    with pytest.raises(ConfigError, match=r"lora.targets=\['router', 'qkv'\].*o_proj"):
        with_lora(model, LoraSettings(targets=("q_proj", "router", "qkv")))
    wrapped = with_lora(model, LoraSettings(rank=2))
    prefix = "base_model.model."
    got = {
        name.removeprefix(prefix)[: -len(".lora_A")] for name, _ in wrapped.named_modules() if name.endswith("lora_A")
    }
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    named = {"qwen2_5_vl": "language_model", "llava_hr": "language_model"}
    layers = f"model.{named.get(model.config.model_type, 'text_model')}.layers."
    assert got == {name for name in every if name.startswith(layers) and name.endswith(parts)}
    assert len(got) == NUM_LAYERS * 7
