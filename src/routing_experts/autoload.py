"""Makes transformers' auto classes know routed folders, without importing transformers before the user does.

The one thing that importing this package changes elsewhere: when transformers' auto classes are (or have been)
imported, a folder that holds ``roe_config.json`` loads as a routed model, and every other folder as before.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"


def watch_transformers() -> None:
    """Registers now if the auto classes are imported already, else as soon as they are."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    import_module("routing_experts.models.auto").register_auto_classes()


class _Watcher(MetaPathFinder):
    """Finds the one module as Python would, and runs the registration after it; then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
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
        _register()
