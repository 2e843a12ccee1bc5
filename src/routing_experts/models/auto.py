"""Routed folders through transformers' auto classes: one loader class a family, standing in for the family's own."""

from typing import Any

from routing_experts.models.families import known_families
from routing_experts.models.layer import disguise

_KEY = "is_routing_experts_loader"


def register_auto_classes() -> None:
    """Lets every family's auto class load routed folders; plain ones load as before. Harmless when repeated."""
    import transformers
    from transformers.models.auto import modeling_auto

    for family in known_families().values():
        auto_class = getattr(modeling_auto, family.auto_class)
        config_class = transformers.CONFIG_MAPPING[family.model_type]
        base = auto_class._model_mapping[config_class]
        if not getattr(base, _KEY, False):
            auto_class.register(config_class, loader_class(base), exist_ok=True)


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

    body = {"from_pretrained": classmethod(from_pretrained), "_from_config": classmethod(make_base), _KEY: True}
    return disguise(base, body)
