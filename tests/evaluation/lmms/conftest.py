"""Models and tasks for lmms-eval, all local: nothing here may ask the network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from routing_experts import api
from routing_experts.config import RoEConfig
from routing_experts.evaluation.lmms.digits import write_task
from routing_experts.evaluation.lmms.isolation import isolated
from routing_experts.evaluation.questions import Question, digits_questions
from routing_experts.models.families import family_of
from routing_experts.models.load import load_base, load_processor

pytest.importorskip("lmms_eval")


@pytest.fixture
def cache_in(monkeypatch) -> Callable[[Path], None]:
    """Has prepared datasets kept in a folder: one that is named alike elsewhere would be taken for the same."""
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    def call(folder: Path) -> None:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        _resolve_hf_datasets_cache_dir.cache_clear()

    return call


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """lmms-eval is run here as others run it; the tests after these are to meet the process as it was."""
    with isolated():
        yield


@pytest.fixture(autouse=True)
def _local(monkeypatch, cache_in, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    cache_in(tmp_path / "cache")


@pytest.fixture(scope="session")
def routed_folder(tmp_path_factory) -> Path:
    """The pocket model, which knows the digits, with adapters and routers of random weights: routes differ."""
    folder = tmp_path_factory.mktemp("lmms") / "routed"
    processor = load_processor("pocket")
    config = RoEConfig(routing_token_std=1.0, budget=((0.05, 2.0), (0.06, 1.0), (0.07, -1.0)))
    model = api.convert(load_base("pocket"), config, processor, seed=6)
    for layer in family_of(model).decoder_layers(model)[1:]:
        torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(5))
    api.save_pretrained(model, folder, processor)
    return folder


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return digits_questions(40, 77)


@pytest.fixture(scope="session")
def digits(tmp_path_factory, questions) -> Path:
    """The questions as a task's folder."""
    folder = tmp_path_factory.mktemp("lmms") / "digits"
    write_task(folder, questions)
    return folder


@pytest.fixture
def run() -> Callable[..., dict[str, Any]]:
    """Runs lmms-eval itself on tasks of some folders."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    def call(model: Any, task: str, *folders: Path, simple: bool = False, **settings: Any) -> dict[str, Any]:
        manager = TaskManager("ERROR", include_path=[str(folder) for folder in folders], include_defaults=False)
        return simple_evaluate(
            model="roe" if isinstance(model, dict) else model,
            model_args=model if not isinstance(model, dict) else ",".join(f"{k}={v}" for k, v in model.items()),
            tasks=[task],
            task_manager=manager,
            device="cpu",
            bootstrap_iters=0,
            force_simple=simple,
            verbosity="ERROR",
            **settings,
        )

    return call
