"""Routed folders through transformers' auto classes: one loader class a family, standing in for the family's own."""

from functools import cache
from typing import Any

from routing_experts.models.families import known_families
from routing_experts.models.layer import disguise

_KEY = "is_routing_experts_lookup"


def register_auto_classes() -> None:
    """Lets every family's auto class load routed folders; plain ones load as before. Harmless when repeated.

    Nothing is imported for it: a family's model file may be the one whose import led here.
    """
    from transformers.models.auto import modeling_auto

    by_auto_class: dict[str, set[str]] = {}
    for family in known_families().values():
        by_auto_class.setdefault(family.auto_class, set()).add(family.model_type)
    for name, model_types in by_auto_class.items():
        mapping = getattr(modeling_auto, name)._model_mapping
        if not hasattr(mapping, _KEY):
            mapping.__class__ = lookup_class(type(mapping), frozenset(model_types))


def lookup_class(base: type, model_types: frozenset[str]) -> type:
    """A subclass of transformers' mapping from configurations to classes that gives loaders for these types."""

    def look_up(self: Any, config_class: Any) -> Any:
        found = base.__getitem__(self, config_class)  # type: ignore[index]
        return loader_class(found) if getattr(config_class, "model_type", None) in model_types else found

    return disguise(base, {"__getitem__": look_up, _KEY: True})


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
