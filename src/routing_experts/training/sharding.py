"""How processes share out weights, gradients and optimiser state: DeepSpeed's ZeRO, or torch's FSDP2.

A recipe names it (``training.sharding``), or a launcher brings it along (``accelerate launch`` with a file of its own).
"""

import json
import os
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
    path = Path(name) if Path(name).suffix else SHIPPED / f"{name}.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f" ({error})" if Path(name).suffix else ""
        known = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"training.sharding={name!r} is no engine and no DeepSpeed JSON file{why}. Name one of {known}, or give "
            "a file that ends in .json."
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(f"training.sharding={name!r}: the file holds {type(settings).__name__}, not settings.")
    return path, settings


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


def forget_engine(sharding: str | None) -> None:
    """Takes back what a recipe's FSDP2 told the process: another run in it may share out nothing."""
    if sharding == FSDP:
        os.environ.pop(LAUNCHED_FSDP, None)
