"""A trainer that takes notes; the runs it watches are built in ``runs.py``."""

from collections.abc import Callable
from typing import Any

import pytest
from runs import StageNotes, weights

from routing_experts.training import run
from routing_experts.training.trainer import RoETrainer


@pytest.fixture
def watched(monkeypatch) -> Callable[[], list[StageNotes]]:
    """From here on, trainers of runs take notes; calling it gives those so far."""
    notes: list[StageNotes] = []

    class Watched(RoETrainer):
        def train(self, **kwargs: Any) -> Any:
            page = StageNotes(self.stage.name, weights(self.model))
            notes.append(page)
            result = super().train(**kwargs)
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            page.after = weights(self.model)
            state = self.optimizer.optimizer.state  # type: ignore[union-attr]
            page.with_state = {names[id(parameter)] for parameter, values in state.items() if values}
            page.modules = {name for name, _ in self.model.named_modules()}
            return result

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            notes[-1].with_gradient |= {n for n, p in self.model.named_parameters() if p.grad is not None}
            return loss

    monkeypatch.setattr(run, "RoETrainer", Watched)
    return lambda: notes
