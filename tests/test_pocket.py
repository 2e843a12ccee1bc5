"""The pocket model is as good as stated: at least 0.97 over all tasks on held-out handwriting, greedy decoding."""

from pathlib import Path

import pytest

from routing_experts import load_pocket
from routing_experts.data.digits import TASKS
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import digits_questions
from routing_experts.models.load import POCKET


@pytest.fixture(scope="module")
def asked():
    model, processor = load_pocket()
    return ask(model, processor, digits_questions(1000, seed=77))


def test_stated_accuracy_holds(asked):
    assert asked.accuracy >= 0.97


def test_every_task_is_learned(asked):
    by_task = asked.by_task()
    assert sorted(by_task) == sorted(TASKS)
    assert min(part.accuracy for part in by_task.values()) >= 0.90


def test_it_is_small_and_a_real_llava():
    model, _ = load_pocket()
    assert sum(path.stat().st_size for path in Path(POCKET).iterdir() if path.is_file()) <= 12e6
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.config.get_text_config().num_hidden_layers == 12
