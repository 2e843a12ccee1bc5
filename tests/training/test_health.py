"""Runs that are not worth going on with: they stop, name the records, and keep what was good."""

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import log, quiet_run, recipe, settings, weights

from routing_experts.data.collate import example_key
from routing_experts.errors import TrainingError
from routing_experts.models.checkpoint import is_roe_key
from routing_experts.models.load import load_base
from routing_experts.training import run
from routing_experts.training.callbacks import RateWatch
from routing_experts.training.folder import last_complete
from routing_experts.training.health import stuck_rate
from routing_experts.training.making import saved_weights
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.schedule import THREE_STAGES
from routing_experts.training.trainer import LAYER_RATE, RoETrainer


@pytest.mark.parametrize(("value", "told"), [(float("nan"), "no number"), (1e4, "above 11.6")])
def test_a_bad_loss_stops_the_run_and_names_its_records(value, told, tmp_path, monkeypatch):
    """Guards hours after a step that spoiled the weights: nothing is saved any more, and the run can go on before."""
    named: list[int] = []

    class Spoils(RoETrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 4:
                named[:] = inputs["example_keys"].tolist()
                with torch.no_grad():
                    model.lm_head.weight.mul_(value)
            return super().compute_loss(model, inputs, *args, **kwargs)

    of = recipe(tmp_path, steps=6, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "RoETrainer", Spoils)
        with pytest.raises(TrainingError, match=f"step 5: the loss is .*{told}.*records") as error:
            quiet_run(of)
    names = str(error.value).split("on records ")[1].split(". Look")[0].split(", ")
    assert [example_key(name) for name in names] == [key for key in (example_key(n) for n in names) if key in named]
    assert len(names) == 8
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    kept = weights(load_base(tmp_path / "checkpoints" / "checkpoint-4"))
    assert all(tensor.isfinite().all() for tensor in kept.values())
    mended = recipe(tmp_path, steps=6, save_steps=1, learning_rate=5e-4)
    with pytest.raises(TrainingError, match=r"learning_rate: 0.001 there, 0.0005 asked for.*--accept-changes"):
        quiet_run(mended)
    assert quiet_run(mended, accept=True).folder.is_dir()
    noted = json.loads((tmp_path / "run.json").read_text())
    assert noted["recipe"]["training"]["learning_rate"] == 5e-4
    assert noted["changes"] == [{"step": 4, "change": "training.learning_rate: 0.001 there, 0.0005 asked for"}]
    quiet_run(recipe(tmp_path / "lower", steps=6, learning_rate=5e-4))
    rates, lower = ([line.learning_rate for line in log(folder)] for folder in (tmp_path, tmp_path / "lower"))
    assert rates[:3] != lower[:3]
    assert rates[4:] == pytest.approx(lower[4:])


def test_a_bad_loss_before_any_checkpoint_promises_none(tmp_path, monkeypatch):
    """Guards the message's truth: with nothing to go on from, the next run begins anew, with whatever rates."""

    class Spoils(RoETrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(run, "RoETrainer", Spoils)
        with pytest.raises(TrainingError, match=r"no number.* There is no whole checkpoint: the next run begins anew"):
            quiet_run(recipe(tmp_path))
    assert quiet_run(recipe(tmp_path, learning_rate=5e-4)).folder.is_dir()


@pytest.mark.parametrize("step", [4, 6])
def test_weights_that_the_last_update_spoiled_are_not_kept(step, tmp_path, monkeypatch):
    """Guards checkpoints, and the model at the end, against a gradient that overflows while the loss is a number."""

    class Overflows(RoETrainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == step - 1:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
            return loss

    of = recipe(tmp_path, steps=6, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "RoETrainer", Overflows)
        with pytest.raises(TrainingError, match=rf"step {step}: .* holds what is no number, from a gradient"):
            quiet_run(of)
    assert not (tmp_path / "model").exists()
    newest = last_complete(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.name == f"checkpoint-{step - 1}"
    assert not (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()  # a 7B's would be 28 GB of nothing
    looked_at = [name for name, _ in saved_weights(newest)]
    whole = dict(quiet_run(of).model.named_parameters())  # what is tied is one
    assert len(looked_at) == len(whole)  # base and RoE parts alike, once each
    assert {name for name in whole if is_roe_key(name)} < set(looked_at)


def test_stuck_rates_are_told_by_the_knob_that_moves_them():
    """Guards the warning's direction, and that a rate on its way gets none."""
    assert "Raise roe.sparsity_loss_coef" in stuck_rate(0.0, 0.3)
    assert "Lower training.learning_rate" in stuck_rate(1.0, 0.3)
    assert not stuck_rate(0.2, 0.3)
    assert not stuck_rate(0.0, 0.0)


@pytest.mark.parametrize(("rate", "stage", "warns"), [(0.0, 1, True), (0.0, 0, False), (0.3, 1, False), (1.0, 2, True)])
def test_a_stuck_rate_is_told_at_the_end_of_a_stage_of_routers(rate, stage, warns, tmp_path):
    """Guards the moment: once routers have been asked, over the routed layers alone."""
    said = io.StringIO()
    watch = RateWatch(Console(file=said, width=200), recipe_from_dict(settings(tmp_path)), THREE_STAGES[stage])
    state: Any = type("State", (), {"is_world_process_zero": True})
    logs = {f"{LAYER_RATE}{layer:02d}": rate if layer else 0.0 for layer in range(12)}
    watch.on_log(None, state, None, logs)  # type: ignore[arg-type]
    watch.on_log(None, state, None, {"train_runtime": 1.0})  # type: ignore[arg-type]
    watch.on_train_end(None, state, None)  # type: ignore[arg-type]
    assert ("stuck" in said.getvalue()) == warns
