"""A routed model made static: some layers are gone for everyone, their adapters in their place; nothing decides.

What is left of such a layer is its input norm and its adapter. The cache holds nothing for it, no routing tokens
travel, and its attention and MLP are in no file.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from routing_experts.config import RoEConfig
from routing_experts.errors import ConfigError
from routing_experts.models.convert import is_routed
from routing_experts.models.families import family_of

KEPT = ("input_layernorm", "skip_down", "skip_up", "router")
PARTS = ("skip_down", "skip_up", "router")


class Gone(nn.Module):
    """Stands where a module was that nobody calls; its layer is still asked for its place."""

    def __init__(self, was: nn.Module) -> None:
        super().__init__()
        self.layer_idx = getattr(was, "layer_idx", None)


def make_static(model: Any, dropped: Sequence[int]) -> Any:
    """Drops layers for everyone, in place.

    Args:
        model: routed.
        dropped: routed layers, which go; every other layer runs for everyone.

    Raises:
        ConfigError: if the model is not routed, is static already, or a layer has no adapter to stand in for it.
    """
    if not is_routed(model):
        raise ConfigError(f"{type(model).__name__} is not routed: it has no adapters. Give a routed model.")
    config: RoEConfig = model.roe_config
    layers = family_of(model).decoder_layers(model)
    routed = config.layers_to_route(len(layers))
    if config.stripped:
        raise ConfigError(f"the model is static already: its layers {list(routed)} are gone. Give the routed one.")
    lacking = sorted(set(dropped) - set(routed))
    if lacking or not dropped:
        raise ConfigError(
            f"dropping layers {sorted(dropped)}: layers {list(routed)} have adapters. Name some of those."
        )
    for index, layer in enumerate(layers):
        if index not in dropped:
            for name in set(PARTS) & set(layer._modules):
                delattr(layer, name)
    model.roe_config = replace(
        config, gate="static", routed_layers=tuple(sorted(dropped)), keep_bias=0.0, budget=(), stripped=True
    )
    return strip(model)


def strip(model: Any) -> Any:
    """Takes away what the dropped layers of a static model do not need, in place."""
    layers = family_of(model).decoder_layers(model)
    for index in model.roe_config.layers_to_route(len(layers)):
        for name, module in list(layers[index].named_children()):
            if name not in KEPT:
                setattr(layers[index], name, Gone(module))
    return model
