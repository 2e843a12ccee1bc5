"""How processes share out weights, gradients and optimiser state: DeepSpeed's ZeRO, or torch's FSDP2.

A recipe names it (``training.sharding``), or a launcher brings it along (``accelerate launch`` with a file of its own).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routing_experts.errors import ConfigError
from routing_experts.models.families import family_of

SHIPPED = Path(__file__).parent.parent / "recipes" / "engines"
FSDP = "fsdp2"
LAUNCHED_FSDP, LAUNCHED_DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # `accelerate launch` sets them


def engine_file(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of an engine by its name, or a DeepSpeed file, and its settings.

    Raises:
        ConfigError: if there is neither, or the file is not JSON.
    """
    if Path(name).suffix:
        return Path(name), read_settings(Path(name), f"training.sharding={name!r}")
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"training.sharding={name!r} is no engine and no DeepSpeed JSON file. Name one of {known}, or give a file "
            "that ends in .json."
        )
    return path, read_settings(path, name)


def read_settings(path: Path, source: str) -> dict[str, Any]:
    """An engine's file.

    Args:
        path: of the file.
        source: who names it, in messages.

    Raises:
        ConfigError: if it cannot be read, or is not JSON, or holds no settings.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no DeepSpeed JSON file ({error}). Give the path of one.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{source}: the file holds {type(settings).__name__}, not settings.")
    return settings


def engine_arguments(sharding: str | None, model: Any = None) -> dict[str, Any]:
    """What the Trainer's arguments say of it.

    Args:
        sharding: the recipe's.
        model: whose decoder layers are FSDP's units; None where nothing is trained yet.
    """
    if sharding is None:
        return {}
    path, settings = engine_file(sharding)
    if sharding != FSDP:
        return {"deepspeed": str(path)}
    if model is not None:  # transformers' own list names classes that a model may lack
        layers = family_of(model).decoder_layers(model)
        settings["transformer_layer_cls_to_wrap"] = sorted({type(layer).__name__ for layer in layers})
    return {"fsdp": True, "fsdp_config": settings}


def is_set(variable: str) -> bool:
    """Whether a launcher says yes."""
    return os.environ.get(variable, "").lower() == "true"


def is_sharded(sharding: str | None) -> bool:
    """Whether the recipe, or the launcher, has processes share out weights or optimiser state."""
    return sharding is not None or is_deepspeed(None) or is_set(LAUNCHED_FSDP)


def is_deepspeed(sharding: str | None) -> bool:
    """Whether the recipe or the launcher has DeepSpeed share out."""
    return sharding not in (None, FSDP) or is_set(LAUNCHED_DEEPSPEED)


@contextmanager
def engine_forgotten() -> Iterator[None]:
    """Takes back what a run's engine tells the process, not what a launcher told: another run may share out nothing."""
    before = {name: os.environ.get(name) for name in (LAUNCHED_FSDP, LAUNCHED_DEEPSPEED)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
