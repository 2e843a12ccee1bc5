"""What a training step of each stage costs beside dense fine-tuning, with and without recomputed layers.

``python benchmarks/stages.py --json RECORD`` times forward, backward and optimiser step on cpu-100m's decoder: two
dialogues of 512 tokens, of which 128 are context, 128 questions and 256 their answers, in one turn or in four. All
contenders take a step in turn; a step's ratio is to the dense step of its round.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from routing_experts.evaluation.bench.models import random_sides
from routing_experts.evaluation.bench.presets import PRESETS
from routing_experts.evaluation.bench.work import keep_freed_memory
from routing_experts.records import environment, save_json
from routing_experts.training.parameters import freeze_all_but
from routing_experts.training.recipe import Recipe, recipe_from_dict
from routing_experts.training.schedule import DENSE_STAGE, THREE_STAGES, Stage
from routing_experts.training.trainer import RoETrainer

BATCH, CONTEXT, QUESTIONS, ANSWERS, ROUNDS = 2, 128, 128, 256, 7
TURNS = (1, 4)
Contender = tuple[str, int]  # a stage's name, and turns a dialogue
BEGINNINGS = {"adapter_warmup": 0.0, "router_warmup": 0.3, "instruction_tuning": 0.5}


class Placed(RoETrainer):
    """A trainer at some place in the run, whose steps are taken from outside."""

    place = 0.0

    @property
    def progress(self) -> float:
        """The place."""
        return self.place


def batch_of(vocabulary: int, turns: int) -> dict[str, Tensor]:
    """Random words in so many turns a dialogue."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (BATCH, CONTEXT + QUESTIONS + ANSWERS), generator=generator)
    segments = [0] * CONTEXT
    for turn in range(turns):
        segments += [2 * turn + 1] * (QUESTIONS // turns) + [2 * turn + 2] * (ANSWERS // turns)
    segment_ids = torch.tensor(segments).expand(BATCH, -1)
    is_answer = (segment_ids > 0) & (segment_ids % 2 == 0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.where(is_answer, ids, -100),
        "segment_ids": segment_ids,
        "example_keys": torch.arange(BATCH),
    }


def stepper(
    recipe: Recipe, stage: Stage, model: Any, batch: dict[str, Tensor], folder: Path, foreach: bool | None = None
) -> Callable[[], float]:
    """Seconds of one step of a stage.

    Args:
        recipe, stage: what is trained.
        model: it is, from random weights.
        batch: the same in every step.
        folder: of what the Trainer writes.
        foreach: whether AdamW updates all parameters at once, as it does on GPUs.
    """
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    trainer = Placed(recipe=recipe, stage=stage, model=model, args=arguments)
    trainer.place = BEGINNINGS.get(stage.name, 0.0)
    lora = recipe.lora is not None
    freeze_all_but(model, stage.trains, lora)
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["foreach"] = foreach

    def step() -> float:
        freeze_all_but(model, stage.trains, lora)  # contenders share the routed model's weights
        started = perf_counter()
        trainer.compute_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = perf_counter() - started
        trainer.window.clear()
        trainer.close_step()
        return seconds

    return step


def timed_steps(steps: dict[Contender, Callable[[], float]]) -> dict[Contender, list[float]]:
    """Seconds of each contender's steps, in turn."""
    timed: dict[Contender, list[float]] = {contender: [] for contender in steps}
    for turn in range(ROUNDS + 1):
        for contender, step in steps.items():
            seconds = step()
            if turn:  # the first warms up
                timed[contender].append(seconds)
    return timed


def main() -> None:
    """Times all stages in turn and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stages.json"))
    asked = parser.parse_args()
    keep_freed_memory()
    shape = PRESETS["cpu-100m"].shape
    sides = random_sides(shape, torch.float32, torch.device("cpu"))
    recipe = recipe_from_dict({"model": "none", "output": "none", "data": {"records": 1}})
    recipe = replace(recipe, roe=sides.routed.roe_config)
    batches = {turns: batch_of(shape["vocab_size"], turns) for turns in TURNS}
    folder = Path("runs/bench/stages")
    rows = []
    for recomputed in (False, True):
        for model in (sides.dense, sides.routed):
            model.train()
            model.gradient_checkpointing_disable()
            if recomputed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        dense = (DENSE_STAGE[0].name, TURNS[0])
        steps = {dense: stepper(recipe, DENSE_STAGE[0], sides.dense, batches[TURNS[0]], folder)}
        for turns, batch in batches.items():
            for stage in THREE_STAGES:
                steps[stage.name, turns] = stepper(recipe, stage, sides.routed, batch, folder)
        timed = timed_steps(steps)
        for (name, turns), seconds in timed.items():
            ratios = [own / other for own, other in zip(seconds, timed[dense], strict=True)]
            row = {"stage": name, "turns": turns, "recomputed": recomputed}
            rows.append(row | {"step_seconds": seconds, "of_dense": median(ratios)})
            told = f"{name}, turns {turns}{', recomputed' if recomputed else ''}"
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"{told}: {median(seconds):.2f} s, {median(ratios):.3f} of dense tuning ({spread})", flush=True)
    tokens = {"batch": BATCH, "context": CONTEXT, "questions": QUESTIONS, "answers": ANSWERS}
    save_json(asked.json, tokens | {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
