"""Runs of a few steps on the pocket model with random weights and digits; and notes on each of their stages."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from routing_experts.records import LogLine, read_log
from routing_experts.training.recipe import Recipe, recipe_from_dict
from routing_experts.training.run import Trained, train

Settings = dict[str, Any]


def settings(output: Path, steps: int = 3, **training: Any) -> Settings:
    """Thirty-two dialogues of one to three turns, batches of eight; learning rates that move every weight at once."""
    return {
        "model": "pocket",
        "random_init": True,
        "output": str(output),
        "roe": {"adapter_init": "xavier"},
        "data": {"source": "digits", "records": 32},
        "training": {
            "steps": steps,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "base_learning_rate": 1e-3,
            "warmup_share": 0.0,
            "logging_steps": 1,
        }
        | training,
    }


def recipe(output: Path, steps: int = 3, **training: Any) -> Recipe:
    return recipe_from_dict(settings(output, steps, **training))


def quiet_run(of: Recipe, **kwargs: Any) -> Trained:
    return train(of, Console(file=io.StringIO()), **kwargs)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def log(folder: Path) -> list[LogLine]:
    return read_log(folder / "log.jsonl")


def assert_same_losses(lines: list[LogLine], expected: list[LogLine]) -> None:
    """To rounding."""
    for line, other in zip(lines, expected, strict=True):
        assert (line.step, line.loss, line.ce) == pytest.approx((other.step, other.loss, other.ce), abs=1e-5)


@dataclass
class StageNotes:
    """What one stage did to the parameters, by their names."""

    stage: str
    before: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    with_gradient: set[str] = field(default_factory=set)
    with_state: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)
