"""What can be known before a model is loaded: whether processes, engine, launcher and packages fit a recipe."""

import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from routing_experts.errors import ConfigError, MissingExtraError, TrainingError
from routing_experts.optional import need
from routing_experts.training.processes import is_launched, num_processes
from routing_experts.training.recipe import Recipe
from routing_experts.training.sharding import (
    FSDP,
    LAUNCHED_DEEPSPEED,
    LAUNCHED_FSDP,
    engine_file,
    is_deepspeed,
    is_set,
    is_sharded,
    read_settings,
)

AUTO = "auto"  # DeepSpeed's word for what the Trainer says


def check_engine(recipe: Recipe) -> None:
    """Looks at all of it.

    Raises:
        ConfigError: if the processes do not divide a step, or a launcher or an engine's file contradicts the recipe.
        TrainingError: for what an engine cannot do.
        MissingExtraError: for a package that is not installed.
    """
    if recipe.lora is not None:
        need("peft", "lora", "the recipe's `lora`")
    for name in recipe.training.report_to:
        if find_spec(name) is None:
            raise MissingExtraError(f"training.report_to: {name} is not installed. Run: pip install {name}")
    if recipe.quantization is not None:
        need("bitsandbytes", "quant", f"`quantization: {recipe.quantization}`")
    recipe.training.accumulation_on(num_processes())
    _check_named(recipe)
    _check_named_once(recipe)
    _check_launcher(recipe)
    _check_stages(recipe)
    _check_is_launched(recipe)
    if recipe.quantization is not None and is_sharded(None):
        raise TrainingError(
            f"quantization={recipe.quantization!r} with the launcher's sharding: packed weights cannot be shared out. "
            "Start it by torchrun, and each process holds a quantised copy."
        )


def _check_named(recipe: Recipe) -> None:
    """The engine that the recipe names."""
    name = recipe.training.sharding
    if name is None:
        return
    path, settings = engine_file(name)
    if name != FSDP:
        need("deepspeed", "deepspeed", f"`training.sharding: {name}`")
        _check_deepspeed(str(path), settings, recipe)


def _check_named_once(recipe: Recipe) -> None:
    """One of two engines would be overruled: accelerate takes DeepSpeed before FSDP, a recipe's file before its own."""
    name = recipe.training.sharding
    launched = [engine for engine in (LAUNCHED_DEEPSPEED, LAUNCHED_FSDP) if is_set(engine)]
    if name is not None and launched:
        raise ConfigError(
            f"training.sharding={name!r} beside {launched[0]} of the launcher: one of the two would be overruled. Take "
            "it out of accelerate's configuration, or out of the recipe (--set training.sharding=null)."
        )


def _check_is_launched(recipe: Recipe) -> None:
    """One process that shares out needs a launcher too: engines look for what it sets."""
    name = recipe.training.sharding
    if name is not None and not is_launched():
        raise ConfigError(
            f"training.sharding={name!r} without a launcher: nobody is there to share with. Start it as `torchrun "
            "--nproc_per_node 8 -m routing_experts train …` with as many processes as GPUs, be it one; or take it out "
            "(--set training.sharding=null)."
        )


def _check_launcher(recipe: Recipe) -> None:
    """What ``accelerate launch`` brings along in the environment."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if recipe.training.precision == "fp32" and precision not in ("no", "none", ""):
        raise ConfigError(
            f"accelerate's mixed precision is {precision}, training.precision is fp32: the launcher would overrule the "
            "recipe. Launch with --mixed_precision no, or say so in the recipe (--set training.precision=bf16)."
        )
    is_lazy = is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")
    if is_set(LAUNCHED_FSDP) and (os.environ.get("FSDP_VERSION") != "2" or is_lazy):
        raise ConfigError(
            "accelerate's FSDP configuration: a run goes on by parameters' names, which only fsdp_version 2 without "
            "cpu_ram_efficient_loading keeps. Change that, or leave FSDP to the recipe: training.sharding=fsdp2."
        )
    if is_set(LAUNCHED_DEEPSPEED):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file.lower() == "none":
            source, settings = "accelerate's DeepSpeed configuration", _launched_deepspeed()
        else:
            source = f"accelerate's DeepSpeed configuration {file}"
            settings = read_settings(Path(file), source)
        _check_deepspeed(source, settings, recipe)


def _launched_deepspeed() -> dict[str, Any]:
    """The settings of a launcher that has no DeepSpeed file."""
    given = {
        name: os.environ.get(f"ACCELERATE_{name.upper()}", AUTO).lower()
        for name in ("gradient_accumulation_steps", "gradient_clipping")
    }
    numbers: dict[str, Any] = {name: AUTO if value in (AUTO, "none") else float(value) for name, value in given.items()}
    return numbers | {"zero_optimization": {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}}


def _check_deepspeed(source: str, settings: dict[str, Any], recipe: Recipe) -> None:
    """DeepSpeed's settings share out what they share out; optimiser, schedule, steps and precision are the recipe's."""
    stage = (settings.get("zero_optimization") or {}).get("stage")
    if stage not in (2, 3):
        raise ConfigError(
            f"{source}: zero_optimization.stage is {stage}. Stages 2 and 3 are supported; without sharding leave "
            "training.sharding out."
        )
    has_fp16 = (settings.get("fp16") or {}).get("enabled", False) not in (False, AUTO)
    taken = [name for name in ("optimizer", "scheduler") if name in settings] + ["fp16"] * has_fp16
    if taken:
        raise ConfigError(
            f"{source} sets {', '.join(taken)}: the recipe's learning rates, schedule and precision would be ignored. "
            "Take them out of it."
        )
    training = recipe.training
    wanted = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.accumulation_on(num_processes()),
        "train_batch_size": training.dialogues_on(num_processes()),
        "gradient_clipping": training.max_grad_norm,
        "bf16.enabled": training.precision == "bf16",
    }
    given = settings | {"bf16.enabled": (settings.get("bf16") or {}).get("enabled", AUTO)}
    for name in ("gradient_accumulation_steps", "gradient_clipping"):  # others' absence means what the Trainer says
        if name not in given:
            raise ConfigError(
                f"{source} does not name {name}: DeepSpeed would take a number of its own, not the recipe's. Say "
                f"{AUTO!r} there."
            )
    for name, value in wanted.items():
        if given.get(name, AUTO) not in (AUTO, value):
            raise ConfigError(
                f"{source}: {name} is {given[name]}, the recipe's is {value}, and the two must agree. Say "
                f"{AUTO!r} there, or the same."
            )


def _check_stages(recipe: Recipe) -> None:
    """DeepSpeed keeps state of what trains alone: what a stage freezes would begin anew when a later one trains it."""
    if not is_deepspeed(recipe.training.sharding):
        return
    for before, after in pairwise(recipe.stages):
        frozen = set(before.trains) - set(after.trains)
        if any(frozen & set(stage.trains) for stage in recipe.stages[recipe.stages.index(after) :]):
            raise TrainingError(
                f"stage {after.name!r} freezes {', '.join(sorted(frozen))}, and a later one trains it again: DeepSpeed "
                "loses the optimiser's state between. Take training.sharding=fsdp2, or train it throughout."
            )
