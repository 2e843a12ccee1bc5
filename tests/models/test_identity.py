"""Contract 1: routers that keep every layer give the base model, and reverting gives it back."""

import copy

import pytest
import torch

from routing_experts.models.convert import convert, is_routed, revert
from routing_experts.models.options import KEEP_ALL, SKIP_ALL, RoutingOptions
from tiny import GREEDY, batch_of, context_of, for_generate, prompt, real_logits, route_everywhere

# Finite, so that the routers are asked and routing tokens travel: an infinite bias needs neither.
TWO_CALL = RoutingOptions(keep_bias=1e4, layout="two_call")
FUSED = RoutingOptions(keep_bias=1e4, layout="fused")
SKIPPING = RoutingOptions(keep_bias=-1e4, layout="two_call")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def requests(build, side="left", dtype=torch.float32):
    images = (1, 2, 0) if build.__name__ == "tiny_llava" else (0, 0, 0)
    return batch_of([prompt(i, images=n, words=3 + i) for i, n in enumerate(images)], side, dtype)


@torch.no_grad()
def outputs_of(model, batch, options=None):
    """Logits, greedy tokens with their logits, and beams, of base and routed models alike."""
    routed = {"routing_options": options} if options else {}
    found = {"forward": model(**batch, **routed).logits}
    both = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    greedy = model.generate(**for_generate(batch), **both, **routed)
    found |= {"tokens": greedy.sequences, "scores": torch.stack(greedy.logits)}
    found["beams"] = model.generate(**for_generate(batch), **GREEDY, num_beams=3, num_return_sequences=2, **routed)
    return found


@pytest.mark.parametrize("layout", ["two_call", "fused"])
def test_skipping_changes_the_output(build, layout):
    """Guards the tests below: were skipping without effect, identity would be empty."""
    model, batch = build(), requests(build)
    before = model(**batch).logits
    route_everywhere(model)
    for options in (SKIPPING, RoutingOptions(route=torch.tensor([1, 1, 0, 1, 1]).bool())):
        options = RoutingOptions(options.route, options.keep_bias, layout)
        assert (model(**batch, routing_options=options).logits - before).abs().max() > 0.1


@DTYPES
@ATTENTIONS
def test_all_keep_is_bitwise_the_base(build, dtype, attention):
    """Guards the two-call layout: forward, generate and beams of the same object, before and after conversion."""
    model, batch = build(dtype=dtype, attention=attention), requests(build, dtype=dtype)
    before = outputs_of(model, batch)
    route_everywhere(model, num_unrouted_layers=0)
    after = outputs_of(model, batch, TWO_CALL)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_routers_that_keep_by_themselves_are_bitwise_the_base(build, side):
    """Guards against identity that only the option's infinite bias gives: here each router says keep."""
    model, batch = build(), requests(build, side)
    before = model(**batch).logits
    route_everywhere(model, num_unrouted_layers=0)
    chosen = context_of(model, batch)
    skipping = model(**batch, routing=chosen).logits
    margins = [logits[..., 0] - logits[..., 1] for logits in chosen.logits.values()]
    assert min(margin.min() for margin in margins) < 0
    assert not torch.equal(skipping, before)
    model.roe_config.keep_bias, model.roe_config.layout = 1e4, "two_call"
    assert torch.equal(model(**batch).logits, before)


@ATTENTIONS
@pytest.mark.parametrize("side", ["left", "right"])
def test_all_keep_fused_is_the_base_within_rounding(build, attention, side):
    """Guards the fused layout: another matrix shape rounds otherwise, but nothing else may differ."""
    model, batch = build(attention=attention), requests(build, side)
    before = model(**batch).logits
    route_everywhere(model, num_unrouted_layers=0)
    after = model(**batch, routing_options=FUSED).logits
    scale = before.abs().max().item()
    for one, other in zip(real_logits(before, batch), real_logits(after, batch), strict=True):
        assert (one - other).abs().max() <= 5e-6 * max(1.0, scale)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layouts_agree_where_layers_are_skipped(build, attention):
    """Guards the fused layout against the reference: same routes, same router logits, same outputs."""
    model = route_everywhere(build(attention=attention), seed=1)
    batch = batch_of([prompt(i, images=i % 3 if hasattr(model.config, "image_token_id") else 0) for i in range(6)])
    contexts = {name: context_of(model, batch, RoutingOptions(layout=name)) for name in ("two_call", "fused")}
    logits = {name: model(**batch, routing=context).logits for name, context in contexts.items()}
    two_call, fused = contexts["two_call"], contexts["fused"]
    assert any(keep.any() and not keep.all() for keep in two_call.keep.values())
    for layer, keep in two_call.keep.items():
        assert torch.equal(keep, fused.keep[layer])
        assert torch.allclose(two_call.logits[layer], fused.logits[layer], atol=5e-5)
    for one, other in zip(real_logits(logits["two_call"], batch), real_logits(logits["fused"], batch), strict=True):
        assert torch.allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("layout", ["two_call", "fused"])
@pytest.mark.parametrize("options", [{"keep_bias": float("inf")}, {"skip_ratio": 0}], ids=["bias", "ratio"])
def test_a_request_for_all_layers_is_bitwise_the_base(build, options, layout):
    """Guards the dense end of the dial in either layout: forward, generate and beams, without routing tokens."""
    model, batch = build(), requests(build)
    before = outputs_of(model, batch)
    route_everywhere(model, num_unrouted_layers=0)
    after = outputs_of(model, batch, RoutingOptions(layout=layout, **options))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_an_infinite_bias_decides_as_a_large_one_without_asking_a_router(build):
    """Guards the short way for both infinities against the routers' own way; of single options and of rows."""
    model, batch = route_everywhere(build()), requests(build)
    for options, large in ((KEEP_ALL, TWO_CALL), (SKIP_ALL, SKIPPING)):
        short, long = context_of(model, batch, options), context_of(model, batch, large)
        rows = context_of(model, batch, RoutingOptions(keep_bias=torch.full((3,), options.keep_bias)))
        outputs = [model(**batch, routing=context).logits for context in (short, rows, long)]
        assert (len(short.logits), len(rows.logits), len(long.logits)) == (0, 0, 4)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def test_a_forced_all_keep_route_is_bitwise_the_base(build):
    """Guards the path without routing tokens, which forced routes take in either layout."""
    model, batch = build(), requests(build)
    before = model(**batch).logits
    route_everywhere(model)
    for layout in ("two_call", "fused"):
        options = RoutingOptions(route=torch.ones(5, dtype=torch.bool), layout=layout)
        assert torch.equal(model(**batch, routing_options=options).logits, before)


def test_revert_restores_the_base(build):
    """Guards reversibility: classes, parameters by name and value, module tree, and what the model computes."""
    model, batch = build(), requests(build)
    classes = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, config = set(vars(model)), copy.deepcopy(model.config.to_dict())
    before = model(**batch).logits
    route_everywhere(model)
    assert list(model.state_dict()) != list(state)
    assert revert(model) is model
    assert not is_routed(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config
    assert torch.equal(model(**batch).logits, before)


def test_conversion_leaves_names_and_base_weights(build):
    """Guards what transformers and accelerate match on: class names, keys, values, ``architectures``."""
    model = build()
    named = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    architectures = model.config.architectures
    route_everywhere(model)
    for name, module in model.named_modules():
        if name in named:
            for label in ("__name__", "__qualname__", "__module__"):
                assert getattr(type(module), label) == getattr(named[name], label)
    new = set(model.state_dict()) - set(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    parts = ("routing_tokens", "skip_down", "skip_up", "router")
    assert new
    assert all(any(part in key.split(".") for part in parts) for key in new)
    assert model.config.architectures == architectures
    assert isinstance(model, named[""])


def test_saved_base_keys_and_architectures_are_the_base_s(build, tmp_path):
    """Guards key conversion on saving: a renamed class once saved ``lm_head.weight`` under another name."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    model = build()
    model.save_pretrained(tmp_path / "base")
    convert(model)
    type(model).__base__.save_pretrained(model, tmp_path / "routed")
    base = load_file(tmp_path / "base" / "model.safetensors")
    routed = load_file(tmp_path / "routed" / "model.safetensors")
    assert set(base) <= set(routed)
    assert all(torch.equal(base[name], routed[name]) for name in base)
    written = [AutoConfig.from_pretrained(tmp_path / name).architectures for name in ("base", "routed")]
    assert written[0] == written[1]


def test_fresh_zero_adapters_make_every_skip_an_identity(build):
    """Guards the zero initialisation at the level of the model: skipping routed layers removes them."""
    model, batch = build(), requests(build)
    convert(model)
    skipped = model(**batch, routing_options=SKIP_ALL, output_hidden_states=True).hidden_states
    for layer in range(2, 5):
        assert torch.equal(skipped[layer], skipped[1])


def test_conversion_is_reproducible_and_leaves_the_global_generator(build):
    """Guards seeds: the same seed, the same parts; and converting draws nothing from the caller's generator."""
    first, second, third = (convert(build(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["routing_tokens"], third["routing_tokens"])
    model = build()
    before = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_keep_all_constant_keeps_all(build):
    """Guards the exported constants' meaning."""
    model, batch = route_everywhere(build()), requests(build)
    for options, expected in ((KEEP_ALL, True), (SKIP_ALL, False)):
        context = context_of(model, batch, options)
        model(**batch, routing=context)
        assert all(bool((keep == expected).all()) for keep in context.keep.values())
