"""Makes transformers' auto classes know routed folders, without importing transformers before the user does.

The one thing that importing this package changes elsewhere: when transformers' auto classes are (or have been)
imported, a folder that holds ``roe_config.json`` loads as a routed model, the families that transformers lacks load
as well, and every other folder loads as before.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# What is registered once a module of transformers is there.
_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "register_configs",
    "transformers.models.auto.modeling_auto": "register_auto_classes",
}


def watch_transformers() -> None:
    """Registers now what is imported already, the rest as soon as it is."""
    watched = {finder.module for finder in sys.meta_path if isinstance(finder, _Watcher)}
    for module in _REGISTRATIONS:
        if module in sys.modules:
            _register(module)
        elif module not in watched:
            sys.meta_path.insert(0, _Watcher(module))


def _register(module: str) -> None:
    getattr(import_module("routing_experts.models.auto"), _REGISTRATIONS[module])()


class _Watcher(MetaPathFinder):
    """Finds the one module as Python would, and runs the registration after it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module.__name__)
