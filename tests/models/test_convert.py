"""Conversion refuses what it cannot do, and leaves the model as it was when it does."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from routing_experts.config import RoEConfig
from routing_experts.errors import ConfigError, ModelFamilyError, RouteError
from routing_experts.models.convert import convert, is_routed, revert
from routing_experts.models.families import Family, known_families, register
from routing_experts.models.options import RoutingOptions, bias_rows, route_rows
from tiny import batch_of, prompt, route_everywhere, tiny_llama, tiny_llava


def test_unknown_family_is_refused():
    """Guards models whose layers were never proved: the message lists the families and the way to add one."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    for model in (gpt2, nn.Linear(2, 2), nn.DataParallel(tiny_llama())):
        with pytest.raises(ModelFamilyError, match="llama, llava"):
            convert(model)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((0, 5), r"Take out \[5\]"), ((-1,), r"Take out \[-1\]"), ((1, 1), "each once"), ((), "at least one layer")],
)
def test_layer_lists_that_do_not_fit_are_refused(layers, expected):
    """Guards ``routed_layers``: out of range, twice, or none; and the model is untouched."""
    model = tiny_llama()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=expected):
        convert(model, RoEConfig(routed_layers=layers))
    assert not is_routed(model)
    assert list(model.state_dict()) == keys


def test_more_unrouted_layers_than_the_model_has_are_refused():
    """Guards the other way to name no layer at all."""
    with pytest.raises(ConfigError, match="at least one layer"):
        convert(tiny_llama(), RoEConfig(num_unrouted_layers=5))


@pytest.mark.parametrize("ratio", [-0.1, 0.51, float("nan")])
def test_target_ratio_outside_its_range_is_refused(ratio):
    """Guards the random warm-up, which cannot skip more than half."""
    with pytest.raises(ConfigError, match="target_skip_ratio"):
        RoEConfig(target_skip_ratio=ratio)


def test_converting_twice_is_refused():
    """Guards trained routers against being replaced by fresh ones."""
    model = route_everywhere(tiny_llava())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelFamilyError, match="already"):
        convert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_reverting_a_base_is_refused():
    """Guards against reverting twice."""
    model = route_everywhere(tiny_llava())
    revert(model)
    with pytest.raises(ModelFamilyError, match="nothing to revert"):
        revert(model)


def test_convert_after_revert_works():
    """Guards the round trip: nothing stays behind that would hinder a second conversion."""
    model = tiny_llava()
    first = route_everywhere(model).state_dict().keys()
    assert route_everywhere(revert(model)).state_dict().keys() == first


def test_flash_attention_is_refused():
    """Guards span masks: FlashAttention would ignore them."""
    model = tiny_llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelFamilyError, match="flash_attention_2"):
        convert(model)
    assert not is_routed(model)


@pytest.mark.parametrize(
    "route",
    [torch.ones(4), torch.ones(6), torch.ones(2, 5), torch.ones(3, 4), torch.ones(3, 5, 1), torch.ones(())],
    ids=lambda route: str(list(route.shape)),
)
def test_routes_of_a_wrong_shape_are_refused(route):
    """Guards against broadcasting a route over the wrong axis."""
    model = route_everywhere(tiny_llava())
    with pytest.raises(RouteError, match="route of shape"):
        model(**batch_of([prompt(i) for i in range(3)]), routing_options=RoutingOptions(route=route.bool()))


def test_routes_that_skip_an_unrouted_layer_are_refused():
    """Guards layers without an adapter, in forward and in generate."""
    model = route_everywhere(tiny_llava())
    batch = batch_of([prompt(0)])
    options = RoutingOptions(route=torch.tensor([False, True, True, True, True]))
    for call, settings in ((model.forward, {}), (model.generate, {"max_new_tokens": 1})):
        with pytest.raises(RouteError, match=r"skips layers \[0\]"):
            call(**batch, **settings, routing_options=options)


@pytest.mark.parametrize("bias", [torch.zeros(2), torch.zeros(0), torch.zeros(3, 1), torch.zeros(1, 3)], ids=str)
def test_keep_biases_of_a_wrong_shape_are_refused(bias):
    """Guards against broadcasting biases over the wrong axis."""
    model = route_everywhere(tiny_llava())
    with pytest.raises(RouteError, match="keep biases of shape"):
        model(**batch_of([prompt(i) for i in range(3)]), routing_options=RoutingOptions(keep_bias=bias))


def test_a_keep_bias_that_is_no_number_is_refused():
    """Guards against comparisons that are all false: they would skip everything."""
    with pytest.raises(RouteError, match="not a number"):
        bias_rows(float("nan"), 2)


def test_routes_repeat_row_by_row():
    """Guards beams: request i's route goes to rows i·n to i·n + n − 1, as generate expands inputs."""
    route = torch.tensor([[1, 0], [0, 1]])
    assert route_rows(route, 4, 2, (0, 1)).int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert route_rows(route[0], 3, 2, (0, 1)).int().tolist() == [[1, 0]] * 3
    assert bias_rows(torch.tensor([1.0, 2.0]), 4).tolist() == [1.0, 1.0, 2.0, 2.0]
    assert bias_rows(0.5, 3).tolist() == [0.5] * 3


def test_only_routed_layers_get_parts():
    """Guards ``routed_layers`` and the bottleneck's default of a quarter."""
    model = convert(tiny_llama(), RoEConfig(routed_layers=(3, 1)))
    with_parts = sorted({int(name.split(".")[2]) for name in model.state_dict() if "skip_down" in name})
    assert with_parts == [1, 3]
    assert model.model.layers[1].skip_down.weight.shape == (8, 32)
    assert model.roe_config.bottleneck_size == 8
    assert model.roe_config.base.model_type == "llama"


def test_the_caller_s_config_is_left_alone():
    """Guards one config used for several models."""
    config = RoEConfig()
    convert(tiny_llama(), config)
    assert (config.base, config.bottleneck_size, config.markers) == (None, None, None)


def test_a_family_cannot_be_registered_twice():
    """Guards the registry against silent replacement."""
    known_families()
    with pytest.raises(ModelFamilyError, match="registered already"):
        register(Family("llava"))
