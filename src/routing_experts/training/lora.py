"""Low-rank tuning of the base model's decoder layers, through peft."""

from typing import Any

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
