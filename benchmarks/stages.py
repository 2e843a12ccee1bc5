"""What a training step of each stage costs beside dense fine-tuning, with and without recomputed layers.

``python benchmarks/stages.py --json RECORD`` times forward, backward and optimiser step on cpu-100m's decoder: two
dialogues of 512 tokens, of which 128 are context, 128 a question and 256 its answer. All contenders take a step in
turn.
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

BATCH, CONTEXT, QUESTION, ANSWER, ROUNDS = 2, 128, 128, 256, 5
BEGINNINGS = {"adapter_warmup": 0.0, "router_warmup": 0.3, "instruction_tuning": 0.5}


class Placed(RoETrainer):
    """A trainer at some place in the run, whose steps are taken from outside."""

    place = 0.0

    @property
    def progress(self) -> float:
        """The place."""
        return self.place


def batch_of(vocabulary: int) -> dict[str, Tensor]:
    """Random words in one turn a dialogue."""
    generator = torch.Generator().manual_seed(0)
    length = CONTEXT + QUESTION + ANSWER
    ids = torch.randint(3, vocabulary, (BATCH, length), generator=generator)
    segments = torch.tensor([0] * CONTEXT + [1] * QUESTION + [2] * ANSWER).expand(BATCH, -1)
    labels = torch.where(segments == 2, ids, -100)
    keys = torch.arange(BATCH)
    whole = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": whole, "labels": labels, "segment_ids": segments, "example_keys": keys}


def stepper(recipe: Recipe, stage: Stage, model: Any, batch: dict[str, Tensor], folder: Path) -> Callable[[], float]:
    """Seconds of one step of a stage."""
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    trainer = Placed(recipe=recipe, stage=stage, model=model, args=arguments)
    trainer.place = BEGINNINGS.get(stage.name, 0.0)
    freeze_all_but(model, stage.trains)
    optimizer = trainer.create_optimizer()

    def step() -> float:
        freeze_all_but(model, stage.trains)  # contenders share the routed model's weights
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
    batch, folder = batch_of(shape["vocab_size"]), Path("runs/bench/stages")
    rows = []
    for recomputed in (False, True):
        for model in (sides.dense, sides.routed):
            model.train()
            model.gradient_checkpointing_disable()
            if recomputed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        stages = [(sides.dense, DENSE_STAGE[0]), *((sides.routed, stage) for stage in THREE_STAGES)]
        steps = {stage.name: stepper(recipe, stage, model, batch, folder) for model, stage in stages}
        timed: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(ROUNDS + 1):
            for name, step in steps.items():
                seconds = step()
                if turn:  # the first warms up
                    timed[name].append(seconds)
        dense = median(timed["dense_tuning"])
        for name, seconds in timed.items():
            rows.append({"stage": name, "recomputed": recomputed, "step_seconds": seconds})
            told = f"{name}{', recomputed' if recomputed else ''}"
            print(f"{told}: {median(seconds):.2f} s a step, {median(seconds) / dense:.3f} of dense tuning", flush=True)
    tokens = {"batch": BATCH, "context": CONTEXT, "question": QUESTION, "answer": ANSWER}
    save_json(asked.json, tokens | {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
