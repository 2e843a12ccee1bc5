"""A whole run: one recipe, one schedule, one data order; a fresh trainer a stage, so that engines see what trains.

Every stage ends with a checkpoint that the next one goes on from, in one process and in several alike. The optimiser
lists all parameters from the start, so its state carries over a boundary: a boundary that changes nothing changes
nothing.
"""

import gc
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainingArguments

from routing_experts.config import CONTROL_GATES
from routing_experts.data.collate import Collator
from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DIGITS
from routing_experts.data.faults import Fault
from routing_experts.data.readers.sources import contents_of
from routing_experts.data.square import padding_to_square
from routing_experts.errors import (
    CheckpointError,
    ConfigError,
    InterruptedRunError,
    TrainingError,
)
from routing_experts.models.checkpoint import fingerprint
from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_outline, load_processor
from routing_experts.records import TrainingLog, read_log
from routing_experts.training.callbacks import HeldOut, InterruptGuard, JsonLog, ProgressBar, RateWatch, StopAt
from routing_experts.training.checks import check_engine
from routing_experts.training.datasets import build_datasets, fetched_contents, open_fault_log, use_token_cache
from routing_experts.training.faults import Faults
from routing_experts.training.folder import CONTENTS, RunFolder, last_complete, read_state, step_of, unwritten
from routing_experts.training.lora import target_names
from routing_experts.training.making import is_trained_beside, load_weights, made_of, make_model, merged, save_whole
from routing_experts.training.parameters import freeze_all_but
from routing_experts.training.processes import is_main_process, lost_the_others, num_processes, on_main
from routing_experts.training.recipe import Recipe, recipe_values
from routing_experts.training.schedule import DENSE_STAGE, Stage
from routing_experts.training.sharding import engine_arguments, engine_forgotten, is_sharded
from routing_experts.training.tower import TOWER, heed_tower
from routing_experts.training.trainer import RoETrainer


@dataclass
class Trained:
    """What a run gives: the model in memory, its processor, and the folder that holds both."""

    model: Any
    processor: Any
    folder: Path


def train(recipe: Recipe, console: Console | None = None, restart: bool = False, accept: bool = False) -> Trained:
    """Runs a recipe to its end and writes the model's folder.

    A run that was cut short goes on from its last whole checkpoint, to the weights that it would have had; one that is
    finished is loaded as it is.

    Args:
        recipe: what to do.
        console: where progress is shown.
        restart: throw away what is in the output folder of this or another run.
        accept: go on with the folder's run although its records or learning rates are others now.

    Raises:
        ConfigError: if the recipe's settings contradict each other, or the model that it starts from.
        TrainingError: if the output folder holds another recipe's run or is in use, a checkpoint cannot be written, or
            another of the processes that train together has ended.
        InterruptedRunError: after Ctrl-C.
    """
    console = (console or Console()) if is_main_process() else Console(quiet=True)
    check_engine(recipe)
    _check_paths(recipe)
    folder = RunFolder(recipe.output)
    with ExitStack() as held:
        held.enter_context(engine_forgotten())
        try:
            if _begin(folder, recipe, restart, accept, held):
                console.print(f"{folder.path} is finished already; --restart trains it anew.")
                load = from_pretrained if is_routed_folder(folder.model) else load_base
                return Trained(load(folder.model), load_processor(folder.model), folder.model)
            return _train_in(folder, recipe, console, accept)
        except RuntimeError as error:
            if lost_the_others(error):
                raise TrainingError(
                    f"process {os.environ.get('RANK', '0')} lost the other processes ({str(error).splitlines()[0]}). "
                    "The one that failed first says why. The last whole checkpoint stays: run the same command again."
                ) from error
            raise


def _begin(folder: RunFolder, recipe: Recipe, restart: bool, accept: bool, held: ExitStack) -> bool:
    """The main process locks the folder and makes it this run's; says whether the run is finished already.

    Args:
        folder: of the run.
        recipe: of the run.
        restart: throw away what is there.
        accept: go on with other records or rates.
        held: gives the lock back at its end.
    """
    training_arguments(recipe)  # joins the processes, if there are several

    def look() -> bool:
        held.enter_context(folder.locked())
        folder.begin(recipe_values(recipe), _facts(recipe), restart, accept)
        return folder.is_finished

    return on_main(look)


def _train_in(folder: RunFolder, recipe: Recipe, console: Console, accept: bool) -> Trained:
    """Trains what is left to train in a folder that has begun."""
    last = _last_of(folder)
    processor = load_processor(recipe.model)
    if recipe.data.pad_to_square:
        processor = padding_to_square(processor)
    faults: list[Fault] = []
    datasets = build_datasets(recipe, processor, faults)
    if (fetched := fetched_contents(recipe, datasets[0])) is not None:
        on_main(lambda: folder.check_facts({CONTENTS: fetched}, accept))
    fault_log = open_fault_log(recipe, folder.faults, datasets[0], faults)
    use_token_cache(recipe, datasets[0], console)
    if recipe.lora is not None:
        target_names(load_outline(recipe.model), recipe.lora.targets)  # refuses what is not there
    model = make_model(recipe, processor)
    heeded = heed_tower(recipe, model.config)
    on_main(lambda: folder.check_facts({"base": fingerprint(model), TOWER: heeded is not recipe}))
    recipe = heeded
    sharded = is_sharded(recipe.training.sharding)
    if last is not None and sharded:
        load_weights(model, last)
    started, before = time.monotonic(), _seconds_so_far(folder.log, step_of(last)) if last else 0.0
    trainer: RoETrainer | None = None
    bar = ProgressBar(console, recipe.training.steps, folder.path.name)
    try:
        with InterruptGuard() as guard, TrainingLog(folder.log) as log:
            for stage in recipe.stages:
                bar.name_stage(stage.name)
                journal = JsonLog(log, recipe, stage.name, lambda: before + time.monotonic() - started, bar.show)
                if trainer is not None:
                    trainer = None
                    gc.collect()  # its optimizer and the processes that read for it would stay beside the next one's
                    if last is not None and sharded:  # what it cut up stays in pieces
                        model = make_model(recipe, processor)
                        load_weights(model, last)
                callbacks = [bar, guard, journal, RateWatch(console, recipe, stage), HeldOut(console)]
                trainer, last = _train_stage(recipe, stage, model, processor, datasets, fault_log, callbacks, last)
                if guard.interrupted and (trainer is None or trainer.state.global_step < recipe.training.steps):
                    raise InterruptedRunError(
                        f"interrupted: {last} is complete and nothing was lost. Run the same command to go on from "
                        "there."
                    )
    finally:
        bar.close()
    assert trainer is not None, "the last stage has one, be it done already"
    trained = _finish(recipe, folder, model, processor, trainer)
    if guard.interrupted:
        raise InterruptedRunError(f"interrupted in the last step: the run is finished, its model is {trained.folder}.")
    return trained


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What a run's weights depend on beside recipe and base: how many records a step takes, and the data's bytes."""
    data = recipe.data
    facts: dict[str, Any] = {"records_a_step": recipe.training.dialogues_on(num_processes())}
    if data.source != DIGITS and (contents := contents_of(data.source)) is not None:
        facts[CONTENTS] = contents[:16]
    return facts


def _check_paths(recipe: Recipe) -> None:
    """Raises ``ConfigError`` if the model to start from lies where the run writes, or restarting would delete it."""
    model, output = Path(recipe.model), Path(recipe.output)
    if model.exists() and model.resolve().is_relative_to(output.resolve()):
        raise ConfigError(
            f"model {recipe.model} lies inside output {recipe.output}: the run would overwrite what it starts from. "
            "Give another output folder (--output)."
        )


def _last_of(folder: RunFolder) -> Path | None:
    """The newest whole checkpoint, as the main process sees it."""
    return on_main(lambda: last_complete(folder.checkpoints))


def stage_end(recipe: Recipe, stage: Stage) -> int:
    """The optimiser step at which a stage ends."""
    return round(stage.until * recipe.training.steps)


def _train_stage(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    processor: Any,
    datasets: tuple[EncodedDataset, EncodedDataset | None],
    fault_log: Faults,
    callbacks: list[Any],
    last: Path | None,
) -> tuple[RoETrainer | None, Path | None]:
    """Trains one stage from a checkpoint (or from the start); returns its trainer and the checkpoint at its end."""
    end = stage_end(recipe, stage)
    is_last = stage is recipe.stages[-1]
    is_done = last is not None and step_of(last) >= end
    if is_done and not is_last:
        return None, last
    freeze_all_but(model, stage.trains, lora=recipe.lora is not None)
    trainer = RoETrainer(
        recipe=recipe,
        stage=stage,
        model=model,
        args=training_arguments(recipe, model),
        fault_log=fault_log,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=_collator(processor, datasets[0], is_sharded(recipe.training.sharding)),
        callbacks=[*callbacks, StopAt(end)],
    )
    trainer.remove_callback(PrinterCallback)  # the bar and the log say it better
    if recipe.training.gradient_checkpointing:  # re-entrant checkpointing gives wrong gradients beside routing tokens
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if last is not None and is_done:  # all that is left to do is to write the model
        if not is_sharded(recipe.training.sharding):  # what is shared out has its weights already
            load_weights(model, last)
        return trainer, last
    if last is not None:
        trainer.mean_skip_rate = (read_state(last) or {}).get("mean_skip_rate")
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    trainer.accelerator.wait_for_everyone()  # the main process may still be writing what all go on from
    return trainer, _last_of(RunFolder(recipe.output))


def _collator(processor: Any, dataset: EncodedDataset, shared_out: bool) -> Collator:
    """Batches; of processes that share out weights, none may go without the vision tower while others call it."""
    stand_in = dataset.encoder.stand_in() if shared_out and num_processes() > 1 else None
    return Collator(processor.tokenizer.pad_token_id or 0, stand_in=stand_in)


def _finish(recipe: Recipe, folder: RunFolder, model: Any, processor: Any, trainer: RoETrainer) -> Trained:
    """Writes the model's folder from the main process, whose model is the result; the others wait for it.

    Sharded weights are gathered by all, and LoRA's updates merged: into a model made anew.
    """
    state = None
    if trainer.optimizer is not None:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        state = trainer.whole_weights() if trainer.is_sharded else None
    if is_main_process():
        if recipe.lora is not None:
            trained = {n: value for n, value in (state or model.state_dict()).items() if is_trained_beside(n)}
            model = merged(recipe, processor, trained)
        elif state is not None:
            model = made_of(recipe, processor, state)
        model.eval()
        try:
            save_whole(model, recipe, folder.model)
            processor.save_pretrained(folder.model)
            folder.finish()
        except (OSError, SafetensorError, CheckpointError) as error:
            raise unwritten(folder.model, folder.checkpoints, error) from error
    trainer.accelerator.wait_for_everyone()
    return Trained(model, processor, folder.model)


def training_arguments(recipe: Recipe, model: Any = None) -> TrainingArguments:
    """The Trainer's settings of a recipe; schedule and optimiser are ours (see ``RoETrainer``).

    Args:
        recipe: of the run.
        model: that is trained; None where the arguments only join the processes.
    """
    settings = recipe.training
    folder = RunFolder(recipe.output)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.tensorboard)  # the Trainer asks for it there
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation_on(num_processes()),
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        save_total_limit=None,  # older checkpoints go once the new one is known to be whole
        logging_steps=settings.logging_steps,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        per_device_eval_batch_size=settings.batch_size,
        report_to=list(settings.report_to),
        disable_tqdm=True,
        seed=settings.seed,
        dataloader_drop_last=True,
        dataloader_num_workers=recipe.data.workers,
        dataloader_persistent_workers=recipe.data.workers > 0,
        remove_unused_columns=False,
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        **engine_arguments(settings.sharding, model),
        ddp_find_unused_parameters=_leaves_parameters_unused(recipe),
    )
    # Left to itself, the Trainer would split one process's batches among all GPUs that it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _leaves_parameters_unused(recipe: Recipe) -> bool:
    """Whether a step may leave trained parameters without gradients: no picture in a batch, or routers not asked."""
    trains_vision = any({"projector", "vision"} & set(stage.trains) for stage in recipe.stages)
    unread = recipe.roe.gate in CONTROL_GATES or recipe.roe.router_input == "pooled"
    return trains_vision or (recipe.is_routed and unread)


def _seconds_so_far(log: Path, step: int) -> float:
    """Of the steps that are kept; what was trained behind the last checkpoint is trained again."""
    lines = read_log(log) if log.is_file() else []
    return max((line.seconds for line in lines if line.step <= step), default=0.0)


def tuned_base(recipe: Recipe) -> Recipe:
    """The recipe of the dense control: the base fine-tuned on the same records for as many steps, in the same order."""
    return replace(recipe, stages=DENSE_STAGE, output=str(Path(recipe.output) / "tuned"))
