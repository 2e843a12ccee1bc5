"""The three sides of a benchmark: a dense model, the same one routed, and the static twin of a route.

The twin is the model with the skipped layers physically replaced by their adapters: nothing decides, nothing is
selected, nothing is stored for them. For a fixed route it is the best that skipping can do. All sides share weights.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from routing_experts.config import RoEConfig
from routing_experts.models.convert import convert, revert
from routing_experts.models.families import family_of
from routing_experts.nn.adapter import skip_path


class AdapterLayer(nn.Module):
    """What is left of a decoder layer that nobody runs: its norm and its adapter."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.skip_down, self.skip_up = layer.input_layernorm, layer.skip_down, layer.skip_up

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The skip path."""
        return skip_path(hidden_states, self.input_layernorm(hidden_states), self.skip_down, self.skip_up)


@dataclass(frozen=True)
class Sides:
    """Models of the same weights."""

    dense: Any
    routed: Any


def random_sides(shape: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Sides:
    """A Llama of random weights, dense and routed in every layer but the first.

    Args:
        shape: LlamaConfig's keywords.
        dtype, device: of the weights.
        seed: of the weights.
    """
    config = LlamaConfig(**shape)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        dense = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    routed = shared_copy(dense)
    convert(routed, RoEConfig(adapter_init="xavier"))
    return Sides(dense, routed)


def real_sides(routed: Any) -> Sides:
    """A routed model, and the same weights without routing."""
    return Sides(revert(shared_copy(routed)), routed)


def twin_of(routed: Any, route_L: Tensor, adapters: bool = True) -> Any:
    """The static twin of a route, whose skipped layers are all routed ones; without ``adapters`` nothing is left."""
    twin = shared_copy(routed)
    skipped = (~route_L).nonzero()[:, 0].tolist()
    layers: Any = family_of(twin).decoder_layers(twin)
    remnants = {index: AdapterLayer(layers[index]) for index in skipped}
    revert(twin)
    number = 0
    for index, layer in enumerate(layers):
        if index in remnants:
            layers[index] = remnants[index]
        else:
            layer.self_attn.layer_idx = number  # the cache asks its first layer how long the past is
            number += 1
    if not adapters:
        _forget(twin.config.get_text_config(decoder=True), layers, skipped)
    return twin


def _forget(config: Any, layers: Any, skipped: Sequence[int]) -> None:
    """Takes layers out of a decoder and out of what its configuration says of each."""
    for index in reversed(skipped):
        del layers[index]
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index not in skipped]


def shared_copy(model: Any) -> Any:
    """A model of its own modules on the same weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
