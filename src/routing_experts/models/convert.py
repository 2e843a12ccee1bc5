"""Conversion of a base model into a routed one, and back."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from routing_experts.config import BaseModel, RoEConfig, TurnMarkers
from routing_experts.errors import ConfigError, ModelFamilyError
from routing_experts.models.checkpoint import fingerprint
from routing_experts.models.families import family_of
from routing_experts.models.layer import routed_layer_class
from routing_experts.models.model import initial_routing_tokens, set_model_class
from routing_experts.nn.adapter import make_adapter
from routing_experts.nn.router import make_router

ATTENTION = ("sdpa", "eager")


def is_routed(model: Any) -> bool:
    """Whether ``convert`` has been applied to the model."""
    return getattr(type(model), "is_routing_experts_model", False)


def base_model_of(model: Any) -> BaseModel:
    """What identifies the base model that RoE parts belong to."""
    text = model.config.get_text_config(decoder=True)
    return BaseModel(
        model_type=model.config.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        name_or_path=str(getattr(model, "name_or_path", "") or ""),
    )


def convert(model: Any, config: RoEConfig | None = None, markers: TurnMarkers | None = None, seed: int = 0) -> Any:
    """Gives every routed decoder layer an adapter and a router, in place; the base weights are untouched.

    Args:
        model: a transformers model of a registered family.
        config: the method's settings; defaults for None. Its ``base`` is filled in.
        markers: how prompts mark their turns (``data.markers.find_markers(processor)``); needed for dialogues of
            several turns.
        seed: of the new parameters' initialisation.

    Returns:
        The same model object, now routed.

    Raises:
        ModelFamilyError: if the family is unknown, the model is converted already, or its attention takes no mask.
        ConfigError: if ``routed_layers`` does not fit the model.
    """
    family = family_of(model)
    if is_routed(model):
        raise ModelFamilyError(
            "the model is routed already: a second conversion would lose its routers. Revert it first."
        )
    if any("forward" in vars(module) for module in (model, *family.decoder_layers(model))):
        raise ModelFamilyError(
            "the model's forward was replaced on the instance (device_map over several devices, offloading, a patch): "
            "it would hide the routed one. Load the model onto one device without device_map."
        )
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in ATTENTION:
        raise ModelFamilyError(
            f"attention implementation {attention!r}: routing tokens need a mask of their own, which it does not take. "
            f"Load the model with attn_implementation='sdpa' (supported: {', '.join(ATTENTION)})."
        )
    base = replace(base_model_of(model), fingerprint=fingerprint(model))
    config = replace(config or RoEConfig(), base=base)
    if markers is not None:
        config = replace(config, markers=markers)
    hidden_size = base.hidden_size
    config = replace(config, bottleneck_size=config.bottleneck_size or max(1, hidden_size // 4))
    layers = family.decoder_layers(model)
    routed = config.layers_to_route(len(layers))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, layer in enumerate(layers):
            base_class: Any = type(layer)
            layer.__class__ = routed_layer_class(base_class)
            if index in routed:
                _add_parts(layer, hidden_size, config)
        like = next(layers[0].parameters())
        tokens = initial_routing_tokens(hidden_size, config.routing_token_std)
        model.routing_tokens = nn.Parameter(tokens.to(device=like.device, dtype=_float_dtype(model)))
    set_model_class(model)
    model.roe_config = config
    return model


def retarget(model: Any, config: RoEConfig) -> Any:
    """Gives a routed model other settings to be trained on with; its parts stay, what calibration found goes.

    Args:
        model: routed.
        config: its layers and width must be those that the model's parts were made for.

    Raises:
        ConfigError: if they are not.
    """
    old: RoEConfig = model.roe_config
    num_layers = len(family_of(model).decoder_layers(model))
    for name, has, wanted in (
        ("routed layers", old.layers_to_route(num_layers), config.layers_to_route(num_layers)),
        ("bottleneck_size", old.bottleneck_size, config.bottleneck_size or old.bottleneck_size),
    ):
        if has != wanted:
            raise ConfigError(
                f"{name}: the model was made with {has}, the recipe asks for {wanted}. Give the recipe's `roe` the "
                "model's, or start from the base model."
            )
    kept = {"base": old.base, "markers": old.markers, "bottleneck_size": old.bottleneck_size}
    model.roe_config = replace(config, **kept)  # type: ignore[arg-type]
    return model


def revert(model: Any) -> Any:
    """Takes the RoE parts out again, in place: the base model's class and state dict, as before ``convert``.

    Raises:
        ModelFamilyError: if the model is not routed.
    """
    if not is_routed(model):
        raise ModelFamilyError(f"{type(model).__name__} is not routed: there is nothing to revert. Convert it first.")
    if model.roe_config.stripped:
        raise ModelFamilyError(
            "a static model whose layers are gone: there is no base model to go back to. Load the one it was made of."
        )
    for layer in family_of(model).decoder_layers(model):
        base_class: Any = type(layer).__base__
        layer.__class__ = base_class
        for name in ("skip_down", "skip_up", "router"):
            if name in layer._modules:
                delattr(layer, name)
    del model.routing_tokens, model.roe_config
    model.__class__ = type(model).__base__
    return model


def _add_parts(layer: nn.Module, hidden_size: int, config: RoEConfig) -> None:
    assert config.bottleneck_size is not None
    # A quantised layer's matrices are integers, but its norms keep the precision that hidden states have.
    like = next(parameter for parameter in layer.parameters() if parameter.dtype.is_floating_point)
    down, up = make_adapter(hidden_size, config.bottleneck_size, config.adapter_init)
    parts = {"skip_down": down, "skip_up": up, "router": make_router(hidden_size)}
    for name, module in parts.items():
        layer.add_module(name, module.to(device=like.device, dtype=like.dtype))


def _float_dtype(model: Any) -> torch.dtype:
    return model.dtype if model.dtype.is_floating_point else torch.float32
