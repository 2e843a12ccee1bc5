"""Low-rank tuning of the base model's decoder layers, through peft."""

from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.optional import need
from routing_experts.training.recipe import LoraSettings


def with_lora(model: Any, settings: LoraSettings) -> Any:
    """Wraps a model so that low-rank updates of its decoder's linear layers train in place of their weights.

    Args:
        model: routed or not.
        settings: a recipe's ``lora``.

    Raises:
        MissingExtraError: if peft is not installed.
    """
    decoder = r".*(language_model|model)\.layers\.\d+\.(self_attn|mlp)\.(" + "|".join(settings.targets) + ")"
    peft = need("peft", "lora", "the recipe's `lora`")
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=decoder
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
