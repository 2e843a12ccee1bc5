"""A small LLaVA-HR, trained on small digits in large pictures, learns to skip.

``python benchmarks/llava_hr.py`` builds it around the pocket model's language model, trains it dense, trains it to
skip, and asks all of it the same held-out questions: dense, dense with either tower's view taken away, and routed. It
writes ``benchmarks/results/llava-hr.json``. At most 45 minutes on two CPU cores; a run that was cut short goes on.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.paired import paired_difference
from routing_experts.evaluation.questions import digits_questions
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.pocket import build_hr
from routing_experts.records import environment, read_log, save_json
from routing_experts.training.folder import RunFolder
from routing_experts.training.recipe import Recipe, load_recipe
from routing_experts.training.run import train

HERE = Path(__file__).parent / "llava_hr"
SEED, QUESTIONS = 2000, 4000


@contextmanager
def blinded(module: nn.Module) -> Iterator[None]:
    """A tower that sees nothing: its output is zero."""
    handle = module.register_forward_hook(lambda module, given, seen: torch.zeros_like(seen))
    try:
        yield
    finally:
        handle.remove()


def trained(recipe: Recipe) -> float:
    """Trains a recipe, or goes on; returns the seconds of its training steps."""
    train(recipe)
    return read_log(RunFolder(recipe.output).log)[-1].seconds


def row(name: str, asked: Evaluation) -> dict[str, Any]:
    """One contender."""
    by_task = {task: part.accuracy for task, part in asked.by_task().items()}
    print(f"{name}: {asked.accuracy:.1%} right, {asked.skip_rate:.1%} skipped")
    return {"contender": name, "accuracy": asked.accuracy, "skip_rate": asked.skip_rate, "by_task": by_task}


def main() -> None:
    """Trains, asks, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/llava-hr.json"))
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--steps", type=int, help="Of each training; the recipes' own by default.")
    told = parser.parse_args()
    changes = {"training.steps": told.steps} if told.steps else {}
    base, routed = (load_recipe(HERE / f"{name}.yaml", changes) for name in ("base", "routed"))
    began = time.monotonic()
    if not (Path(base.model) / "processor_config.json").is_file():  # which is written last
        build_hr.main(Path(base.model))
    seconds = {"base": trained(base), "routed": trained(routed)}
    questions = digits_questions(told.questions, SEED, cell=build_hr.CELL)
    folder = RunFolder(base.output).model
    dense, processor = load_base(folder), load_processor(folder)
    tower = dense.model.vision_tower
    seen = ask(dense, processor, questions)
    rows = [row("dense", seen)]
    for name, part in (("without high resolution", tower.slow_tower), ("without low resolution", tower.embeddings)):
        with blinded(part):
            rows.append(row(name, ask(dense, processor, questions)))
    skipping = ask(from_pretrained(RunFolder(routed.output).model), processor, questions)
    rows.append(row("routed", skipping))
    found = paired_difference(np.array([skipping.right]), np.array([seen.right]))
    record = {
        "questions": len(questions),
        "steps": {"base": base.training.steps, "routed": routed.training.steps},
        "training_seconds": seconds,
        "seconds": time.monotonic() - began,
        "rows": rows,
        "routed_minus_dense": {"mean": found.mean, "low": found.low, "high": found.high},
        "environment": environment(),
    }
    save_json(told.json, record)
    print(
        f"routed − dense: {found.mean:+.1%} [{found.low:+.1%}, {found.high:+.1%}]; {record['seconds'] / 60:.0f} minutes"
    )


if __name__ == "__main__":
    main()
