"""How processes share out weights, gradients and optimiser state: DeepSpeed's ZeRO, or torch's FSDP2.

A recipe names it (``training.sharding``), or a launcher brings it along (``accelerate launch`` with a file of its own).
"""

import json
import os
from pathlib import Path
from typing import Any

from routing_experts.errors import ConfigError
from routing_experts.models.families import family_of
from routing_experts.optional import need

SHIPPED = Path(__file__).parent.parent / "recipes" / "engines"
FSDP = "fsdp2"


def engine_file(name: str) -> Path:
    """The settings of an engine by its name, or a DeepSpeed file.

    Raises:
        ConfigError: if there is neither, or the file is not JSON.
    """
    path = Path(name) if Path(name).suffix else SHIPPED / f"{name}.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"training.sharding={name!r}: no engine's settings ({error}). Name one of {known}, or give a DeepSpeed "
            "JSON file."
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"training.sharding={name!r}: the file holds {type(settings).__name__}, not settings.")
    return path


def engine_arguments(sharding: str | None, model: Any = None) -> dict[str, Any]:
    """What the Trainer's arguments say of it.

    Args:
        sharding: the recipe's.
        model: whose decoder layers are FSDP's units; None where nothing is trained yet.
    """
    if sharding is None:
        return {}
    path = engine_file(sharding)
    if sharding != FSDP:
        return {"deepspeed": str(path)}
    settings = json.loads(path.read_text(encoding="utf-8"))
    if model is not None:  # transformers' own list names classes that a model may lack
        layers = family_of(model).decoder_layers(model)
        settings["transformer_layer_cls_to_wrap"] = sorted({type(layer).__name__ for layer in layers})
    return {"fsdp": True, "fsdp_config": settings}


def check_sharding(sharding: str | None) -> None:
    """Raises ``ConfigError`` for settings that are not there, ``MissingExtraError`` for DeepSpeed that is not."""
    if sharding is not None:
        engine_file(sharding)
        if sharding != FSDP:
            need("deepspeed", "deepspeed", f"`training.sharding: {sharding}`")


def is_sharded(sharding: str | None) -> bool:
    """Whether the recipe, or the launcher, has processes share out weights or optimiser state."""
    launched = (os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() for engine in ("DEEPSPEED", "FSDP"))
    return sharding is not None or "true" in launched
