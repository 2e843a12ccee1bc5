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
_FSDP, _LAZY = "ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"  # what `accelerate launch` sets


def engine_file(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of an engine by its name, or a DeepSpeed file, and its settings.

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


def check_sharding(sharding: str | None) -> None:
    """What can be known of an engine beforehand.

    Raises:
        ConfigError: for settings that are not there, or that a run cannot go on by.
        MissingExtraError: for DeepSpeed that is not there.
    """
    if sharding is not None:
        path, settings = engine_file(sharding)
        if sharding != FSDP:
            need("deepspeed", "deepspeed", f"`training.sharding: {sharding}`")
            _check_deepspeed(path, settings)
    launched = {name: os.environ.get(name, "").lower() for name in (_FSDP, "FSDP_VERSION", _LAZY)}
    if launched[_FSDP] == "true" and (launched["FSDP_VERSION"] != "2" or launched[_LAZY] == "true"):
        raise ConfigError(
            "accelerate's FSDP configuration: a run goes on by parameters' names, which only fsdp_version 2 without "
            "cpu_ram_efficient_loading keeps. Change that, or leave FSDP to the recipe: training.sharding=fsdp2."
        )


def _check_deepspeed(path: Path, settings: dict[str, Any]) -> None:
    """A DeepSpeed file shares out what it shares out; optimiser, schedule and precision are the recipe's."""
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (2, 3):
        raise ConfigError(
            f"{path}: zero_optimization.stage is {stage}. Stages 2 and 3 are supported; without sharding leave "
            "training.sharding out."
        )
    taken = [name for name in ("optimizer", "scheduler", "fp16") if name in settings]
    if taken:
        raise ConfigError(
            f"{path} sets {', '.join(taken)}: the recipe's learning rates, schedule and precision would be ignored. "
            "Take them out of the file."
        )


def is_sharded(sharding: str | None) -> bool:
    """Whether the recipe, or the launcher, has processes share out weights or optimiser state."""
    return sharding is not None or is_deepspeed(None) or os.environ.get(_FSDP, "").lower() == "true"


def is_deepspeed(sharding: str | None) -> bool:
    """Whether the recipe or the launcher has DeepSpeed share out."""
    return sharding not in (None, FSDP) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def forget_engine(sharding: str | None) -> None:
    """Takes back what a recipe's FSDP2 told the process: another run in it may share out nothing."""
    if sharding == FSDP:
        os.environ.pop(_FSDP, None)
