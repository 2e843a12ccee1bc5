"""Routing Experts: teach an existing multimodal LLM to skip its own decoder layers, example by example.

The method is RoE (Wu et al., ICLR 2025, arXiv 2407.14093). Everything public is here, loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from routing_experts.autoload import watch_transformers

if TYPE_CHECKING:
    from routing_experts.api import convert, load_pocket, save_pretrained
    from routing_experts.config import RoEConfig
    from routing_experts.errors import RoutingExpertsError
    from routing_experts.inference.chat import ChatSession
    from routing_experts.inference.engine import Engine, EngineSettings
    from routing_experts.inference.requests import Request, Sampling
    from routing_experts.models.cache import RoutedCache
    from routing_experts.models.convert import is_routed, revert
    from routing_experts.models.load import from_pretrained
    from routing_experts.models.options import RoutingOptions

__version__ = "0.2.0"
_HOME = {
    "ChatSession": "inference.chat",
    "Engine": "inference.engine",
    "EngineSettings": "inference.engine",
    "Request": "inference.requests",
    "Sampling": "inference.requests",
    "RoEConfig": "config",
    "RoutedCache": "models.cache",
    "RoutingExpertsError": "errors",
    "RoutingOptions": "models.options",
    "convert": "api",
    "from_pretrained": "models.load",
    "is_routed": "models.convert",
    "load_pocket": "api",
    "revert": "models.convert",
    "save_pretrained": "api",
}
__all__ = [
    "ChatSession",
    "Engine",
    "EngineSettings",
    "Request",
    "RoEConfig",
    "RoutedCache",
    "RoutingExpertsError",
    "RoutingOptions",
    "Sampling",
    "convert",
    "from_pretrained",
    "is_routed",
    "load_pocket",
    "revert",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# `AutoModelForImageTextToText.from_pretrained(folder)` gives a routed model once this package is imported.
watch_transformers()
