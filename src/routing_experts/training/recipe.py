"""Recipes: one YAML file says what is trained, on what, and how. Checked completely before anything is loaded."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routing_experts.config import RoEConfig
from routing_experts.data.digits import DIGITS, DigitsTask
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
from routing_experts.training.settings import build, checked, lay_over, mapping, read_yaml

NAMED_STAGES = {
    "three": THREE_STAGES,
    "short_warmup": SHORT_WARMUP,
    "dense": DENSE_STAGE,
    "pretraining": PRETRAINING_STAGE,
}
QUANTIZATIONS = ("8bit", "4bit")
ON_FAULT = ("error", "skip")
MAX_FAULTY = 0.01
REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow")
SHIPPED = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Attributes:
        source: ``digits``; a ``.json`` or ``.jsonl`` file in LLaVA's layout or of chat messages; a folder with
            ``metadata.jsonl``; parquet files; or a set's name on the hub.
        images: the folder that image paths are relative to; the file's own by default.
        subset, split: of a set on the hub.
        records: how many of the first records to use; needed for digits, all by default.
        held_out: how many of them, the last, are not trained on but asked every ``training.eval_steps``.
        prompt_format: one of ``data.prompts.FORMATS``.
        max_length: longest dialogue in tokens.
        digits: settings of the digits task.
        pad_to_square: pad pictures to squares in the mean colour, as LLaVA does, where the processor would crop their
            middle; the model's own processor does so from then on.
        keep_encoded: keep encoded dialogues in memory between epochs.
        token_cache: a folder for tokens of the set, which runs over the same set share; None to tokenise on the way.
        workers: processes that read and encode ahead of training; 0 for none.
        on_fault: what a record that cannot be used does: ``error`` ends the run, ``skip`` leaves it out, lists it in
            ``faults.jsonl``, and another, drawn by its number, stands in for it.
        max_faulty: with ``skip``, the share of records that may be left out.
    """

    source: str = DIGITS
    images: str | None = None
    subset: str | None = None
    split: str = "train"
    records: int | None = None
    held_out: int = 0
    prompt_format: str = "chat_template"
    max_length: int = 2048
    digits: DigitsTask = field(default_factory=DigitsTask)
    pad_to_square: bool = False
    keep_encoded: bool = True
    token_cache: str | None = None
    workers: int = 0
    on_fault: str = "error"
    max_faulty: float = MAX_FAULTY

    def __post_init__(self) -> None:
        if self.prompt_format not in FORMATS:
            raise ConfigError(f"data.prompt_format={self.prompt_format!r}: it must be one of {', '.join(FORMATS)}.")
        for name in ("records", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value}: it is a count of at least 1. Raise it.")
        if self.on_fault not in ON_FAULT:
            raise ConfigError(f"data.on_fault={self.on_fault!r}: it must be one of {', '.join(ON_FAULT)}.")
        if not 0 <= self.max_faulty < 1:
            raise ConfigError(f"data.max_faulty={self.max_faulty}: a share of the records lies from 0 to below 1.")
        if self.on_fault == "error" and self.max_faulty != MAX_FAULTY:
            raise ConfigError(
                f"data.max_faulty={self.max_faulty} with data.on_fault=error: the first faulty record ends the run, so "
                "no share may be left out. Set on_fault to skip, or leave max_faulty out."
            )
        if self.workers < 0:
            raise ConfigError(f"data.workers={self.workers}: it must not be negative. Give 0 for none.")
        if self.workers and self.keep_encoded:
            raise ConfigError(
                f"data.workers={self.workers} with data.keep_encoded: what a worker encoded is kept by nobody else. "
                "Set keep_encoded to false, or workers to 0."
            )
        if self.held_out < 0:
            raise ConfigError(f"data.held_out={self.held_out}: it must not be negative. Raise it.")
        if self.records is not None and self.held_out >= self.records:
            raise ConfigError(
                f"data.held_out={self.held_out} of data.records={self.records}: none would be left to train on. Hold "
                "out fewer."
            )


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
        if self.alpha < 1:
            raise ConfigError(f"lora.alpha={self.alpha}: updates are scaled by alpha / rank. Give at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}: a share of inputs lies from 0 to below 1.")
        if not self.targets:
            raise ConfigError("lora.targets is empty: no layer of the base would be tuned. Name some.")


@dataclass(frozen=True)
class TrainingSettings:
    """How it is trained. Learning rates are peaks; both follow one schedule over the whole run.

    Attributes:
        steps: optimiser steps of the whole run, all stages together.
        batch_size: dialogues a process takes a step, before accumulation.
        accumulation: batches summed before a step.
        length_window: so many steps' records are sorted by length together, which pads less but lets steps differ; 1
            sorts within a step alone, which changes no step.
        records_a_step: dialogues of a step, over all processes; says what ``accumulation`` is then.
        learning_rate: of adapters, routers and routing tokens.
        base_learning_rate: of the base model's parameters.
        distill_coef: weight of the distance between the routed answers and the model's own with all layers kept, which
            costs another forward a step; 0 leaves it out.
        eval_steps: steps between questions on the data's ``held_out`` records.
        save_steps: steps between checkpoints; None for stage boundaries only.
        save_total_limit: how many checkpoints are kept, the newest.
        precision: ``fp32`` or ``bf16``.
        sharding: what processes share out, and how: ``zero2``, ``zero3``, ``zero3_offload``, ``fsdp2``, or a DeepSpeed
            JSON file; None for whole copies.
        report_to: where curves go besides the run's own log: among ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``.
    """

    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1
    records_a_step: int | None = None
    length_window: int = 1
    learning_rate: float = 4e-4
    base_learning_rate: float = 2e-6
    lr_schedule: str = "cosine"
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    distill_coef: float = 0.0
    seed: int = 0
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    sharding: str | None = None
    report_to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "records_a_step", "length_window", "logging_steps")
        for name in (*counts, "eval_steps", "save_steps", "save_total_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"training.{name}={value}: it is a count of at least 1. Raise it.")
        for name in ("learning_rate", "base_learning_rate", "weight_decay", "max_grad_norm", "distill_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)}: it must not be negative. Raise it.")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ConfigError(
                f"training.lr_schedule={self.lr_schedule!r}: it must be one of {', '.join(LR_SCHEDULES)}."
            )
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"training.precision={self.precision!r}: it must be fp32 or bf16.")
        unknown = [name for name in self.report_to if name not in REPORTERS]
        if unknown:
            raise ConfigError(
                f"training.report_to={unknown}: it takes any of {', '.join(REPORTERS)}. Correct the list."
            )
        if not 0 <= self.warmup_share < 1:
            raise ConfigError(f"training.warmup_share={self.warmup_share}: a share of the run lies from 0 to below 1.")
        if self.records_a_step is not None and self.accumulation != 1:
            raise ConfigError(
                "training.records_a_step and training.accumulation: the one says what the other is. Give one of them."
            )

    def accumulation_on(self, processes: int) -> int:
        """Batches that each of so many processes sums before a step.

        Raises:
            ConfigError: if ``records_a_step`` cannot be divided so.
        """
        if self.records_a_step is None:
            return self.accumulation
        together = self.batch_size * processes
        if self.records_a_step % together:
            fitting = [str(n) for n in range(1, 65) if self.records_a_step % (self.batch_size * n) == 0]
            raise ConfigError(
                f"training.records_a_step={self.records_a_step} on {processes} processes of "
                f"batch_size={self.batch_size}: they take {together} dialogues at once, which does not divide it. "
                f"Start {', '.join(fitting) or 'no number of'} processes, or change batch_size."
            )
        return self.records_a_step // together

    def dialogues_on(self, processes: int) -> int:
        """Dialogues of one optimiser step over so many processes; raises as ``accumulation_on`` does."""
        return self.batch_size * self.accumulation_on(processes) * processes


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
        lora: low-rank tuning of the base instead of full; merged into it at the end.
        quantization: ``8bit`` or ``4bit`` for the decoder's frozen weights, with ``lora`` alone.
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
    quantization: str | None = None

    def __post_init__(self) -> None:
        check_stages(self.stages)
        self._check_quantization()
        if self.data.source == DIGITS and not self.data.records:
            raise ConfigError("data.records is missing: the digits task is endless. Say how many records to train on.")
        if (self.data.held_out > 0) != (self.training.eval_steps is not None):
            raise ConfigError(
                f"data.held_out={self.data.held_out} with training.eval_steps={self.training.eval_steps}: records are "
                "held out to be asked every so many steps. Give both, or neither."
            )

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization={self.quantization!r}: it must be one of {', '.join(QUANTIZATIONS)}.")
        if self.lora is None:
            raise ConfigError(
                f"quantization={self.quantization!r} with full tuning: packed weights take no gradients. Add "
                "`lora: {}` to the recipe, or take `quantization` out."
            )
        if self.random_init:
            raise ConfigError(
                f"quantization={self.quantization!r} with random_init: only weights that are loaded can be packed. "
                "Take one of them out."
            )
        if self.training.sharding is not None:
            raise ConfigError(
                f"quantization={self.quantization!r} with training.sharding={self.training.sharding!r}: packed weights "
                "cannot be shared out. Take one of them out; without sharding each process holds a quantised copy."
            )

    @property
    def is_routed(self) -> bool:
        """Whether any stage routes; a recipe without one trains the base model as it is."""
        return any(stage.gate != "none" for stage in self.stages)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """All settings as plain values, those left at their defaults included."""
    return asdict(recipe)


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe file, or one that ships with the package by its name (``digits``).

    Args:
        overrides: values by dotted path (``training.steps``), laid over the file's.

    Raises:
        ConfigError: if the file is missing, is not YAML, or holds an unknown or wrong setting; the path is named.
    """
    values = read_yaml(name_or_path, SHIPPED, "recipe")
    try:
        return recipe_from_dict(lay_over(values, overrides or {}))
    except ConfigError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from error


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from plain values; see ``Recipe``."""
    values = dict(values)
    if isinstance(values.get("stages"), str):
        if values["stages"] not in NAMED_STAGES:
            raise ConfigError(f"stages {values['stages']!r}: named ones are {', '.join(NAMED_STAGES)}. Or give a list.")
        values["stages"] = NAMED_STAGES[values["stages"]]
    roe = mapping({} if values.get("roe") is None else values["roe"], "roe")
    preset = roe.pop("preset", "default")
    if not isinstance(preset, str):
        raise ConfigError(f"roe.preset={preset!r}: expected a preset's name.")
    if preset == "paper" and not values.get("annealing"):
        values["annealing"] = PAPER_ANNEALING
    _refuse_contradictions(roe, values)
    values["roe"] = RoEConfig.preset(preset, **checked(RoEConfig, roe, "roe"))
    return build(Recipe, values, "")


def _refuse_contradictions(roe: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for settings of which one would be ignored beside the other, or that nobody may set."""
    own = sorted({"markers", "base", "format_version", "keep_bias", "budget", "stripped"} & set(roe))
    if own:
        raise ConfigError(f"roe.{own[0]}: the library fills it in, from the model or by calibration. Take it out.")
    if "prompt_format" in roe:
        raise ConfigError("roe.prompt_format: the data's layout is the model's. Set data.prompt_format instead.")
    if roe.get("routed_layers") is not None and "num_unrouted_layers" in roe:
        raise ConfigError("roe.routed_layers and roe.num_unrouted_layers: each says which layers route. Give one.")
    data = values.get("data")
    if isinstance(data, Mapping) and data.get("images") is not None and data.get("source", DIGITS) == DIGITS:
        raise ConfigError("data.images with the digits task, which draws its own pictures. Give data.source, a file.")
    if isinstance(data, Mapping) and {"subset", "split"} & data.keys() and data.get("source", DIGITS) == DIGITS:
        raise ConfigError(
            "data.subset and data.split with the digits task: they are of sets on the hub. Leave them out."
        )
