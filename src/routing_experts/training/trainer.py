"""The one trainer: the Hugging Face Trainer with RoE's loss, parameter groups and schedule.

Shapes: B examples, T tokens, Q turns, L routed layers.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback

from routing_experts.errors import CheckpointError, TrainingError
from routing_experts.models.checkpoint import save_parts
from routing_experts.models.model import routing_context
from routing_experts.models.options import KEEP_ALL
from routing_experts.nn.gates import GateSettings
from routing_experts.nn.losses import (
    cross_entropy_per_example,
    distillation_per_example,
    roe_loss,
    skip_rate_per_example,
    sparsity_pressure,
)
from routing_experts.training.batches import model_inputs, rates_by_layer, skip_weights
from routing_experts.training.faults import Faults
from routing_experts.training.folder import keep_newest, mark_complete, step_of, unwritten
from routing_experts.training.health import StepLosses, check_numbers
from routing_experts.training.lora import base_of, without_dropout
from routing_experts.training.making import is_trained_beside, load_weights, saved_weights
from routing_experts.training.order import StepOrder
from routing_experts.training.parameters import optimizer_groups
from routing_experts.training.processes import lost_the_others, on_main
from routing_experts.training.recipe import Recipe
from routing_experts.training.schedule import Stage, lr_factor
from routing_experts.training.state import Engine, engine_of, load_state, save_state, whole_weights
from routing_experts.training.window import TOKENS, LossWindow

MEMORY = 0.7  # of the running mean of skip rates: a few steps, enough to even out batches
LAYER_RATE = "skip_rate/layer_"  # the prefix under which each layer's rate is logged
# What a save that finds no room raises: torch, safetensors and we wrap the system's errors.
UNWRITTEN = (OSError, RuntimeError, SafetensorError, CheckpointError)


class RoETrainer(Trainer):
    """Trains one stage of a recipe; steps, learning rate and data order are those of the whole run.

    Args:
        recipe: of the whole run.
        stage: the stage that these steps belong to.
        fault_log: takes the run's faulty records.
        **kwargs: the Trainer's own.

    Attributes:
        window: loss parts, skip rates by layer and tokens since the last log.
        mean_skip_rate: of the routed layers, averaged over the last steps of all processes; None before the first.
    """

    def __init__(self, *, recipe: Recipe, stage: Stage, fault_log: Faults | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.stage, self.fault_log = recipe, stage, fault_log
        self.compute_metrics = self._held_out
        self.model_accepts_loss_kwargs = False  # the loss is a mean over examples already; accumulation averages it
        self.window = LossWindow()
        self.mean_skip_rate: float | None = None
        self._step_rates: list[Tensor] = []
        model: Any = self.model
        self._step_losses = StepLosses(model.config.get_text_config(decoder=True).vocab_size)
        self.add_callback(_StepEnd(self))

    @property
    def is_sharded(self) -> bool:
        """Whether processes share out weights or optimiser state."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def progress(self) -> float:
        """The share of the run's optimiser steps that are done."""
        return self.state.global_step / self.recipe.training.steps

    def gate_settings(self) -> GateSettings | None:
        """The gate at this step; None in a stage that does not route."""
        if self.stage.gate == "none":
            return None
        annealing, roe = self.recipe.annealing, self.recipe.roe
        bias = annealing.bias_at(self.progress, roe.target_skip_ratio) if self.stage.biased else 0.0
        if self.stage.gate == "random" or roe.gate == "random":
            bias = annealing.bias_at(0.0, roe.target_skip_ratio)
        return GateSettings(
            kind="random" if self.stage.gate == "random" and roe.gate != "static" else roe.gate,
            temperature=annealing.temperature_at(self.progress),
            bias=bias,
            seed=self.recipe.training.seed,
            step=self.state.global_step,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over all groups; frozen parameters are listed but get no state.

        DeepSpeed allots state to whatever is listed, so there only trained parameters are.
        """
        if self.optimizer is None:
            settings = self.recipe.training
            target: Any = model or self.model
            named = target.named_parameters()
            if self.is_deepspeed_enabled:
                named = ((name, parameter) for name, parameter in named if parameter.requires_grad)
            groups = optimizer_groups(named, settings.learning_rate, settings.base_learning_rate, settings.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The recipe's schedule over the whole run, whichever stage this is."""
        if self.lr_scheduler is None:
            self.lr_scheduler = self._schedule(optimizer or self.optimizer, 0)
        return self.lr_scheduler

    def _schedule(self, optimizer: Any, step: int) -> LambdaLR:
        """The schedule after so many steps: what it was before then does not matter."""
        settings = self.recipe.training

        def factor(step: int) -> float:
            return lr_factor(settings.lr_schedule, settings.warmup_share, (step + 1) / settings.steps)

        return LambdaLR(optimizer, factor, last_epoch=step - 1)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over examples of CE, with the sparsity loss and the distillation where the stage routes."""
        labels, segment_ids = inputs["labels"], inputs["segment_ids"]
        outputs, context = self._forward(model, inputs, self.gate_settings())
        cross_entropy_B = cross_entropy_per_example(outputs.logits, labels)
        loss, parts = cross_entropy_B.mean(), {"ce": cross_entropy_B.mean()}
        parts[TOKENS] = inputs["attention_mask"].sum()
        if context is not None:
            skip_LBQ = skip_weights(context)
            parts["rates"] = rates_by_layer(skip_LBQ, context.valid_BQ)
            loss = self._routed_loss(cross_entropy_B, skip_rate_per_example(skip_LBQ, context.valid_BQ))
        if context is not None and self.recipe.training.distill_coef:
            dense = routing_context(self.accelerator.unwrap_model(model), segment_ids, KEEP_ALL)
            with torch.no_grad(), without_dropout(model):
                dense_logits = model(**model_inputs(inputs), routing=dense, use_cache=False).logits
            parts["distillation"] = distillation_per_example(outputs.logits, dense_logits, labels).mean()
            loss = loss + self.recipe.training.distill_coef * parts["distillation"]
        self.window.add(parts | {"total": loss})
        self._step_losses.add(cross_entropy_B, inputs["example_keys"])
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], gate: GateSettings | None) -> Any:
        """The model's outputs, and what its routers decided; None where nothing is routed."""
        if self.fault_log is not None:
            self.fault_log.take(inputs)
        if gate is None:
            return model(**model_inputs(inputs), use_cache=False), None
        context = routing_context(
            self.accelerator.unwrap_model(model),
            inputs["segment_ids"],
            gate=gate,
            keys_B=inputs["example_keys"],
            same_calls=self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3,
        )
        return model(**model_inputs(inputs), routing=context, use_cache=False), context

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Cross-entropy and skip rate of held-out examples [B, 2], on the hard routes that inference would take.

        They come from the training mix, which calls the same modules whatever is skipped: sharded weights need that.
        """
        inputs = self._prepare_inputs(inputs)
        gate = self.gate_settings()
        if gate is not None and gate.asks_router:
            gate = replace(gate, kind="straight_through", bias=0.0)
        with torch.no_grad():
            outputs, context = self._forward(model, inputs, gate)
        found_B2 = cross_entropy_per_example(outputs.logits, inputs["labels"])[:, None].repeat(1, 2)
        found_B2[:, 1] = 0.0 if context is None else skip_rate_per_example(skip_weights(context), context.valid_BQ)
        return None, found_B2, torch.ones_like(found_B2[:, 0])  # the Trainer gathers what comes with labels

    def _held_out(self, found: EvalPrediction) -> dict[str, float]:
        """The means of what ``prediction_step`` gives, the rate over all decoder layers."""
        cross_entropy, skip_rate = (float(mean) for mean in found.predictions.mean(0))  # type: ignore[union-attr]
        routed = len(self.recipe.roe.layers_to_route(self._num_layers))
        return {"ce": cross_entropy, "skip_rate": skip_rate * routed / self._num_layers}

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, in an order that is told its epoch however many samplers lie around it."""
        loader: Any = super().get_train_dataloader()
        loader.set_sampler(self._order)  # or a run that goes on in several processes would repeat its first epoch
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        """The same records a step in whatever batches; accelerate would shuffle alike, but batches of any lengths."""
        dataset: Any = train_dataset or self.train_dataset
        self._order = StepOrder(
            SeedableRandomSampler(dataset, data_seed=self.args.seed),
            self.args.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.world_size,
            # Over several steps it decides what a step learns from: it must not change with what is kept.
            partial(dataset.extent, exact=self.recipe.training.length_window > 1),
            self.recipe.training.length_window,
        )
        return self._order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All held-out records: training's leave the last incomplete batch out."""
        dataset: Any = eval_dataset or self.eval_dataset
        loader = DataLoader(dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def _routed_loss(self, cross_entropy_B: Tensor, skip_rate_B: Tensor) -> Tensor:
        """The mean over examples of CE and the sparsity loss."""
        roe = self.recipe.roe
        self._step_rates.append(skip_rate_B.detach().mean())
        return roe_loss(
            cross_entropy_B,
            skip_rate_B,
            roe.target_skip_ratio,
            roe.sparsity_loss_coef,
            roe.ce_sharpness,
            self._pressure(),
        ).mean()

    def _pressure(self) -> float | None:
        """Of the sparsity loss, from earlier steps alone: the same however a step's batch is divided."""
        roe = self.recipe.roe
        if roe.sparsity_scope == "example":
            return None
        return 1.0 if self.mean_skip_rate is None else sparsity_pressure(self.mean_skip_rate, roe.target_skip_ratio)

    def close_step(self) -> None:
        """Takes the step's skip rates into the running mean, and looks at its losses.

        Raises:
            TrainingError: if a loss is no number or has exploded, or too many records are faulty; nothing has been
                saved since.
        """
        dataset: Any = self.train_dataset
        if self.fault_log is not None:
            self.fault_log.close_step(self.accelerator)
        self._step_losses.check(self.accelerator, dataset, self.state.global_step, Path(str(self.args.output_dir)))
        if self._step_rates:
            step = float(self.accelerator.reduce(torch.stack(self._step_rates).mean(), reduction="mean"))
            before = self.mean_skip_rate
            self.mean_skip_rate = step if before is None else MEMORY * before + (1 - MEMORY) * step
            self._step_rates.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's means and the gate's state to what the Trainer logs."""
        if self.window and "loss" in logs:  # the Trainer's closing summary is no log of losses
            logs = logs | self._drain()
        super().log(logs, start_time)

    def _drain(self) -> dict[str, float]:
        """The window's means and the gate's state."""
        means = self.window.drain(self.accelerator)
        logs = {"ce": float(means["ce"]), "total_loss": float(means["total"])}
        logs["tokens_per_second"] = means["tokens_per_second"]
        if "distillation" in means:
            logs["distillation"] = float(means["distillation"])
        gate = self.gate_settings()
        if gate is not None and "rates" in means:
            rates = dict.fromkeys(range(self._num_layers), 0.0)
            routed = self.recipe.roe.layers_to_route(self._num_layers)
            rates |= dict(zip(routed, means["rates"].tolist(), strict=True))
            logs |= {"skip_rate": sum(rates.values()) / self._num_layers}
            logs |= {"temperature": gate.temperature, "gate_bias": gate.bias}
            logs |= {f"{LAYER_RATE}{layer:02d}": rate for layer, rate in rates.items()}
        return logs

    @property
    def _num_layers(self) -> int:
        model: Any = self.model
        num_layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
        return num_layers

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """A sharded engine's weights come with the model; what the Trainer would load fits that engine alone."""
        if not self.is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimiser's state by parameter name; the schedule's place is the step's."""
        if checkpoint is not None:
            load_state(self.engine, Path(checkpoint))
            self.lr_scheduler = self._schedule(self.optimizer, step_of(Path(checkpoint)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What ``_load_optimizer_and_scheduler`` reads, on any number of processes."""
        save_state(self.engine, Path(output_dir), self.args.should_save)

    @property
    def engine(self) -> Engine:
        """What holds weights and optimiser state, once training has begun."""
        return engine_of(self.accelerator.unwrap_model(self.model), self.optimizer)

    def whole_weights(self) -> dict[str, Tensor]:
        """Of sharded models, gathered by all processes for the main one: what trains, and what LoRA does not freeze."""
        wanted = is_trained_beside if self._is_lora else (lambda name: True)
        return whole_weights(self.engine, self.args.should_save, wanted)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The whole model, in the optimiser's precision; sharded weights are gathered by all processes."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        state = self.whole_weights()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    @property
    def _is_lora(self) -> bool:
        return self.recipe.lora is not None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Of LoRA the updates alone, with the RoE parts beside them."""
        if not self._is_lora:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        folder, prefix = Path(output_dir or str(self.args.output_dir)), "base_model.model."
        folder.mkdir(parents=True, exist_ok=True)
        # Left to itself, peft would ask the hub whether the base's vocabulary has grown.
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        if self.recipe.is_routed:
            state = state_dict and {name.removeprefix(prefix): value for name, value in state_dict.items()}
            save_parts(base_of(model), folder, state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's checkpoint, marked once it is whole; older ones go only then.

        Raises:
            TrainingError: if it cannot be written, as on a full disk, or the step spoiled the weights; what was whole
                stays.
        """
        checkpoints = Path(str(self.args.output_dir))
        folder = checkpoints / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            on_main(lambda: self._mark(folder))
        except UNWRITTEN as error:
            if lost_the_others(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise unwritten(folder, checkpoints, error) from error
        if self.is_world_process_zero():
            keep_newest(checkpoints, self.recipe.training.save_total_limit)

    def _mark(self, folder: Path) -> None:
        """A checkpoint whose weights are spoiled is not left lying."""
        try:
            check_numbers(saved_weights(folder), self.state.global_step, folder.parent)
        except TrainingError:
            shutil.rmtree(folder)
            raise
        mark_complete(folder, {"mean_skip_rate": self.mean_skip_rate})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """See ``load_weights``."""
        load_weights(model or self.model, Path(resume_from_checkpoint))


class _StepEnd(TrainerCallback):
    """Tells the trainer that an optimiser step is done; logs and checkpoints come behind all callbacks."""

    def __init__(self, trainer: RoETrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint's state brings the saving and logging steps of the run that wrote it; this run's count."""
        state.compute_steps(args, state.max_steps)
        self.trainer.window.clear()  # building the trainer and its engine is no part of training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the step."""
        self.trainer.close_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was asked behind the last step may have met faulty records as well."""
        if self.trainer.fault_log is not None:
            self.trainer.fault_log.close_step(self.trainer.accelerator)
