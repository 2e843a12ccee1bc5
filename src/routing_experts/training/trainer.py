"""The one trainer: the Hugging Face Trainer with RoE's loss, parameter groups and schedule."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from routing_experts.nn.losses import cross_entropy_per_example
from routing_experts.training.parameters import optimizer_groups
from routing_experts.training.recipe import Recipe
from routing_experts.training.schedule import Stage, lr_factor


class RoETrainer(Trainer):
    """Trains one stage of a recipe; steps, learning rate and data order are those of the whole run.

    Args:
        recipe: of the whole run.
        stage: the stage that these steps belong to.
        **kwargs: the Trainer's own.
    """

    def __init__(self, *, recipe: Recipe, stage: Stage, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe, self.stage = recipe, stage
        self.model_accepts_loss_kwargs = False  # the loss is a mean over examples already; accumulation averages it

    @property
    def progress(self) -> float:
        """The share of the run's optimiser steps that are done."""
        return self.state.global_step / self.recipe.training.steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over all groups; frozen parameters are listed but get no state."""
        if self.optimizer is None:
            settings = self.recipe.training
            groups = optimizer_groups(
                (model or self.model).named_parameters(),
                settings.learning_rate,
                settings.base_learning_rate,
                settings.weight_decay,
            )
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The recipe's schedule over the whole run, whichever stage this is."""
        if self.lr_scheduler is None:
            settings = self.recipe.training

            def factor(step: int) -> float:
                return lr_factor(settings.lr_schedule, settings.warmup_share, (step + 1) / settings.steps)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over examples of CE, plus the sparsity loss where the stage routes."""
        labels = inputs.pop("labels")
        inputs.pop("segment_ids")
        outputs = model(**inputs, use_cache=False)
        loss = cross_entropy_per_example(outputs.logits, labels).mean()
        return (loss, outputs) if return_outputs else loss
