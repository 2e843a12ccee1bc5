"""Records that are held out while training: never trained on, and asked on the routes that inference takes."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import log, recipe, settings

from routing_experts.data.collate import Collator
from routing_experts.errors import ConfigError
from routing_experts.models.load import from_pretrained, load_processor
from routing_experts.models.model import routing_context
from routing_experts.nn.losses import cross_entropy_per_example
from routing_experts.training import run
from routing_experts.training.datasets import build_datasets
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.run import train

HELD_OUT = 11  # no whole number of batches of eight


def held_out(output, **training: Any) -> Any:
    made = settings(output, **({"steps": 6, "eval_steps": 6} | training))
    one_turn = {"digits": {"max_turns": 1}}
    return recipe_from_dict(made | {"data": {"source": "digits", "records": 43, "held_out": HELD_OUT} | one_turn})


def test_held_out_records_are_not_trained_on(tmp_path):
    """Guards the split: the first records train, the last are asked, none is both."""
    trained, asked = build_datasets(held_out(tmp_path), load_processor("pocket"))
    assert (len(trained), len(asked)) == (32, HELD_OUT)
    ids = [{dataset.records[dataset.first + i].id for i in range(len(dataset))} for dataset in (trained, asked)]
    assert not ids[0] & ids[1]
    assert len(ids[1]) == HELD_OUT


def test_they_are_asked_as_inference_would(tmp_path, monkeypatch):
    """Guards what is reported: hard routes of all held-out records, the incomplete last batch included."""
    told: list[dict[str, float]] = []

    class Told(run.RoETrainer):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            told.extend([logs] if "eval_ce" in logs else [])
            super().log(logs, *args)

    monkeypatch.setattr(run, "RoETrainer", Told)
    of, said = held_out(tmp_path), io.StringIO()
    train(of, Console(file=said))
    (found,) = told
    model = from_pretrained(tmp_path / "model")
    _, asked = build_datasets(of, load_processor("pocket"))
    losses, skips = [], []
    for index in range(HELD_OUT):
        batch = Collator(0)([asked[index]])
        labels, segment_ids, _ = (batch.pop(name) for name in ("labels", "segment_ids", "example_keys"))
        context = routing_context(model, segment_ids)
        with torch.no_grad():
            logits = model(**batch, routing=context, use_cache=False).logits
        losses.append(float(cross_entropy_per_example(logits, labels)))
        kept = sum(bool(keep) for keep in context.keep.values())
        skips.append((len(context.keep) - kept) / 12)
    assert found["eval_ce"] == pytest.approx(sum(losses) / HELD_OUT, rel=1e-4)
    assert found["eval_skip_rate"] == pytest.approx(sum(skips) / HELD_OUT, abs=1e-6)
    assert f"step 6, held out: CE {found['eval_ce']:.3f}" in said.getvalue()


def test_asking_does_not_disturb_training(tmp_path):
    """Guards draws, data order and learning rate: the losses are those of a run that asks nothing."""
    train(held_out(tmp_path / "asks", eval_steps=1), Console(quiet=True))
    quiet = recipe(tmp_path / "quiet", steps=6)
    train(replace(quiet, data=replace(held_out("x").data, records=32, held_out=0)), Console(quiet=True))
    asking, silent = (log(tmp_path / name) for name in ("asks", "quiet"))
    assert [line.loss for line in asking] == [line.loss for line in silent]


@pytest.mark.parametrize(
    "changes", [{"data": {"records": 40, "held_out": 8}}, {"training": {"eval_steps": 2}}], ids=str
)
def test_one_setting_without_the_other_is_refused(changes, tmp_path):
    """Guards against records that are lost to training and never asked."""
    made = settings(tmp_path)
    with pytest.raises(ConfigError, match="Give both, or neither"):
        recipe_from_dict(made | {name: made[name] | value for name, value in changes.items()})
