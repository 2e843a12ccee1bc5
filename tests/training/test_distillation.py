"""Distillation: routed answers are drawn to those of the same model with nothing skipped."""

import copy
from typing import Any

import pytest
import torch
from runs import log, quiet_run, recipe, settings

from routing_experts.models.convert import revert
from routing_experts.nn.losses import distillation_per_example
from routing_experts.training import run
from routing_experts.training.batches import model_inputs
from routing_experts.training.lora import base_of
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.trainer import RoETrainer

COEF = 3.0


@pytest.fixture
def compared(monkeypatch) -> list[dict[str, float]]:
    """Every step's logs, with the distance to a reverted copy of the model."""
    steps: list[dict[str, float]] = []

    class Compared(RoETrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            dense = revert(base_of(copy.deepcopy(self.accelerator.unwrap_model(model)))).eval()
            with torch.no_grad():
                dense_logits = dense(**model_inputs(inputs), use_cache=False).logits
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            distance = distillation_per_example(outputs.logits, dense_logits, inputs["labels"]).mean()
            steps.append({"expected": float(distance.detach())})
            return loss

        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log(logs, *args)
            if "loss" in logs:
                steps[-1] |= self.state.log_history[-1]

    monkeypatch.setattr(run, "RoETrainer", Compared)
    return steps


def test_the_distance_is_to_the_dense_path(compared, tmp_path):
    """Guards what is compared: the weights of the step, with all layers kept, in every stage that routes."""
    quiet_run(recipe(tmp_path / "with", steps=4, distill_coef=COEF))
    assert len(compared) == 4
    for step in compared:
        assert step["distillation"] == pytest.approx(step["expected"], rel=1e-4, abs=1e-7)
    assert any(step["distillation"] > 0 for step in compared)
    assert [line.distillation for line in log(tmp_path / "with")] == [step["distillation"] for step in compared]


def test_it_adds_to_the_loss_alone(compared, tmp_path):
    """Guards the objective: the first step's loss is the plain one and the weighted distance."""
    quiet_run(recipe(tmp_path / "with", steps=3, distill_coef=COEF))
    (first, *_) = compared
    quiet_run(recipe(tmp_path / "without", steps=3))
    plain = compared[3]
    assert "distillation" not in plain
    assert first["total_loss"] == pytest.approx(plain["total_loss"] + COEF * first["distillation"], rel=1e-5)


@pytest.mark.parametrize("whose", ["updates", "attention"])
def test_the_dense_path_is_asked_without_dropout(whose, compared, monkeypatch, tmp_path):
    """Guards what is drawn to: what the model says, not what a random part of its updates or of its past says."""
    made = settings(tmp_path, steps=4, distill_coef=COEF)
    if whose == "updates":
        pytest.importorskip("peft")
        made |= {"lora": {"rank": 4, "dropout": 0.5}}
    else:
        real = run.make_model

        def forgetful(*given: Any) -> Any:
            model = real(*given)
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.5
            return model

        monkeypatch.setattr(run, "make_model", forgetful)
    quiet_run(recipe_from_dict(made))
    for step in compared:
        assert step["distillation"] == pytest.approx(step["expected"], rel=1e-4, abs=1e-7)
