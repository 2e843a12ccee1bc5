"""Low-rank tuning of the base model's decoder layers, through peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from routing_experts.errors import CheckpointError, ConfigError
from routing_experts.models.families import family_of
from routing_experts.optional import need
from routing_experts.training.parameters import ROE_GROUPS, group_of
from routing_experts.training.recipe import LoraSettings


def with_lora(model: Any, settings: LoraSettings) -> Any:
    """Wraps a model so that low-rank updates of its decoder's linear layers train in place of their weights.

    Args:
        model: routed or not.
        settings: a recipe's ``lora``.

    Raises:
        ConfigError: if a target is no linear layer of this decoder.
        MissingExtraError: if peft is not installed.
    """
    peft = need("peft", "lora", "the recipe's `lora`")
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_names(model, settings.targets),
        ),
    )


def is_lora_key(name: str) -> bool:
    """Whether a parameter is one of LoRA's updates."""
    return "lora_" in name


def load_updates(model: Any, folder: Path) -> None:
    """Puts a checkpoint's updates into a model that ``with_lora`` wrapped.

    Raises:
        CheckpointError: if the checkpoint lacks one of them.
    """
    peft = need("peft", "lora", "the recipe's `lora`")
    report = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    missing = [name for name in report.missing_keys if is_lora_key(name)]
    if missing or report.unexpected_keys:
        raise CheckpointError(
            f"{folder} does not hold this recipe's LoRA updates: missing {missing[:4]}, unexpected "
            f"{report.unexpected_keys[:4]}. It belongs to another recipe: give that one, or another output."
        )


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switches dropout off for a while, the updates' and the base's: what a model says of itself, not of a sample.

    Attention draws its own, by a share that it holds and as long as it trains.
    """
    active = [
        module
        for module in model.modules()
        if module.training and (isinstance(module, nn.Dropout) or getattr(module, "attention_dropout", 0.0) != 0.0)
    ]
    for module in active:
        module.training = False  # not its parts': recomputation asks them whether they train
    try:
        yield
    finally:
        for module in active:
            module.training = True


def base_of(model: Any) -> Any:
    """The model inside peft's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_linears(model: Any) -> list[str]:
    """Whole names of the linear modules in the base's decoder layers; vision towers call theirs by the same names."""
    inside = {id(module) for layer in family_of(model).decoder_layers(model) for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and group_of(name) not in ROE_GROUPS
    ]


def target_names(model: Any, targets: tuple[str, ...]) -> list[str]:
    """Those of ``decoder_linears`` that are called as in ``targets``; an outline of the model will do.

    Raises:
        ConfigError: if a target is none of them.
    """
    linear = decoder_linears(model)
    names = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [target for target in targets if target not in names]
    if unknown:
        raise ConfigError(
            f"lora.targets={unknown}: the decoder of this {model.config.model_type} model has no such linear layers. "
            f"Take some of {', '.join(names)}."
        )
    return [name for name in linear if name.rpartition(".")[2] in targets]
