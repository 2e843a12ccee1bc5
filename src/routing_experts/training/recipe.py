"""Recipes: one YAML file says what is trained, on what, and how. Checked completely before anything is loaded."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from routing_experts.config import RoEConfig
from routing_experts.data.digits import DigitsTask
from routing_experts.data.prompts import FORMATS
from routing_experts.errors import ConfigError
from routing_experts.training.schedule import (
    DENSE_STAGE,
    LR_SCHEDULES,
    PAPER_ANNEALING,
    PRETRAINING_STAGE,
    SHORT_WARMUP,
    THREE_STAGES,
    Annealing,
    Stage,
    check_stages,
)

NAMED_STAGES = {
    "three": THREE_STAGES,
    "short_warmup": SHORT_WARMUP,
    "dense": DENSE_STAGE,
    "pretraining": PRETRAINING_STAGE,
}
SHIPPED = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Attributes:
        source: ``digits``, or the path of a JSON file in LLaVA's layout.
        images: the folder that the file's image paths are relative to; the file's own by default.
        records: how many records to use; needed for digits, all of a file by default.
        prompt_format: ``chat_template`` or ``vicuna_v1``.
        max_length: longest dialogue in tokens.
        digits: settings of the digits task.
        keep_encoded: keep encoded dialogues in memory between epochs.
    """

    source: str = "digits"
    images: str | None = None
    records: int | None = None
    prompt_format: str = "chat_template"
    max_length: int = 2048
    digits: DigitsTask = field(default_factory=DigitsTask)
    keep_encoded: bool = True

    def __post_init__(self) -> None:
        if self.prompt_format not in FORMATS:
            raise ConfigError(f"data.prompt_format={self.prompt_format!r}: it must be one of {', '.join(FORMATS)}.")
        for name in ("records", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value}: it is a count of at least 1. Raise it.")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank tuning of the base model through peft, beside the RoE parts.

    Attributes:
        rank: inner width of each update.
        alpha: its scale times rank.
        dropout: on its input.
        targets: names of the base's linear layers; RoE's own are never among them.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank={self.rank}: it is a width of at least 1. Raise it.")


@dataclass(frozen=True)
class TrainingSettings:
    """How it is trained. Learning rates are peaks; both follow one schedule over the whole run.

    Attributes:
        steps: optimiser steps of the whole run, all stages together.
        batch_size: dialogues a process takes a step, before accumulation.
        accumulation: batches summed before a step.
        learning_rate: of adapters, routers and routing tokens.
        base_learning_rate: of the base model's parameters.
        save_steps: steps between checkpoints; None for stage boundaries and the end only.
        precision: ``fp32`` or ``bf16``.
        deepspeed: a DeepSpeed JSON file.
    """

    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1
    learning_rate: float = 4e-4
    base_learning_rate: float = 2e-6
    lr_schedule: str = "cosine"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    logging_steps: int = 10
    save_steps: int | None = None
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    deepspeed: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "logging_steps", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name}={value}: it is a count of at least 1. Raise it.")
        for name in ("learning_rate", "base_learning_rate", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)}: it must not be negative. Raise it.")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ConfigError(
                f"training.lr_schedule={self.lr_schedule!r}: it must be one of {', '.join(LR_SCHEDULES)}."
            )
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"training.precision={self.precision!r}: it must be fp32 or bf16.")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"training.warmup_share={self.warmup_share}: a share of the run lies from 0 to below 1.")


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        model: ``pocket``, a folder, or a name on the Hugging Face hub.
        random_init: start from random weights of the model's configuration.
        output: the run's folder.
        stages: ``three`` (RoE, the paper's shares), ``short_warmup`` (RoE, 20 / 15 / 65 %), ``dense`` (fine-tune the
            base), ``pretraining``, or a list of stages.
        roe: the method's settings; ignored by stages without a gate.
    """

    model: str
    output: str
    random_init: bool = False
    stages: tuple[Stage, ...] = THREE_STAGES
    roe: RoEConfig = field(default_factory=RoEConfig)
    annealing: Annealing = field(default_factory=Annealing)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        check_stages(self.stages)
        if self.data.source == "digits" and not self.data.records:
            raise ConfigError("data.records is missing: the digits task is endless. Say how many records to train on.")

    @property
    def is_routed(self) -> bool:
        """Whether any stage routes; a recipe without one trains the base model as it is."""
        return any(stage.gate != "none" for stage in self.stages)


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe file, or one that ships with the package by its name (``digits``).

    Args:
        overrides: values by dotted path (``training.steps``), laid over the file's.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds an unknown or wrong setting; the path is named.
    """
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        path = SHIPPED / f"{name_or_path}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        raise ConfigError(f"recipe {name_or_path}: there is no such file. Give a YAML file, or one of: {shipped}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {error}. Correct the line that it names.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds {type(values).__name__}, not settings. Write `model:`, `data:` and so on."
        )
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        place = values
        for parent in parents:
            place[parent] = place.get(parent) or {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"{path}: {dotted} leads through {parent}={place!r}, which has no settings below it.")
        place[last] = value
    try:
        return recipe_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from plain values; see ``Recipe``."""
    values = dict(values)
    if isinstance(values.get("stages"), str):
        if values["stages"] not in NAMED_STAGES:
            raise ConfigError(f"stages {values['stages']!r}: named ones are {', '.join(NAMED_STAGES)}. Or give a list.")
        values["stages"] = NAMED_STAGES[values["stages"]]
    roe = _mapping({} if values.get("roe") is None else values["roe"], "roe")
    preset = roe.pop("preset", "default")
    if not isinstance(preset, str):
        raise ConfigError(f"roe.preset={preset!r}: expected a preset's name.")
    if preset == "paper" and not values.get("annealing"):
        values["annealing"] = PAPER_ANNEALING
    values["roe"] = RoEConfig.preset(preset, **_checked(RoEConfig, roe, "roe"))
    return _build(Recipe, values, "")


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected settings, found {values!r}. Write `name: value` lines below it.")
    return dict(values)


def _checked(kind: type, values: Any, where: str) -> dict[str, Any]:
    """The settings of a dataclass, each of its field's kind; the rest is for the dataclass to check."""
    values = _mapping(values, where)
    known = {f.name: f for f in fields(kind)}
    section, prefix = where or "the recipe", f"{where}." if where else ""
    unknown = sorted(set(map(str, values)) - set(known))
    if unknown:
        raise ConfigError(
            f"{section} has unknown settings {unknown}: it knows {', '.join(known)}. Correct or remove them."
        )
    needed = [f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} of {section} missing: there is no default. Write `{missing[0]}: …`.")
    hints = get_type_hints(kind)
    return {name: _typed(hints[name], value, prefix + name) for name, value in values.items()}


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A plain value as a field's kind; numbers may be texts, since YAML takes ``4e-4`` for one."""
    if get_origin(kind) in (Union, UnionType):
        options = [option for option in get_args(kind) if option is not NoneType]
        return None if value is None else _typed(options[0], value, where)
    if is_dataclass(kind):
        return _build(kind, value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: expected a list. Write [a, b].")
        return tuple(_typed(get_args(kind)[0], item, where) for item in value)
    if kind is float:
        return _number(value, where)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}={value!r}: expected {_KINDS[kind]}. Correct the value.")
    return value


def _number(value: Any, where: str) -> float:
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}={value!r}: expected a number. Correct the value.") from error
    if not isfinite(number):
        raise ConfigError(f"{where}={value!r}: expected a finite number. Correct the value.")
    return number


_KINDS = {int: "a whole number", bool: "true or false", str: "a text"}


def _build(kind: Any, values: Any, where: str) -> Any:
    return values if isinstance(values, kind) else kind(**_checked(kind, values, where))
