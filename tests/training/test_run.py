"""Runs of a few steps: what they leave, resuming, interruption, and settings that change nothing (contracts 8, 10)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import log, quiet_run, recipe, settings, weights

from routing_experts.data.digits import DigitsTask
from routing_experts.errors import InterruptedRunError
from routing_experts.evaluation.questions import digits_questions, records_of
from routing_experts.inference.generate import prompt_batches
from routing_experts.models.checkpoint import is_roe_key
from routing_experts.models.convert import is_routed
from routing_experts.models.load import from_pretrained, load_processor
from routing_experts.training import run
from routing_experts.training.folder import RunFolder
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.run import tuned_base
from routing_experts.training.schedule import THREE_STAGES
from routing_experts.training.trainer import RoETrainer

ROE = [sys.executable, "-W", "ignore", "-c", "from routing_experts.cli import main; main()"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of three steps, one a stage, to its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    quiet_run(recipe(folder))
    return folder


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """A run of six steps that goes over its records one and a half times."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    quiet_run(recipe(folder, steps=6, save_total_limit=3))
    return folder


def assert_same_weights(first: Any, second: Any) -> None:
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def copy_as_unfinished(source: Path, target: Path) -> None:
    """The note of a run's recipe, as it was before the run ended."""
    noted = json.loads((source / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(noted | {"finished": False}))


def without_seconds(folder: Path) -> list[Any]:
    return [replace(line, seconds=0.0, tokens_per_second=None) for line in log(folder)]


def test_a_run_leaves_model_log_and_curves(finished):
    """Guards the folder that every other verb reads."""
    lines = log(finished)
    assert [line.step for line in lines] == [1, 2, 3]
    assert [line.stage for line in lines] == [stage.name for stage in THREE_STAGES]
    assert [line.progress for line in lines] == pytest.approx([1 / 3, 2 / 3, 1])
    for line in lines:
        assert line.loss is not None
        assert line.layer_skip_rates is not None
        assert len(line.layer_skip_rates) == 12
        assert line.layer_skip_rates[0] == 0
        assert line.skip_rate == pytest.approx(sum(line.layer_skip_rates) / 12)
        assert line.target_skip_ratio == pytest.approx(0.3 * 11 / 12)  # the first layer is not routed
    assert list((finished / "tensorboard").rglob("events.out.tfevents.*"))
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert not [
        path for path in (finished / "model").iterdir() if path.suffix not in (".json", ".safetensors", ".jinja", ".md")
    ]


def test_the_written_model_is_the_trained_one(finished, tmp_path):
    """Guards the last save: loaded, it is routed and has the weights that training ended with."""
    loaded = from_pretrained(finished / "model")
    assert is_routed(loaded)
    assert loaded.roe_config.markers is not None
    assert_same_weights(loaded, quiet_run(recipe(tmp_path)).model)
    processor = load_processor(finished / "model")
    batch = next(prompt_batches(loaded, processor, records_of(digits_questions(2, 0)), 2))
    assert loaded.generate(**batch, max_new_tokens=2).shape[0] == 2


def test_running_again_trains_nothing_and_changes_nothing(finished):
    """Guards a finished run against a repeated command: it gives the model that is there."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    again = quiet_run(recipe(finished))
    assert again.folder == finished / "model"
    assert_same_weights(again.model, from_pretrained(finished / "model"))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5])
def test_a_broken_run_resumes_to_the_same_weights(stop, longer, tmp_path, monkeypatch):
    """Guards contract 8: cut anywhere, inside a stage or at its edge, it ends bit for bit as if never cut."""

    class Breaks(RoETrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == stop:
                raise RuntimeError("power cut")
            return super().training_step(*args, **kwargs)

    cut = recipe(tmp_path, steps=6, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "RoETrainer", Breaks)
        with pytest.raises(RuntimeError, match="power cut"):
            quiet_run(cut)
    assert not (tmp_path / "model").exists()
    resumed = quiet_run(cut)
    assert_same_weights(resumed.model, from_pretrained(longer / "model"))
    assert without_seconds(tmp_path) == without_seconds(longer)


def test_an_incomplete_checkpoint_is_passed_over(longer, tmp_path):
    """Guards against a save that was cut: the last complete one is taken instead."""
    shutil.copytree(longer / "checkpoints", tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (newest / "complete.json").unlink()
    copy_as_unfinished(longer, tmp_path)
    resumed = quiet_run(recipe(tmp_path, steps=6))
    assert_same_weights(resumed.model, from_pretrained(longer / "model"))


def test_checkpoints_every_few_steps_change_nothing(longer, tmp_path):
    """Guards against saving that disturbs training: its draws, its data order or its weights."""
    assert_same_weights(quiet_run(recipe(tmp_path, steps=6, save_steps=1)).model, from_pretrained(longer / "model"))


def test_a_cut_run_may_go_on_with_other_saving_and_logging(longer, tmp_path):
    """Guards settings that a checkpoint's own state remembers: the new command's count, and the weights stay."""
    shutil.copytree(longer / "checkpoints", tmp_path / "checkpoints")
    for name in ("run.json", "log.jsonl"):
        shutil.copy(longer / name, tmp_path)
    copy_as_unfinished(longer, tmp_path)
    for kept in (tmp_path / "checkpoints").iterdir():
        if kept.name != "checkpoint-2":
            shutil.rmtree(kept)
    resumed = quiet_run(recipe(tmp_path, steps=6, save_steps=1, save_total_limit=9, logging_steps=2))
    assert_same_weights(resumed.model, from_pretrained(longer / "model"))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {f"checkpoint-{n}" for n in (3, 4, 5)}
    assert [line.step for line in log(tmp_path)] == [1, 2, 3, 4, 6]  # the first three from before the cut


def test_stages_that_change_nothing_change_nothing(tmp_path):
    """Guards boundaries: a stage cut in two gives the weights of the stage in one piece."""
    whole = {"name": "all", "until": 1.0, "trains": ["adapters", "routers", "decoder"], "gate": "learned"}
    found = []
    for name, stages in (("one", [whole]), ("two", [whole | {"until": 0.5}, whole])):
        found.append(quiet_run(recipe_from_dict(settings(tmp_path / name, steps=4) | {"stages": stages})).model)
    assert_same_weights(*found)


def test_the_dense_control_trains_the_base_beside_the_run(finished, tmp_path):
    """Guards the control: same steps, no routing, its records in a folder of its own."""
    of = recipe(tmp_path)
    trained = quiet_run(tuned_base(of))
    assert not is_routed(trained.model)
    assert trained.folder == tmp_path / "tuned" / "model"
    assert list((tmp_path / "tuned" / "tensorboard").rglob("events.out.tfevents.*"))
    (first, *_) = log(tmp_path / "tuned")
    assert (first.stage, first.skip_rate, first.layer_skip_rates) == ("dense_tuning", None, None)


@pytest.mark.parametrize(
    "training", [{"batch_size": 4, "accumulation": 2}, {"gradient_checkpointing": True}], ids=lambda t: "-".join(t)
)
def test_settings_of_the_engine_do_not_change_the_run(training, longer, tmp_path):
    """Guards contract 10: two batches of four are one of eight, and recomputed layers are the layers."""
    trained = quiet_run(recipe(tmp_path, steps=6, **training))
    for line, expected in zip(log(tmp_path), log(longer), strict=True):
        assert (line.loss, line.ce) == pytest.approx((expected.loss, expected.ce), abs=1e-5)
        assert line.layer_skip_rates == pytest.approx(expected.layer_skip_rates, abs=1e-5)
    if "gradient_checkpointing" in training:
        assert_same_weights(trained.model, from_pretrained(longer / "model"))


def test_lora_trains_beside_routing(watched, tmp_path):
    """Guards peft: its updates and RoE's parts train, no part of RoE is wrapped, and the merged model routes."""
    pytest.importorskip("peft")
    of = recipe_from_dict(settings(tmp_path, steps=6) | {"lora": {"rank": 4}})
    trained = quiet_run(of)
    last = watched()[-1]
    changed = {name for name, tensor in last.before.items() if not torch.equal(tensor, last.after[name])}
    assert {name for name in last.before if "lora_B" in name} <= changed
    assert any("router" in name for name in changed)
    assert any("skip_up" in name for name in changed)
    assert all("lora_" in n or any(part in n for part in ("skip_", "router", "routing_tokens")) for n in changed)
    wrapped = [name for name in last.modules if name.endswith("lora_A")]
    assert len(wrapped) == 12 * 7
    assert not [name for name in wrapped if "skip_" in name or "router" in name or "vision" in name]
    loaded = from_pretrained(tmp_path / "model")
    assert is_routed(loaded)
    assert not [name for name, _ in loaded.named_parameters() if "lora" in name]
    assert_same_weights(loaded, trained.model)


def test_low_rank_updates_in_sixteen_bits(watched, tmp_path):
    """Guards LoRA's memory: the frozen base in 16 bits, what trains in 32, and a result in the base's precision."""
    pytest.importorskip("peft")
    trained = quiet_run(recipe_from_dict(settings(tmp_path, precision="bf16") | {"lora": {"rank": 4}}))
    for name, tensor in watched()[-1].before.items():
        trains = "lora_" in name or is_roe_key(name)
        assert tensor.dtype == (torch.float32 if trains else torch.bfloat16), name
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in from_pretrained(tmp_path / "model").parameters()} == {torch.bfloat16}


def test_a_broken_lora_run_resumes_to_the_same_weights(tmp_path):
    """Guards checkpoints of which peft writes one part and we the other."""
    pytest.importorskip("peft")
    stage = {"name": "all", "until": 1.0, "trains": ["decoder", "routers"], "gate": "learned"}
    stages = {"stages": [stage | {"until": 0.5}, stage]}  # the base's updates differ from their start at the boundary
    of = recipe_from_dict(settings(tmp_path / "whole", steps=4) | {"lora": {"rank": 4}} | stages)
    whole = quiet_run(of)
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    copy_as_unfinished(tmp_path / "whole", tmp_path / "cut")
    resumed = quiet_run(replace(of, output=str(tmp_path / "cut")))
    assert_same_weights(resumed.model, whole.model)


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "run", **changes)))
    return path


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path):
    """Guards the promise of the message: interrupted, then resumed, a run ends as it would have."""
    command = [*ROE, "train", str(written(tmp_path)), "--set", "training.steps=24"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    journal = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not (journal.is_file() and journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert "same command" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "model").exists()
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    assert [line.step for line in log(tmp_path / "run")] == list(range(1, 25))
    assert is_routed(from_pretrained(tmp_path / "run" / "model"))


def test_ctrl_c_in_the_last_step_is_not_too_late(tmp_path, monkeypatch):
    """Guards the run's very end: with every step done, there is nothing left to break off, and the model is kept."""

    class Interrupted(RoETrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(run, "RoETrainer", Interrupted)
    with pytest.raises(InterruptedRunError, match="the run is finished"):
        quiet_run(recipe(tmp_path))
    assert RunFolder(tmp_path).is_finished
    assert is_routed(from_pretrained(tmp_path / "model"))


def test_every_record_is_read_from_the_recipe_s_set(finished):
    """Guards against training on held-out handwriting."""
    assert recipe(finished).data.digits == DigitsTask(split="train")
