"""A whole run: one recipe, one schedule, one data order; a fresh trainer a stage, so that engines see what trains.

Every stage ends with a checkpoint that the next one goes on from, in one process and in several alike. The optimiser
lists all parameters from the start, so its state carries over a boundary: a boundary that changes nothing changes
nothing.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainingArguments, set_seed

from routing_experts.data.collate import Collator, EncodedDataset
from routing_experts.data.encode import Encoder
from routing_experts.data.llava_json import load_records
from routing_experts.data.markers import find_markers
from routing_experts.errors import TrainingError
from routing_experts.models.convert import convert, is_routed
from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_processor
from routing_experts.records import LOG_NAME, TrainingLog, read_log
from routing_experts.training.callbacks import InterruptGuard, JsonLog, ProgressBar, StopAt
from routing_experts.training.parameters import freeze_all_but
from routing_experts.training.recipe import DataSettings, Recipe
from routing_experts.training.schedule import DENSE_STAGE, Stage
from routing_experts.training.trainer import RoETrainer

MODEL_FOLDER = "model"
CHECKPOINTS = "checkpoints"


@dataclass
class Trained:
    """What a run gives: the model in memory, its processor, and the folder that holds both."""

    model: Any
    processor: Any
    folder: Path


def train(recipe: Recipe, console: Console | None = None, resume: bool = False, base: Any = None) -> Trained:
    """Runs a recipe to its end and writes the model's folder.

    Args:
        recipe: what to do.
        console: where progress is shown.
        resume: go on from the last complete checkpoint of the output folder; a run that has none starts anew.
        base: a base model that is loaded already; the recipe's by default.

    Raises:
        TrainingError: if the output folder holds another run's checkpoints, or the run was interrupted.
    """
    console = console or Console()
    if recipe.training.deepspeed and recipe.lora is not None:
        raise TrainingError(
            "LoRA under DeepSpeed: merging into sharded weights is not supported yet. Take `lora` or "
            "`training.deepspeed` out of the recipe."
        )
    if recipe.training.deepspeed and len(recipe.stages) > 1:
        raise TrainingError(
            f"{len(recipe.stages)} stages under DeepSpeed: its engine cannot take parameters in or out once built. "
            "Give the recipe one stage at a time (`stages:` with a single entry), each from the last one's model."
        )
    output = Path(recipe.output)
    last = _last_checkpoint(output / CHECKPOINTS)
    if last and not resume:
        raise TrainingError(
            f"{output} holds checkpoints of an earlier run (the last is {last.name}): a new one would overwrite it. "
            "Resume it (--resume), or give another output folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.training.seed)
    processor = load_processor(recipe.model)
    model = base if base is not None else _load(recipe)
    if recipe.is_routed and not is_routed(model):
        roe = replace(recipe.roe, prompt_format=recipe.data.prompt_format)
        convert(model, roe, find_markers(processor, recipe.data.prompt_format), seed=recipe.training.seed)
    if recipe.lora is not None:
        model = _with_lora(model, recipe)
    dataset = build_dataset(recipe.data, processor)
    _check_size(len(dataset), recipe)  # type: ignore[arg-type]
    started, before = time.monotonic(), _seconds_so_far(output / LOG_NAME) if last else 0.0
    if not last:
        (output / LOG_NAME).unlink(missing_ok=True)
    trainer: RoETrainer | None = None
    bar = ProgressBar(console, recipe.training.steps, output.name)
    try:
        with InterruptGuard() as guard, TrainingLog(output / LOG_NAME) as log:
            for stage in recipe.stages:
                bar.name_stage(stage.name)
                journal = JsonLog(log, recipe, stage.name, lambda: before + time.monotonic() - started)
                trainer, last = _train_stage(recipe, stage, model, processor, dataset, [bar, guard, journal], last)
                if guard.interrupted:
                    raise TrainingError(
                        f"interrupted: {last} is complete and nothing was lost. Run the same command with --resume "
                        "to go on from there."
                    )
    finally:
        bar.close()
    return _finish(recipe, model, processor, trainer)


def build_dataset(settings: DataSettings, processor: Any) -> Dataset:
    """The recipe's records, encoded on first use."""
    encoder = Encoder(processor, settings.prompt_format, settings.max_length)
    if settings.source == "digits":
        assert settings.records is not None
        return EncodedDataset(settings.digits, settings.records, encoder, settings.keep_encoded)
    records = load_records(Path(settings.source), settings.images and Path(settings.images), settings.records)
    return EncodedDataset(records, len(records), encoder, settings.keep_encoded)


def stage_end(recipe: Recipe, stage: Stage) -> int:
    """The optimiser step at which a stage ends."""
    return round(stage.until * recipe.training.steps)


def _train_stage(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    processor: Any,
    dataset: Dataset,
    callbacks: list[Any],
    last: Path | None,
) -> tuple[RoETrainer | None, Path | None]:
    """Trains one stage from a checkpoint (or from the start); returns its trainer and the checkpoint at its end."""
    end = stage_end(recipe, stage)
    is_last = stage is recipe.stages[-1]
    is_done = last is not None and int(last.name.split("-")[1]) >= end
    if is_done and not is_last:
        return None, last
    freeze_all_but(model, stage.trains, lora=recipe.lora is not None)
    trainer = RoETrainer(
        recipe=recipe,
        stage=stage,
        model=model,
        args=training_arguments(recipe),
        train_dataset=dataset,
        data_collator=Collator(processor.tokenizer.pad_token_id or 0),
        callbacks=[*callbacks, StopAt(end, keep=not is_last)],
    )
    trainer.remove_callback(PrinterCallback)  # the bar and the log say it better
    if recipe.training.gradient_checkpointing:  # re-entrant checkpointing gives wrong gradients beside routing tokens
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if is_done:  # all that is left to do is to write the model
        trainer._load_from_checkpoint(str(last), model)
        return trainer, last
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    trainer.accelerator.wait_for_everyone()  # the main process may still be writing what all go on from
    return trainer, _last_checkpoint(Path(recipe.output) / CHECKPOINTS) or last


def _finish(recipe: Recipe, model: Any, processor: Any, trainer: RoETrainer | None) -> Trained:
    """Writes the model's folder from the main process; sharded weights are gathered by all of them first."""
    state = None
    if trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if recipe.lora is not None:
        model = model.merge_and_unload()
    model.eval()
    folder = Path(recipe.output) / MODEL_FOLDER
    if int(os.environ.get("RANK", "0")) == 0:
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
    return Trained(model, processor, folder)


def _load(recipe: Recipe) -> Any:
    """The recipe's model in the precision that training keeps its weights in; a routed folder keeps its routers."""
    half = recipe.lora is not None and recipe.training.precision == "bf16"  # the frozen base needs no master weights
    dtype = torch.bfloat16 if half else torch.float32
    if recipe.is_routed and not recipe.random_init and is_routed_folder(recipe.model):
        return from_pretrained(recipe.model, dtype=dtype)
    return load_base(recipe.model, recipe.random_init, dtype=dtype)


def _check_size(num_records: int, recipe: Recipe) -> None:
    """Raises ``TrainingError`` if not even one batch can be filled, which would train nothing without a word."""
    needed = recipe.training.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if num_records < needed:
        raise TrainingError(
            f"{num_records} records for batches of {needed} (batch_size times processes): incomplete batches are left "
            "out, so nothing would be trained. Lower training.batch_size, or give more records."
        )


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """The Trainer's settings of a recipe; schedule and optimiser are ours (see ``RoETrainer``)."""
    settings = recipe.training
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output) / "tensorboard")  # the Trainer asks for it there
    return TrainingArguments(
        output_dir=str(Path(recipe.output) / CHECKPOINTS),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        save_total_limit=2,
        logging_steps=settings.logging_steps,
        report_to=["tensorboard"],
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        deepspeed=settings.deepspeed,
        ddp_find_unused_parameters=any({"projector", "vision"} & set(stage.trains) for stage in recipe.stages),
    )


def _with_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = recipe.lora
    assert lora is not None
    decoder = r".*(language_model|model)\.layers\.\d+\.(self_attn|mlp)\.(" + "|".join(lora.targets) + ")"
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=decoder)
    return get_peft_model(model, settings)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _seconds_so_far(log: Path) -> float:
    lines = read_log(log) if log.is_file() else []
    return lines[-1].seconds if lines else 0.0


def tuned_base(recipe: Recipe) -> Recipe:
    """The recipe of the dense control: the base fine-tuned on the same records for as many steps, in the same order."""
    return replace(recipe, stages=DENSE_STAGE, output=str(Path(recipe.output) / "tuned"))
