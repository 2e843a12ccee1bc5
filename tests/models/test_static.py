"""Static models: layers that nobody runs are gone, from memory and from the file; the rest is what it was."""

import pytest
import torch
from safetensors import safe_open

from routing_experts.errors import ConfigError, ModelFamilyError, RouteError
from routing_experts.models.checkpoint import save_routed
from routing_experts.models.convert import revert
from routing_experts.models.families import family_of
from routing_experts.models.load import from_pretrained
from routing_experts.models.options import RoutingOptions
from routing_experts.models.static import make_static
from tiny import GREEDY, NUM_LAYERS, batch_of, for_generate, prompt, route_everywhere, tiny_llama, tiny_llava

DROPPED = (1, 3)


def routed(kind=tiny_llava, **settings):
    return route_everywhere(kind(dtype=torch.float64), seed=2, **settings)


def batch(images=1):
    return batch_of([prompt(seed, images=images, words=seed + 2) for seed in range(3)], dtype=torch.float64)


@pytest.mark.parametrize("kind", [tiny_llava, tiny_llama])
def test_it_computes_what_the_forced_route_computed(kind):
    """Logits and cached generation, on rows of different lengths."""
    model, asked = routed(kind), batch(int(kind is tiny_llava))
    route = torch.tensor([index not in DROPPED for index in range(NUM_LAYERS)])
    options = RoutingOptions(route=route)
    with torch.no_grad():
        forced = model(**asked, routing_options=options).logits
        said = model.generate(**for_generate(asked), **GREEDY, routing_options=options)
        make_static(model, DROPPED)
        assert torch.equal(model(**asked).logits, forced)
        assert torch.equal(model.generate(**for_generate(asked), **GREEDY), said)


def test_the_file_and_the_memory_lack_the_dropped_layers(tmp_path):
    model = routed()
    whole = sum(parameter.numel() for parameter in model.parameters())
    make_static(model, DROPPED)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.75 * whole
    save_routed(model, tmp_path / "static")
    with safe_open(tmp_path / "static" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    decoder = [name for name in names if "language_model" in name]
    left = {name.split(f"layers.{index}.")[1] for name in decoder for index in DROPPED if f"layers.{index}." in name}
    assert left == {"input_layernorm.weight"}
    assert sum("self_attn.q_proj" in name for name in decoder) == NUM_LAYERS - len(DROPPED)
    loaded = from_pretrained(tmp_path / "static", dtype=torch.float64)
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_loading_says_nothing_of_weights_that_should_not_be_there(tmp_path, caplog, capsys):
    save_routed(make_static(routed(), DROPPED), tmp_path / "static")
    capsys.readouterr()
    from_pretrained(tmp_path / "static")
    told = capsys.readouterr()
    assert "MISSING" not in told.err + told.out + caplog.text


def test_nothing_decides_and_no_routing_token_travels():
    model = make_static(routed(), DROPPED)
    calls = []
    for index, layer in enumerate(family_of(model).decoder_layers(model)):
        if index not in DROPPED:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
            )
    asked = batch()
    with torch.no_grad():
        cache = model(**asked).past_key_values
    assert set(calls) == {asked["input_ids"].shape[1]}
    assert len(calls) == NUM_LAYERS - len(DROPPED)
    assert [bool(layer.any_keep) for layer in cache.layers] == [index not in DROPPED for index in range(NUM_LAYERS)]


@pytest.mark.parametrize(
    "options", [{"skip_ratio": 0.0}, {"keep_bias": 1.0}, {"route": torch.ones(NUM_LAYERS, dtype=torch.bool)}]
)
def test_a_route_of_one_s_own_is_refused(options):
    model = make_static(routed(), DROPPED)
    with pytest.raises(RouteError, match=r"layers \[1, 3\] are gone for everyone"):
        model(**batch(), routing_options=RoutingOptions(**options))


def test_what_cannot_be_made_static_is_refused():
    with pytest.raises(ConfigError, match="is not routed"):
        make_static(tiny_llava(), DROPPED)
    for dropped in ((0, 1), ()):
        with pytest.raises(ConfigError, match=r"layers \[1, 2, 3, 4\] have adapters"):
            make_static(routed(), dropped)
    model = make_static(routed(), DROPPED)
    with pytest.raises(ConfigError, match="static already"):
        make_static(model, (1,))
    with pytest.raises(ModelFamilyError, match="no base model to go back to"):
        revert(model)
