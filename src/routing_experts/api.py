"""The Python interface's few functions that join rooms: conversion and saving with a processor, the pocket model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from routing_experts.config import RoEConfig
from routing_experts.data.markers import find_markers
from routing_experts.errors import ModelFamilyError
from routing_experts.models.convert import convert as convert_model
from routing_experts.models.convert import is_routed
from routing_experts.models.load import load_base, load_processor


def convert(
    model: Any,
    config: RoEConfig | None = None,
    processor: Any = None,
    prompt_format: str = "chat_template",
    seed: int = 0,
) -> Any:
    """Gives every routed decoder layer of a model an adapter and a router, in place.

    Args:
        model: a transformers model of a registered family (``roe families``).
        config: the method's settings; the default preset for None.
        processor: the model's; from it the turns of dialogues are found. Without it a prompt counts as one question.
        prompt_format: ``chat_template`` or ``vicuna_v1``.
        seed: of the new parameters.

    Returns:
        The same model object, routed. Until it is trained its fresh skip paths are identities.

    Raises:
        ModelFamilyError: if the family is unknown, or the model is converted already.
        ConfigError: if ``routed_layers`` does not fit the model.
    """
    markers = find_markers(processor, prompt_format) if processor is not None else None
    config = replace(config or RoEConfig(), prompt_format=prompt_format)
    return convert_model(model, config, markers, seed)


def save_pretrained(model: Any, folder: str | Path, processor: Any = None, base_weights: bool = True) -> None:
    """Writes a routed model's folder; with ``base_weights=False`` the RoE parts alone.

    Raises:
        ModelFamilyError: if the model is not routed.
        CheckpointError: for RoE parts alone of a base that was tuned since conversion.
    """
    if not is_routed(model):
        raise ModelFamilyError(
            f"{type(model).__name__} is not routed: there are no RoE parts to write. Convert it, or call its own "
            "save_pretrained."
        )
    model.save_pretrained(folder, base_weights=base_weights)
    if processor is not None:
        processor.save_pretrained(folder)


def load_pocket() -> tuple[Any, Any]:
    """The pocket model that ships with the package, and its processor: a trained LLaVA of two million parameters."""
    return load_base("pocket"), load_processor("pocket")
