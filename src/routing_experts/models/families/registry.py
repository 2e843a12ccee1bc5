"""The registry itself: declaration, duplicates refused, names listable."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from routing_experts.errors import ModelFamilyError

_BUILT_IN = ("idefics3", "llama", "llava", "llava_hr", "qwen2_5_vl", "smolvlm")
_REGISTERED: dict[str, "Family"] = {}


def _never(config: Any) -> bool:
    """Towers stay as they are, in most families."""
    return False


@dataclass(frozen=True)
class Family:
    """What routing must know of a model type.

    Attributes:
        model_type: transformers' name of it.
        image_token_attributes: the config's attributes that hold ids of visual tokens; none for text models.
        auto_class: the transformers auto class that loads it.
        uses_mrope: whether a picture's tokens have positions by time, height and width (M-RoPE), which the inner
            model's ``get_rope_index`` finds; they cannot be counted from the mask then.
        package: that brings the family where transformers lacks it. Its module ``configuration`` says in ``MODELS``,
            by auto class and configuration, which class of its module ``modeling`` is loaded. To be registered before
            transformers' auto classes are imported, which are told of it then.
        picture_shape: of one picture's pixel values, by the configuration, where a tuned tower's memory is estimated.
        tunes_tower: whether a model of this configuration was published with a tower that is tuned with the rest.
        description: one line for ``roe families`` and error messages.
    """

    model_type: str
    image_token_attributes: tuple[str, ...] = ()
    auto_class: str = "AutoModelForImageTextToText"
    uses_mrope: bool = False
    package: str = ""
    picture_shape: Callable[[Any], tuple[int, ...]] | None = None
    tunes_tower: Callable[[Any], bool] = _never
    description: str = ""

    def own_models(self) -> dict[str, dict[type, str]]:
        """The names of its own classes by auto class and configuration; none for families of transformers."""
        if not self.package:
            return {}
        models: dict[str, dict[type, str]] = importlib.import_module(f"{self.package}.configuration").MODELS
        return models

    def own_class(self, name: str) -> type:
        """A class of its own by its name."""
        found: type = getattr(importlib.import_module(f"{self.package}.modeling"), name)
        return found

    def image_token_ids(self, config: Any) -> tuple[int, ...]:
        """The ids that stand for visual features in a prompt."""
        return tuple(int(getattr(config, name)) for name in self.image_token_attributes)

    def decoder_layers(self, model: Any) -> nn.ModuleList:
        """The decoder's layers, in order."""
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        found = [
            module
            for module in model.get_decoder().modules()
            if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ]
        if not found:
            raise ModelFamilyError(
                f"a {self.model_type} model whose decoder has no list of {num_layers} layers: its shape is not the one "
                "that transformers gives it. Load it with transformers' own class."
            )
        return found[0]


def register(family: Family) -> None:
    """Adds a family.

    Raises:
        ModelFamilyError: if its model type is registered already.
    """
    if family.model_type in _REGISTERED:
        raise ModelFamilyError(
            f"family {family.model_type!r} is registered already: a second one would silently replace it. "
            "Remove one of the two registrations."
        )
    _REGISTERED[family.model_type] = family


def known_families() -> dict[str, Family]:
    """All families by model type, the built-in ones loaded on first use."""
    for name in _BUILT_IN:
        importlib.import_module(f"routing_experts.models.families.{name}")
    return dict(sorted(_REGISTERED.items()))


def family_of(model: Any) -> Family:
    """The family of a transformers model.

    Raises:
        ModelFamilyError: if it is not a transformers model, or its type is not registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    families = known_families()
    if model_type not in families:
        raise ModelFamilyError(
            f"model type {model_type!r} of {type(model).__name__}: routing knows the families {', '.join(families)}. "
            "Register another with routing_experts.models.families.register(Family(model_type=..., ...)), or, if the "
            "model is wrapped (DDP, PEFT), convert the inner model first and wrap it then."
        )
    return families[model_type]
