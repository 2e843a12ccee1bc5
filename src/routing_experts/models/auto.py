"""Routed folders through transformers' auto classes: one loader class a family, standing in for the family's own."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from routing_experts.models.disguise import disguise
from routing_experts.models.families import known_families

_KEY = "is_routing_experts_lookup"
# The tables of names that pipelines look into, by the auto class that they load with.
_PIPELINES = {"AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"}


def register_configs() -> None:
    """Lets transformers read the configurations of families that it lacks. Harmless when repeated."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for family in known_families().values():
        for own in family.own_models().values():
            for config_class in own:
                AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]


def register_auto_classes() -> None:
    """Lets every family's auto class load routed folders; plain ones load as before. Harmless when repeated.

    No model file is imported for it: it may be the one whose import led here.
    """
    from transformers.models.auto import modeling_auto

    routable: dict[str, set[str]] = {}
    own: dict[str, dict[type, Callable[[], type]]] = {}
    for family in known_families().values():
        routable.setdefault(family.auto_class, set()).add(family.model_type)
        for auto_class, classes in family.own_models().items():
            found = {config: partial(family.own_class, name) for config, name in classes.items()}
            own.setdefault(auto_class, {}).update(found)
            _tell_pipelines(auto_class, classes)
    for name in routable | own:
        mapping = getattr(modeling_auto, name)._model_mapping
        if not hasattr(mapping, _KEY):
            mapping.__class__ = lookup_class(type(mapping), frozenset(routable.get(name, ())), own.get(name, {}))


def _tell_pipelines(auto_class: str, classes: Mapping[type, str]) -> None:
    """Lets pipelines know the names of a family's own classes: they complain of others, though they run them."""
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, _PIPELINES.get(auto_class, ""), None)
    if names is not None:
        names.update({config.model_type: name for config, name in classes.items()})  # type: ignore[attr-defined]


def lookup_class(base: type, routable: frozenset[str], own: dict[type, Callable[[], type]]) -> type:
    """A subclass of transformers' mapping from configurations to classes.

    Args:
        base: the mapping's class.
        routable: the model types for which it gives loaders.
        own: the classes that transformers lacks, by configuration, yet to be imported.
    """

    def look_up(self: Any, config_class: Any) -> Any:
        model_class = own[config_class]() if config_class in own else base.__getitem__(self, config_class)  # type: ignore[index]
        return loader_class(model_class) if getattr(config_class, "model_type", None) in routable else model_class

    def contains(self: Any, config_class: Any) -> bool:
        return config_class in own or base.__contains__(self, config_class)  # type: ignore[operator]

    def keys(self: Any) -> list[type]:
        return [*base.keys(self), *own]  # type: ignore[attr-defined]

    return disguise(base, {"__getitem__": look_up, "__contains__": contains, "keys": keys, _KEY: True})


@cache
def loader_class(base: type) -> type:
    """A subclass whose ``from_pretrained`` gives a routed model for a routed folder, else the base's own class."""

    def from_pretrained(cls: type, name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        from routing_experts.models.load import from_pretrained as load_routed
        from routing_experts.models.load import is_routed_folder

        if is_routed_folder(name_or_path):
            return load_routed(name_or_path, **kwargs)
        return base.from_pretrained(name_or_path, *args, **kwargs)  # type: ignore[attr-defined]

    def make_base(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        return base._from_config(config, *args, **kwargs)  # type: ignore[attr-defined]

    return disguise(base, {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(make_base)})
